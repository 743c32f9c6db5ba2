"""Prompts of unequal length in one model call: the predictions of calls of their own, and a network as it was."""

from __future__ import annotations

import comfy.conds
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.text.equal_lengths import with_equal_lengths

from ..tiny_transformers import conditioning, names, noise, shared_transformer

LENGTHS = (10, 17, 13)
ONE_CALL = [name for name in names() if name != "flux2"]
"""Flux.2's text is 512 rows or more, so one call of several is slow; it has a test of its own."""


def _conds(name: str, patcher, latent: torch.Tensor, lengths=LENGTHS, **values) -> list:
    """Processed conditionings of these lengths."""
    raw = {
        str(n): comfy.sampler_helpers.convert_cond(conditioning(name, length, seed=n, **values))
        for n, length in enumerate(lengths)
    }
    processed = comfy.samplers.process_conds(patcher.model, latent, raw, latent.device)
    return [processed[str(n)] for n in range(len(lengths))]


def _noted(patcher):
    """A clone, its options, and the rows of each call under them."""
    calls: list[int] = []

    def note(executor, x, *args, **kwargs):
        calls.append(len(x))
        return executor(x, *args, **kwargs)

    clone = patcher.clone()
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    comfy.patcher_extension.add_wrapper_with_key(kind, "test", note, clone.model_options, is_model_options=True)
    return clone, calls


def _predictions(patcher, conds, latent, *, equal: bool, **transformer_options):
    """The predictions, and the rows of each call."""
    clone, calls = _noted(patcher)
    model, sigma, options = clone.model, torch.full((len(latent),), 0.7), clone.model_options
    options["transformer_options"].update(transformer_options)
    model.current_patcher = clone
    if equal:
        conds, options = with_equal_lengths(model, conds, latent, sigma, options)
    return comfy.samplers.calc_cond_batch(model, conds, latent, sigma, options), calls


def _hooks(patcher) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in patcher.model.modules())


def _furthest(ours, theirs) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ONE_CALL)
@pytest.mark.parametrize("batch", [1, 2])
def test_prompts_of_unequal_length_share_a_call_and_draw_what_they_drew(name, batch):
    patcher = shared_transformer(name)
    latent = noise(patcher, batch=batch)
    conds = _conds(name, patcher, latent)
    apart, several = _predictions(patcher, conds, latent, equal=False)
    together, one = _predictions(patcher, conds, latent, equal=True)
    assert len(several) > 1
    assert one == [len(LENGTHS) * batch]
    assert _furthest(together, apart) < 1e-6
    assert _hooks(patcher) == 0


@pytest.mark.parametrize("name", ["chroma", "zimage"])
def test_filled_up_without_a_mask_the_picture_moves(name):
    patcher = shared_transformer(name)
    latent = noise(patcher)
    conds = _conds(name, patcher, latent)
    apart, _ = _predictions(patcher, conds, latent, equal=False)
    grown, _ = with_equal_lengths(patcher.model, conds, latent, torch.tensor([0.7]), patcher.model_options)
    unmasked, _ = _predictions(patcher, grown, latent, equal=False)
    assert _furthest(unmasked, apart) > 1e-3


def test_z_image_s_prompts_of_different_multiples_share_a_call_where_the_image_is_not_filled_up():
    patcher = shared_transformer("zimage")
    latent = noise(patcher, 16, 8)  # 32 tokens
    conds = _conds("zimage", patcher, latent, (10, 40, 33))
    apart, _ = _predictions(patcher, conds, latent, equal=False)
    together, one = _predictions(patcher, conds, latent, equal=True)
    assert one == [3]
    assert _furthest(together, apart) < 1e-6


def test_z_image_s_prompts_of_different_multiples_stay_apart_where_the_image_is_filled_up():
    patcher = shared_transformer("zimage")
    latent = noise(patcher)  # 12 tokens and 20 behind them, which the network puts at a fixed place
    conds = _conds("zimage", patcher, latent, (10, 40, 17))
    apart, _ = _predictions(patcher, conds, latent, equal=False)
    together, several = _predictions(patcher, conds, latent, equal=True)
    assert sorted(several) == [1, 2]
    assert _furthest(together, apart) < 1e-6


def test_a_model_that_looks_at_the_prompts_length_itself_keeps_its_calls(monkeypatch):
    """ComfyUI 0.33.0's LongCat-Image is a Flux that places the picture by the length of its text."""
    patcher = shared_transformer("flux")

    class OfItsOwn(type(patcher.model)):
        def _apply_model(self, x, t, c_concat=None, c_crossattn=None, *rest, **kwargs):
            return super()._apply_model(x, t, c_concat, c_crossattn, *rest, **kwargs) * c_crossattn.shape[1]

    monkeypatch.setattr(patcher.model, "__class__", OfItsOwn)
    latent = noise(patcher)
    conds = _conds("flux", patcher, latent)
    apart, _ = _predictions(patcher, conds, latent, equal=False)
    asked, several = _predictions(patcher, conds, latent, equal=True)
    assert several == [1, 1, 1]
    assert _furthest(asked, apart) == 0


def test_another_pack_s_function_around_attentions_is_called_inside_ours():
    patcher = shared_transformer("qwen")
    latent = noise(patcher)
    conds, seen = _conds("qwen", patcher, latent), []

    def theirs(attention, *args, **kwargs):
        seen.append(len(args[0]))
        return attention(*args, **kwargs)

    apart, _ = _predictions(patcher, conds, latent, equal=False)
    together, _ = _predictions(patcher, conds, latent, equal=True, optimized_attention_override=theirs)
    assert seen == [3, 3]  # one per block
    assert _furthest(together, apart) < 1e-6


def test_a_function_that_takes_our_place_is_refused_and_hooks_are_gone():
    patcher = shared_transformer("qwen")
    latent = noise(patcher)
    clone, _ = _noted(patcher)

    def alone(executor, *args, **kwargs):
        options = next(arg for arg in (*args, kwargs.get("transformer_options")) if isinstance(arg, dict))
        options["optimized_attention_override"] = lambda attention, *a, **k: attention(*a, **k)
        return executor(*args, **kwargs)

    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    comfy.patcher_extension.add_wrapper_with_key(kind, "theirs", alone, clone.model_options, is_model_options=True)
    with pytest.raises(ValueError, match="transformer_blocks"):
        _predictions(clone, _conds("qwen", clone, latent), latent, equal=True)
    assert _hooks(patcher) == 0


def test_hooks_are_gone_after_a_failure():
    patcher = shared_transformer("zimage")
    latent = noise(patcher)

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _predictions(patcher, _conds("zimage", patcher, latent), latent, equal=True, optimized_attention_override=fails)
    assert _hooks(patcher) == 0


def test_what_cannot_be_made_equal_stays_as_it_is():
    patcher = shared_transformer("qwen")
    latent = noise(patcher)
    sigma, options = torch.tensor([0.7]), patcher.model_options
    some = torch.tensor([[1] * 9 + [0]])
    for values in ({"attention_mask": some}, {"control": object()}):
        conds = _conds("qwen", patcher, latent)
        for cond in conds:
            cond[0] |= {key: value for key, value in values.items() if key == "control"}
            if "attention_mask" in values:
                cond[0]["model_conds"]["attention_mask"] = comfy.conds.CONDRegular(some)
        same, own = with_equal_lengths(patcher.model, conds, latent, sigma, options)
        assert own is options
        assert all(ours is theirs for ours, theirs in zip(same, conds, strict=True))
