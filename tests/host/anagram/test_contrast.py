"""Contrast: the negative of each view holds the others' prompts, in the proportion that was asked."""

from __future__ import annotations

from dataclasses import replace

import comfy.controlnet
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.anagram.contrast import contrasted_prompts
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.request import anagram_request
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.methods.anagram.combine import AVERAGING, Combination, combiner
from comfyui_concepts.methods.anagram.prediction import Predictions
from comfyui_concepts.methods.anagram.views import view_named
from comfyui_concepts.nodes.anagram.views import AnagramView


def _cond(seed, **values):
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), values]]


def _prompts(*names, **values):
    return [ViewPrompt(view_named(n), _cond(i, **values), _cond(99)) for i, n in enumerate(names)]


def _predicted(model, prompts, cfg=5.0):
    """What the combiner is told at the first step."""
    seen: list[Predictions] = []
    combine = combiner(AVERAGING, [1.0] * len(prompts))

    def watch(p):
        seen.append(p)
        return combine(p)

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    guider = ViewsGuider(model, prompts, watch, cfg)
    out = guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=3
    )
    return seen[0], out


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
def test_each_negative_is_the_mean_of_its_own_and_the_others_in_that_view(tiny_models, kind):
    names = ("identity", "rotate_180", "flip")
    plain, _ = _predicted(tiny_models[kind], _prompts(*names))
    ours, _ = _predicted(tiny_models[kind], contrasted_prompts(_prompts(*names), 0.5))
    crossed = [
        _predicted(tiny_models[kind], [ViewPrompt(view_named(n), _cond(j), _cond(99)) for n in names])[0]
        for j in range(3)
    ]
    for i in range(3):
        torch.testing.assert_close(ours.positive[i], plain.positive[i], rtol=1e-4, atol=1e-4)
        others = sum(crossed[j].positive[i] for j in range(3) if j != i)
        torch.testing.assert_close(ours.negative[i], (plain.negative[i] + 0.5 * others) / 2, rtol=1e-4, atol=1e-4)


def test_strength_0_and_one_view_are_as_they_were(tiny_models):
    two, one = _prompts("identity", "flip"), _prompts("identity")
    assert contrasted_prompts(two, 0.0) == two
    assert contrasted_prompts(one, 0.5) == one
    plain, contrast = (_predicted(tiny_models["EPS"], p, cfg=1.0)[1] for p in (two, contrasted_prompts(two, 0.5)))
    assert torch.equal(plain, contrast)  # at cfg 1 no negative is asked


class _Control(comfy.controlnet.ControlBase):
    """Stands in for a ControlNet: adds one half to the middle of the network."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        return {"middle": [torch.full((1, 64, 4, 4), 0.5)], "input": [], "output": []}


def _half(upper: bool) -> torch.Tensor:
    return ((torch.arange(64).view(1, 8, 8) < 32) == upper).float()


def test_what_is_drawn_for_another_view_stays_there():
    bound = {"mask": _half(True), "mask_strength": 0.5, "area": (4, 8, 0, 0), "control": _Control()}
    second = ViewPrompt(view_named("flip"), _cond(1, pooled_output=torch.ones(1, 4), **bound), _cond(99))
    values = contrasted_prompts([*_prompts("identity"), second], 0.5)[0].negative[1][1]
    assert not {*bound} & {*values}
    assert values["strength"] == 0.5
    assert torch.equal(values["pooled_output"], torch.ones(1, 4))


def test_the_others_are_asked_under_what_is_drawn_for_this_view():
    """Or guidance away from them would be guidance towards its control."""
    control = _Control()
    own = [*_cond(0, mask=_half(True), mask_strength=0.5, control=control, strength=2.0), *_cond(5, mask=_half(False))]
    prompts = [ViewPrompt(view_named("identity"), own, _cond(99)), *_prompts("flip")]
    plain, upper, lower = (values for _, values in contrasted_prompts(prompts, 0.5)[0].negative)
    assert not plain
    assert upper.pop("control") is control
    assert torch.equal(upper.pop("mask"), _half(True))
    assert torch.equal(lower.pop("mask"), _half(False))
    assert upper == lower == {"strength": 0.5}


def test_what_stands_beside_the_words_is_this_views_own():
    """The picture of an inpainting model, reference latents, sizes: the others' words are read where this view is."""
    pictures = [torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)]
    beside = [{"concat_latent_image": p, "reference_latents": [p], "of a later host": p} for p in pictures]
    prompts = [
        ViewPrompt(view_named(n), _cond(i, pooled_output=torch.full((1, 4), i), end_percent=0.5, **b), _cond(99, **b))
        for i, (n, b) in enumerate(zip(("identity", "flip"), beside, strict=True))
    ]
    values = contrasted_prompts(prompts, 0.5)[0].negative[1][1]
    assert all(values[key] is value for key, value in beside[0].items())
    assert torch.equal(values["pooled_output"], torch.ones(1, 4))
    assert values["end_percent"] == 0.5


def test_a_prompt_of_several_entries_for_the_whole_canvas_counts_once():
    own = [*_cond(0, control=_Control()), *_cond(5), *_cond(6), *_cond(7, mask=_half(True))]
    prompts = [ViewPrompt(view_named("identity"), own, _cond(99)), *_prompts("flip")]
    away = [values for _, values in contrasted_prompts(prompts, 0.5)[0].negative][1:]
    assert sum(values["strength"] for values in away) == 0.5
    assert ["control" in values for values in away] == [True, False]
    assert not any("mask" in values for values in away)


@pytest.mark.parametrize("also_negative", [False, True])
def test_a_control_of_a_view_is_not_amplified(tiny_models, also_negative):
    """Where the other reads the same, contrast changes nothing of a view whose control acts on both sides."""
    values = {"control": _Control(), "control_apply_to_uncond": also_negative}
    negative = _cond(99) if also_negative else _cond(99, control=values["control"])
    first = ViewPrompt(view_named("identity"), _cond(0, **values), negative)
    second = ViewPrompt(view_named("identity"), _cond(99), _cond(99))  # it shows what the first's negative says
    plain, _ = _predicted(tiny_models["EPS"], [first, second])
    ours, _ = _predicted(tiny_models["EPS"], contrasted_prompts([first, second], 0.5))
    torch.testing.assert_close(ours.positive[0], plain.positive[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.negative[0], plain.negative[0], rtol=1e-4, atol=1e-4)


def test_components_are_left_alone():
    prompts = _prompts("low_pass", "high_pass")
    assert contrasted_prompts(prompts, 0.5) == prompts


def test_a_view_of_weight_0_has_no_say():
    """It is shown and counts for nothing, so the others are not led away from it either."""
    prompts = _prompts("identity", "rotate_180", "flip")
    silent = [*prompts[:2], replace(prompts[2], weight=0.0)]
    out = contrasted_prompts(silent, 0.5)
    assert out[:2] == contrasted_prompts(prompts[:2], 0.5)
    assert out[2] is silent[2]
    listed = None
    for prompt, weight in zip(prompts, (1.0, 0.5, 0.0), strict=True):
        listed = AnagramView(lambda cell, view=prompt.view: view, prompt.positive, None, weight, listed)
    made = anagram_request(listed.prompts(_cond(99)), Combination(contrast=0.5)).prompts
    assert [p.has_weight for p in made] == [True, True, False]
    assert [len(p.negative) for p in made] == [2, 2, 1]
