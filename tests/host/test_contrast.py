"""Contrast: the negative of each view holds the others' prompts, in the proportion that was asked."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.contrast import contrasted
from comfyui_concepts.host.guider import ViewPrompt, ViewsGuider
from comfyui_concepts.methods.anagram.combine import AVERAGING, combiner
from comfyui_concepts.methods.anagram.prediction import Predictions
from comfyui_concepts.methods.anagram.views import view_named


def _cond(seed, **values):
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), values]]


def _prompts(*names, **values):
    return [ViewPrompt(view_named(n), _cond(i, **values), _cond(99)) for i, n in enumerate(names)]


def _predicted(model, prompts, cfg=5.0):
    """What the combiner is told at the first step."""
    seen: list[Predictions] = []
    combine = combiner(AVERAGING, [1.0] * len(prompts))

    def watch(**known):
        seen.append(Predictions(**known))
        return combine(seen[-1])

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
    ours, _ = _predicted(tiny_models[kind], contrasted(_prompts(*names), 0.5))
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
    assert contrasted(two, 0.0) == two
    assert contrasted(one, 0.5) == one
    plain, contrast = (_predicted(tiny_models["EPS"], p, cfg=1.0)[1] for p in (two, contrasted(two, 0.5)))
    assert torch.equal(plain, contrast)  # at cfg 1 no negative is asked


def test_what_is_drawn_for_another_view_stays_there():
    prompts = _prompts("identity", "flip", mask=torch.ones(1, 8, 8), pooled_output=torch.ones(1, 4))
    values = contrasted(prompts, 0.5)[0].negative[1][1]
    assert "mask" not in values
    assert values["strength"] == 0.5
    assert torch.equal(values["pooled_output"], torch.ones(1, 4))


def test_components_are_left_alone():
    prompts = _prompts("low_pass", "high_pass")
    assert contrasted(prompts, 0.5) == prompts
