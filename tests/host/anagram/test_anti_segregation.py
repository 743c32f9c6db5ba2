"""The gradient step inside real sampling: it pulls the concepts together, and leaves everything else as it was."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import comfy.controlnet
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.anagram.anti_segregation import AntiSegregator
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.host.text.tokens import encode_with_phrase, first_occurrence
from comfyui_concepts.methods.anagram.combine import AVERAGING, combiner
from comfyui_concepts.methods.anagram.overlap import CLOSE_ENOUGH, GradientStep, descent, gradient_step_of, segregation
from comfyui_concepts.methods.anagram.views import view_named
from comfyui_concepts.nodes.anagram.options import ConceptsAnagramAntiSegregation

from ..faults import FAULTS, assert_as_remembered, remembered


def _step(strength=0.05, start=0.0, end=1.0, iterations=1, seen=None, in_place=None):
    def loss(maps):
        found = segregation(maps)
        if seen is not None:
            seen.append(found.detach().clone())
        return found

    return GradientStep(loss, partial(descent, strength=strength), start, end, iterations, in_place)


def _cond(seed: int, words=(1, 2), loud=1.0) -> list:
    return [
        [
            loud * torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)),
            {keys.PHRASE_POSITIONS: words} if words else {},
        ]
    ]


def _guider(model, gradient_step, views=("identity", "rotate_180"), words=(1, 2), cfg=5.0, loud=1.0):
    prompts = [ViewPrompt(view_named(v), _cond(i, words, loud), _cond(99)) for i, v in enumerate(views)]
    combine = combiner(AVERAGING, [1.0] * len(views))
    return ViewsGuider(model, prompts, combine, cfg, gradient_step)


def _sample(guider, sampler="euler", steps=6, batch=1, mask=None, callback=None):
    noise = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    return guider.sample(
        noise,
        torch.zeros_like(noise),
        comfy.samplers.sampler_object(sampler),
        sigmas,
        denoise_mask=mask,
        callback=callback,
        disable_pbar=True,
        seed=3,
    )


@pytest.fixture
def model(new_model):
    return new_model("EPS")


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
def test_each_step_brings_the_concepts_nearer_their_target(new_model, kind):
    """A random network's attention hardly depends on the picture, so here only the direction is asked for."""
    seen: list[torch.Tensor] = []
    _sample(_guider(new_model(kind), _step(0.1, start=0.5, iterations=10, seen=seen), loud=12.0), steps=3)
    assert all(later < earlier for earlier, later in pairwise(seen[:10]))


def test_concepts_of_a_real_prompt_move_together(demo_model):
    """Ten steps in the middle of the sampling take away half of what is missing."""
    model, clip, _ = demo_model
    seen: list[torch.Tensor] = []
    words = [("a tree, blue background", "tree"), ("a cat, blue background", "cat")]
    prompts = [
        ViewPrompt(
            view_named(view), encode_with_phrase(clip, *phrase), clip.encode_from_tokens_scheduled(clip.tokenize(""))
        )
        for view, phrase in zip(("identity", "rotate_180"), words, strict=True)
    ]
    combine = combiner(AVERAGING, [1.0, 1.0])
    gradient_step = _step(0.05, start=0.2, end=0.3, iterations=10, seen=seen)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 8)[:5]
    guider = ViewsGuider(model, prompts, combine, 3.0, gradient_step)
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    assert seen[0] > 2 * CLOSE_ENOUGH
    assert min(seen[:11]) < 0.5 * seen[0]


def test_each_noise_level_is_edited_once_within_the_window(model):
    for sampler, calls in (("euler", 6), ("heun", 6)):
        seen: list[torch.Tensor] = []
        _sample(_guider(model, _step(seen=seen)), sampler)
        assert len(seen) == calls
    seen = []
    _sample(_guider(model, _step(start=0.2, end=0.7, seen=seen)), steps=20)
    assert 5 <= len(seen) <= 12


def test_without_strength_or_outside_the_window_nothing_changes(model):
    plain = _sample(_guider(model, None))
    assert torch.equal(_sample(_guider(model, _step(0.0))), plain)
    assert torch.equal(_sample(_guider(model, _step(start=2.0, end=3.0))), plain)
    assert not torch.allclose(_sample(_guider(model, _step())), plain)


def test_one_view_has_nothing_to_step(model):
    plain = _sample(_guider(model, None, ("identity",)))
    assert torch.equal(_sample(_guider(model, _step(), ("identity",))), plain)


def test_pictures_of_a_batch_do_not_meet(model):
    both = _sample(_guider(model, _step()), batch=2)
    alone = _sample(_guider(model, _step()), batch=1)
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "heun", "uni_pc"])
@pytest.mark.parametrize("masked", [False, True])
def test_samplers_and_inpaint_masks(model, sampler, masked, caplog):
    caplog.set_level("INFO")
    mask = (torch.arange(64).view(1, 1, 8, 8) % 2).float() if masked else None
    assert torch.isfinite(_sample(_guider(model, _step()), sampler, mask=mask)).all()
    told = sum("acts on the predictions alone" in r.message for r in caplog.records)
    assert told == (masked or sampler == "uni_pc")


def _shown(model, gradient_step, sampler):
    """The latents the sampler goes on with, step by step."""
    shown: list[torch.Tensor] = []
    _sample(
        _guider(model, gradient_step), sampler, steps=3, callback=lambda step, x0, x, total: shown.append(x.clone())
    )
    return shown


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m"])
def test_an_edit_stays_in_the_latent_the_sampler_goes_on_with_or_is_seen_by_the_prediction_alone(model, sampler):
    plain, auto, latent, prediction = (
        _shown(model, gradient_step, sampler)
        for gradient_step in (None, _step(), _step(in_place=True), _step(in_place=False))
    )
    assert all(map(torch.equal, auto, latent))
    assert not torch.allclose(latent[0], plain[0])
    assert torch.equal(prediction[0], plain[0])
    assert not torch.allclose(prediction[1], plain[1])
    assert not torch.allclose(prediction[1], latent[1])


@pytest.mark.parametrize(("sampler", "masked"), [("uni_pc", False), ("lcm", False), ("euler", True)])
def test_where_no_edit_stays_auto_is_the_prediction_alone(model, sampler, masked, caplog):
    caplog.set_level("INFO")
    mask = (torch.arange(64).view(1, 1, 8, 8) % 2).float() if masked else None
    auto, prediction = (
        _sample(_guider(model, _step(in_place=in_place)), sampler, 3, mask=mask) for in_place in (None, False)
    )
    assert torch.equal(auto, prediction)
    assert not torch.allclose(auto, _sample(_guider(model, None), sampler, 3, mask=mask))
    assert (
        sum("acts on the predictions alone" in r.message for r in caplog.records) == 1
    )  # of auto; the other was asked for


@pytest.mark.parametrize("in_place", [False, True])
def test_an_edit_of_the_prediction_does_not_ask_what_the_sampler_does_with_its_latent(model, in_place):
    """One that hands the model copies of it loses an edit of the latent, and no other."""

    def sampled(handed):
        def euler(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
            for high, low in pairwise(sigmas):
                x = x + (x - denoise(handed(x), high[None], **extra_args)) / high * (low - high)
            return x

        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
        guider = _guider(model, _step(in_place=in_place))
        sampler = comfy.samplers.KSAMPLER(euler)
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=3)

    assert torch.equal(sampled(torch.Tensor.clone), sampled(lambda x: x)) != in_place


def test_the_node_asks_for_the_edit_by_name():
    for edit, in_place in (("auto", None), ("latent", True), ("prediction", False)):
        options = ConceptsAnagramAntiSegregation.execute(0.05, 1, 0.0, 0.7, edit=edit).args[0]
        assert gradient_step_of(options.anti_segregation).in_place is in_place


def test_an_adaptive_sampler_is_refused(model):
    with pytest.raises(ValueError, match="dpm_adaptive"):
        _sample(_guider(model, _step()), "dpm_adaptive")


def test_a_prompt_without_a_phrase_is_refused(model):
    with pytest.raises(ValueError, match="Encode Concept Phrase"):
        _guider(model, _step(), words=None)


def test_a_control_net_of_inference_weights_goes_with_it(model, control_net):
    assert next(control_net.control_model.parameters()).is_inference()
    seen: list[torch.Tensor] = []
    guider = _guider(model, _step(seen=seen))
    for side in ("positive 0", "positive 1"):
        guider.original_conds[side][0]["control"] = control_net
    assert torch.isfinite(_sample(guider)).all()
    assert len(seen) == 6


@pytest.mark.parametrize("where", ["nothing", *FAULTS])
def test_the_model_is_as_it_was_whatever_happens(model, where, monkeypatch):
    before = remembered(model)
    fault = FAULTS[where]() if where in FAULTS else None
    guider = _guider(model, _step())
    if fault is None:
        _sample(guider)
    else:
        original = AntiSegregator._attention_map

        def failing(self, *args):
            original(self, *args)
            raise fault

        monkeypatch.setattr(AntiSegregator, "_attention_map", failing)
        with pytest.raises(type(fault)):
            _sample(guider)
        monkeypatch.undo()
    assert_as_remembered(model, before)
    assert guider.run is None
    assert torch.equal(_sample(_guider(model, None)), _sample(_guider(model, None)))


def test_a_phrase_is_found_in_its_prompt(demo_model):
    clip = demo_model[1]
    text = "on the left a cat and on the right a dog, blue background"
    for word, at in (("cat", 5), ("dog", 11), ("a cat", 4), ("blue background", 13)):
        found = first_occurrence(clip, text, word)
        assert found[0] == at, (word, found)
        assert len(found) == len(word.split())


def test_without_a_phrase_the_whole_prompt_is_the_concept(demo_model):
    ((_, values),) = encode_with_phrase(demo_model[1], "a cat", "")
    assert values[keys.PHRASE_POSITIONS] == (1, 2)


def test_a_phrase_that_is_not_there_is_refused(demo_model):
    with pytest.raises(ValueError, match="'lion' is not in the prompt 'a cat'"):
        encode_with_phrase(demo_model[1], "a cat", "lion")


def _maps_of(model, splits, monkeypatch, batch=2):
    """The maps a gradient step sees, and the rows of every model call it makes."""
    seen, rows = [], []
    gradient_step = GradientStep(
        lambda maps: (seen.append([m.detach().clone() for m in maps]), segregation(maps))[1],
        partial(descent, strength=0.05),
        0,
        1,
        1,
    )
    forward = model.model.diffusion_model.forward
    monkeypatch.setattr(
        model.model.diffusion_model, "forward", lambda x, *a, **k: (rows.append(len(x)), forward(x, *a, **k))[1]
    )
    if splits:
        monkeypatch.setattr(model.model, "memory_required", lambda *a, **k: 1e20)
    _sample(_guider(model, gradient_step), steps=2, batch=batch)
    return seen[0], rows


def test_the_gradient_step_is_one_call_of_all_views_and_one_a_view_where_the_host_splits(new_model, monkeypatch):
    together, rows = _maps_of(new_model("EPS"), False, monkeypatch)
    assert rows[:2] == [4, 8]  # two pictures in two views, then their prediction with the negatives
    apart, rows = _maps_of(new_model("EPS"), True, monkeypatch)
    assert set(rows) == {2}
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def _with_values(guider, index, *entries, seed=7):
    """The guider with other entries in the positive of that view: ``values`` of each, all of one text."""
    prompt = [[_cond(seed)[0][0], {keys.PHRASE_POSITIONS: (1, 2), **values}] for values in entries]
    guider.inner_set_conds({f"positive {index}": prompt})
    return guider


def test_the_entry_that_counts_at_the_moment_is_looked_at(model):
    """And where none does, nothing is pulled; the rest of the sampling is."""
    early, late = {"start_percent": 0.0, "end_percent": 0.3}, {"start_percent": 0.3, "end_percent": 1.0}
    seen: list[torch.Tensor] = []
    assert torch.isfinite(_sample(_with_values(_guider(model, _step(seen=seen)), 0, late, early))).all()
    assert len(seen) == 6
    seen.clear()
    assert torch.isfinite(_sample(_with_values(_guider(model, _step(seen=seen)), 0, late))).all()
    assert 0 < len(seen) < 6


def test_what_the_host_adds_to_a_prompt_is_not_looked_at(model):
    """To the positive it adds a copy of a negative with an area, which knows no phrase."""
    guider = _guider(model, _step())
    guider.original_conds["negative 0"][0]["area"] = (4, 8, 0, 0)
    assert torch.isfinite(_sample(guider)).all()


class _Watching(comfy.controlnet.ControlBase):
    """Stands in for a ControlNet; notes the latents it is shown and changes nothing."""

    def __init__(self):
        super().__init__()
        self.shown: list[torch.Tensor] = []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.shown.append(x_noisy.detach().clone())
        return {"middle": [], "input": [], "output": []}


def test_a_control_sees_its_view_upright_in_the_gradient_step(model):
    """There it is shown what it is shown in the prediction, but for the step in between."""
    control = _Watching()
    _sample(_with_values(_guider(model, _step(1e-6)), 1, {"control": control}), steps=1)
    pulled, predicted = (shown.flatten(1) for shown in control.shown[:2])
    assert torch.nn.functional.cosine_similarity(pulled, predicted).item() > 0.99


def _maps_with(model, *views, **values):
    """Each view's map at the first step, with these values in the last view's prompt, which is always of the same
    text."""
    seen = []
    gradient_step = GradientStep(
        lambda maps: (seen.append([m.detach().clone() for m in maps]), segregation(maps))[1],
        partial(descent, strength=0.05),
        0,
        1,
        1,
    )
    _sample(_with_values(_guider(model, gradient_step, views), len(views) - 1, values), steps=1)
    return seen[0]


def test_the_map_of_a_prompt_with_an_area_lies_where_the_area_lies(model):
    """The upper half of the turned picture is the lower of the canonical one."""
    whole = _maps_with(model, "identity", "rotate_180")
    first, bound = _maps_with(model, "identity", "rotate_180", area=(4, 8, 0, 0), strength=1.0)
    assert bound.shape == whole[1].shape
    assert not bound[:, :4].any()
    assert bound[:, 4:].all()
    torch.testing.assert_close(first, whole[0], rtol=1e-4, atol=1e-6)


def test_a_view_by_itself_gives_the_map_it_gives_among_the_others(model):
    """A mask asks for a call of its own, and changes nothing of where the words look."""
    names = ("rotate_180", "jigsaw", "flip")
    together, alone = _maps_with(model, *names), _maps_with(model, *names, mask=torch.ones(1, 8, 8))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_view_of_weight_0_is_not_pulled_and_needs_no_phrase(model):
    seen: list[torch.Tensor] = []

    def pulled(*views):
        guider = _guider(model, None, views)
        prompts = [replace(guider.prompts[i], weight=float(i < 2)) for i in range(len(views))]
        prompts[2:] = [replace(p, positive=_cond(5, words=None)) for p in prompts[2:]]
        combine = combiner(AVERAGING, [1.0, 1.0, 0.0][: len(views)])
        return _sample(ViewsGuider(model, prompts, combine, 5.0, _step(seen=seen)))

    two, three = pulled("identity", "rotate_180"), pulled("identity", "rotate_180", "flip")
    torch.testing.assert_close(three, two, rtol=1e-4, atol=1e-4)
    assert len(seen) == 12
