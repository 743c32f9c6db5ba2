"""T2I-Zero in a real model: marks on the conditioning, the patch in any sampler, other packs' patches (A18, A25, A26)."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.attention import CROSS, around_attention, find_sites, unet_of
from comfyui_concepts.host.phrases import OBJECTS, encode_with_objects
from comfyui_concepts.host.suppression import with_suppression
from comfyui_concepts.methods.compose.similarity import Words

WORDS = Words(((1,), (3, 4)), ((1, 6),))


def _sample(model, positive, *, steps=2, sampler="euler", batch=1, cfg=3.0, width=24):
    """A short run on a canvas that is not square."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(batch, 4, 16, width, generator=generator)
    guider = comfy.samplers.CFGGuider(model)
    negative = [[torch.randn(1, 7, 32, generator=generator), {OBJECTS: WORDS}]]
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=1
    )


@pytest.fixture
def positive():
    context = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(9))
    return [[context, {OBJECTS: WORDS}]]


@pytest.fixture
def model(new_model):
    return new_model("EPS")


def test_a_prompt_knows_its_objects_and_its_words(demo_model):
    _, clip, _ = demo_model
    (entry,) = encode_with_objects(clip, "a red cat and a dog", ["red cat", "dog"])
    assert entry[1][OBJECTS] == Words(((2, 3), (6,)), ((1, 7),))
    long = " ".join(["many"] * 80) + " a cat and a dog"
    (entry,) = encode_with_objects(clip, long, ["cat", "dog"])
    assert entry[1][OBJECTS].sections[0] == (1, 76)
    assert all(p > 77 for tokens in entry[1][OBJECTS].objects for p in tokens)


@pytest.mark.parametrize(
    ("phrases", "sentence"),
    [([], "No object is named"), (["cat", "red cat"], "share a word"), (["fox"], "does not stand")],
)
def test_objects_that_cannot_be_told_apart_are_refused(demo_model, phrases, sentence):
    with pytest.raises(ValueError, match=sentence):
        encode_with_objects(demo_model[1], "a red cat and a dog", phrases)


def test_without_strength_or_marks_the_model_is_the_plain_one(model, positive):
    plain = _sample(model, positive)
    assert torch.equal(_sample(with_suppression(model, 0.0, 0, 1), positive), plain)
    unmarked = [[positive[0][0], {}]]
    assert torch.equal(_sample(with_suppression(model, 1.0, 0, 1), unmarked), plain)


def test_only_the_positive_moves_and_only_in_the_window(model, positive, monkeypatch):
    from comfyui_concepts.host import suppression as module

    seen = []
    original = module.Suppressor._change

    def spy(self, q, k, v, words, extra):
        seen.append((q.shape[0], float(extra["sigmas"].max()), list(extra["cond_or_uncond"])))
        return original(self, q, k, v, words, extra)

    monkeypatch.setattr(module.Suppressor, "_change", spy)
    plain = _sample(model, positive, steps=4, batch=2)
    seen.clear()
    moved = _sample(with_suppression(model, 1.0, 0.0, 0.5), positive, steps=4, batch=2)
    assert not torch.equal(moved, plain)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    middle = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    assert {round(s, 3) for _, s, _ in seen} == {round(float(s), 3) for s in sigmas[:-1] if s >= middle}
    assert {rows for rows, _, _ in seen} == {2}  # the two pictures' positive rows, never the negative's
    assert all(len(both) == 2 for _, _, both in seen)


@pytest.mark.parametrize("sampler", ["dpmpp_2s_ancestral", "uni_pc"])
def test_a_batch_is_its_pictures_and_any_sampler_does(model, positive, sampler):
    patched = with_suppression(model, 1.0, 0.0, 1.0)
    assert torch.isfinite(_sample(patched, positive, sampler=sampler, steps=3)).all()
    assert torch.isfinite(_sample(patched, positive, sampler=sampler, cfg=1.0)).all()


def test_another_packs_patch_in_the_same_slot_goes_on(model, positive):
    """A foreign attn2 replacement answers as before; the suppression is added to its answer."""
    other, calls = model.clone(), []

    def foreign(q, k, v, extra):
        calls.append(extra["block"])
        heads = (t.unflatten(-1, (extra["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
        return 0.5 * torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)

    block = find_sites(unet_of(other.model), CROSS)[0].block
    other.set_model_attn2_replace(foreign, *block)
    alone = _sample(other, positive)
    assert not torch.equal(alone, _sample(model, positive))
    count = len(calls)
    both = _sample(with_suppression(other, 1.0, 0.0, 1.0), positive)
    assert len(calls) == 2 * count > 0
    assert not torch.equal(both, alone)


def test_answering_with_the_attention_itself_is_the_plain_model(model):
    unet = unet_of(model.model)
    options = around_attention({}, unet, find_sites(unet), lambda q, k, v, site, extra, attend: attend(q, k, v))
    x = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(2))
    context = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
    call = [model.model.apply_model(x, torch.full((2,), 2.0), c_crossattn=context, transformer_options=o)
            for o in ({}, options["transformer_options"])]  # fmt: skip
    assert torch.equal(*call)
