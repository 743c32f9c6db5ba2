"""What combining denoised pictures comes down to in the model's own terms, for every parameterisation of the host."""

from __future__ import annotations

from itertools import pairwise

import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.host.engine.sampling import percent_of
from comfyui_concepts.methods.anagram.combine import AVERAGING, Combination, combiner
from comfyui_concepts.methods.anagram.schedule import schedule_from
from comfyui_concepts.methods.anagram.views import view_named

KINDS = ["EPS", "V_PREDICTION", "FLOW"]
STEPS = 5


def _cond(seed):
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), {}]]


def _prompts(*names):
    return [ViewPrompt(view_named(n), _cond(i), _cond(99)) for i, n in enumerate(names)]


def _combine(weights, settings=AVERAGING, views=()):
    return combiner(settings, weights, views)


def _sigmas(model, steps=STEPS):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)


def _sample(guider, sigmas, sampler="euler", callback=None):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sampler = comfy.samplers.sampler_object(sampler)
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, callback=callback, disable_pbar=True, seed=3)


@pytest.mark.parametrize("name", ["identity", "rotate_180"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_picture_is_the_picture_of_the_mean_of_what_the_network_says(tiny_models, kind, name):
    """Noise, velocity and flow alike, at every level of the schedule."""
    said, pictures = [], []

    def note(executor, x, timesteps, context, *args, **kwargs):
        output = executor(x, timesteps, context, *args, **kwargs)
        said.append(
            [next(o for o, c in zip(output, context, strict=True) if torch.equal(c, _cond(i)[0][0][0])) for i in (0, 1)]
        )
        return output

    model = tiny_models[kind].clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", note)
    guider = ViewsGuider(model, _prompts("identity", name), _combine([3.0, 1.0]), 1.0)
    _sample(guider, sigmas := _sigmas(model), callback=lambda step, x0, x, total: pictures.append((x0, x.clone())))
    sampling, turn = model.get_model_object("model_sampling"), view_named(name).inverse
    assert len(said) == len(pictures) == STEPS
    for (first, second), (x0, x), sigma in zip(said, pictures, sigmas, strict=False):
        mean = 0.75 * first[None] + 0.25 * turn(second[None])
        torch.testing.assert_close(x0, sampling.calculate_denoised(sigma[None], mean, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("kind", KINDS)
def test_alternate_is_a_schedule_in_which_one_view_counts_at_a_time(tiny_models, kind, sampler):
    model, names = tiny_models[kind], ("identity", "flip", "rotate_180")
    sampling, sigmas = model.get_model_object("model_sampling"), _sigmas(model)
    moments = [percent_of(sampling, float(sigma)) for sigma in sigmas[:-1]]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(moments)), 1.0]
    alone = [", ".join(str(int(view == step % 3)) for view in range(3)) for step in range(STEPS)]
    lines = [f"{edge}: {alone[step]}" for step in range(STEPS) for edge in edges[step : step + 2]]

    def sampled(settings):
        return _sample(ViewsGuider(model, _prompts(*names), _combine([1.0] * 3, settings), 7.0), sigmas, sampler)

    turns = sampled(Combination("alternate"))
    assert torch.equal(turns, sampled(Combination(schedule_from("\n".join(lines)))))
    assert not torch.allclose(turns, sampled(AVERAGING))


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_of_alternate_is_a_step_of_the_view_whose_turn_it_is(tiny_models, kind):
    model = tiny_models[kind]
    seen = []

    def one_of(p):
        seen.append(p.step)
        turn = p.step % 2
        return p.positive[turn], p.negative[turn]

    prompts = _prompts("identity", "flip")
    turns = _combine([1.0, 1.0], Combination("alternate"))
    ours = _sample(ViewsGuider(model, prompts, turns, 7.0), _sigmas(model))
    assert torch.equal(ours, _sample(ViewsGuider(model, prompts, one_of, 7.0), _sigmas(model)))
    assert seen == list(range(STEPS))


@pytest.mark.parametrize(
    "names",
    [
        ("low_pass", "high_pass"),
        ("triple_low", "triple_medium", "triple_high"),
        ("motion", "motion_residual"),
        ("scale", "scale"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("kind", KINDS)
def test_components_of_one_prompt_are_plain_sampling(tiny_models, kind, names):
    model, views = tiny_models[kind], [view_named(n) for n in names]
    prompts = [ViewPrompt(view, _cond(0), _cond(99)) for view in views]
    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(_cond(0), _cond(99))
    plain.set_cfg(7.0)
    ours = ViewsGuider(model, prompts, _combine([2.0] * len(views), views=views), 7.0)
    torch.testing.assert_close(_sample(ours, _sigmas(model)), _sample(plain, _sigmas(model)), rtol=1e-4, atol=1e-5)
