"""Edits fall on the latents that a sampler goes on with, once at each level of its schedule, whatever the sampler."""

from __future__ import annotations

from itertools import pairwise

import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.engine.latent_edits import EditSchedule, edit_schedule_for
from comfyui_concepts.host.engine.rehearsal import Level
from comfyui_concepts.host.engine.time_travel import travelling_sampler

STEPS = 5
ALL = [name for name in comfy.samplers.SAMPLER_NAMES if name != "dpm_adaptive"]
PREDICTIONS = ("uni_pc", "uni_pc_bh2", "lcm", "sa_solver")
FIRST_NOISE = ("ipndm", "ipndm_v", "deis")  # their callbacks are handed the first noise at every step


class Editing(comfy.samplers.CFGGuider):
    """Notes the latents at which an edit is due."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        if self.once.is_due(timestep):
            self.edited.append((float(timestep.max()), x))
        return super().predict_noise(x, timestep, model_options or {}, seed)


def _sampled(model, name, mask=None, sampler=None):
    text = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), {}]]
    guider = Editing(model)
    guider.set_conds(text, text)
    guider.set_cfg(1.0)
    sampler, shown = sampler or comfy.samplers.sampler_object(name), []
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    levels = [float(s) for s in sigmas if s > 0]  # uni_pc writes into them
    guider.edited, guider.once = (
        [],
        edit_schedule_for(sampler, sigmas, mask, model.get_model_object("model_sampling"), "This test"),
    )
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    guider.sample(
        noise,
        torch.zeros_like(noise),
        sampler,
        sigmas,
        mask,
        lambda i, x0, x, n: shown.append(x),
        disable_pbar=True,
        seed=3,
    )
    return guider, levels, shown


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
@pytest.mark.parametrize("name", ALL)
def test_each_level_of_the_schedule_is_due_once_at_the_latent_that_lasts(tiny_models, kind, name):
    if kind == "FLOW" and name in ("dpm_fast", "ddpm"):
        pytest.skip("not for flow models")
    guider, levels, shown = _sampled(tiny_models[kind], name)
    if name != "dpm_fast":  # it makes levels of its own
        assert [level for level, _ in guider.edited] == pytest.approx(levels, rel=2e-3)
    assert guider.once.in_place == (name not in PREDICTIONS)
    if guider.once.in_place and name not in FIRST_NOISE and name != "sa_solver_pece":
        assert all(x is theirs for (_, x), theirs in zip(guider.edited, shown, strict=True))


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_what_is_written_into_that_latent_is_in_the_picture(tiny_models, name):
    plain, _, _ = _sampled(tiny_models["EPS"], name)
    assert all(x.std() > 0 for _, x in plain.edited)
    once = EditSchedule([Level(2.0, 0), Level(1.0, 0)], in_place=True)
    x = torch.zeros(1, 4, 8, 8)
    assert once.apply(x, x + 1) is x
    assert float(x.mean()) == 1
    assert EditSchedule().apply(x, moved := x + 1) is moved


def test_lost_edits_are_told_once(tiny_models, caplog):
    caplog.set_level("INFO")
    mask = torch.ones(1, 1, 8, 8)
    for name, mask_of, messages in (("euler", None, 0), ("heun", mask, 1), ("lcm", None, 1), ("sa_solver", None, 1)):
        caplog.clear()
        _sampled(tiny_models["EPS"], name, mask_of)
        assert sum("acts on the predictions alone" in r.message for r in caplog.records) == messages


TWICE = [
    ("dpmpp_sde", {"r": 1.0}),
    ("dpmpp_sde_gpu", {"r": 1.0, "eta": 0.0}),
    ("seeds_2", {"r": 1.0}),
    ("seeds_3", {"r_1": 0.5, "r_2": 1.0}),
]
"""Samplers whose options have them ask at the next level of the schedule and throw that latent away."""


@pytest.mark.parametrize("travels", [False, True])
@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
@pytest.mark.parametrize(("name", "options"), TWICE)
def test_options_by_which_a_sampler_asks_twice_at_a_level_move_no_edit(tiny_models, kind, name, options, travels):
    sampler = comfy.samplers.ksampler(name, options)
    sampler = travelling_sampler(sampler, 0.2, 0.8, 2) if travels else sampler
    guider, levels, shown = _sampled(tiny_models[kind], name, sampler=sampler)
    assert [level for level, _ in guider.edited] == pytest.approx(levels, rel=2e-3)
    assert all(any(x is theirs for theirs in shown) for _, x in guider.edited)
    assert guider.once.in_place


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_with_churn_an_edit_is_due_above_each_level_where_the_sampler_goes_on(tiny_models, name):
    sampler = comfy.samplers.ksampler(name, {"s_churn": 2.0})
    guider, levels, shown = _sampled(tiny_models["EPS"], name, sampler=sampler)
    assert len(guider.edited) == len(levels) == len(shown)
    assert all(level > 1.01 * asked for (level, _), asked in zip(guider.edited, levels, strict=True))


def _by_nobody(model, x, sigmas, extra_args=None, callback=None, disable=None, ahead=True, tells=True):
    """A second-order sampler of predictions, that may tell of its steps."""
    for number, (high, low) in enumerate(pairwise(sigmas)):
        denoised = model(x, high * x.new_ones(len(x)), **extra_args)
        _by_nobody.asked.append(x)
        if tells:
            callback({"x": x, "i": number, "sigma": high, "sigma_hat": high, "denoised": denoised})
        if ahead and low > 0:
            there = denoised + (x - denoised) * low / high
            denoised = (denoised + model(there, low * x.new_ones(len(x)), **extra_args)) / 2
        x = denoised + (x - denoised) * low / high
    return x


@pytest.mark.parametrize("options", [{}, {"ahead": False}, {"tells": False}, {"ahead": False, "tells": False}], ids=str)
def test_a_sampler_that_no_table_knows_is_read_by_what_it_does(tiny_models, options):
    _by_nobody.asked = []
    guider, levels, _ = _sampled(tiny_models["EPS"], "nobody", sampler=comfy.samplers.KSAMPLER(_by_nobody, options))
    assert [level for level, _ in guider.edited] == pytest.approx(levels)
    assert all(any(x is theirs for theirs in _by_nobody.asked) for _, x in guider.edited)
    assert guider.once.in_place


def test_a_sampler_that_cannot_be_rehearsed_is_edited_at_the_first_evaluation_of_each_level(tiny_models, caplog):
    def asks_for_more(model, x, sigmas, **args):
        assert model.inner_model.inner_model.diffusion_model is not None
        return _by_nobody(model, x, sigmas, ahead=False, **args)

    caplog.set_level("INFO")
    guider, levels, _ = _sampled(tiny_models["EPS"], "nobody", sampler=comfy.samplers.KSAMPLER(asks_for_more))
    assert [level for level, _ in guider.edited] == pytest.approx(levels)
    assert "cannot be rehearsed" in caplog.text


def test_a_rehearsal_draws_no_noise_of_the_run():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for name in ("euler", "dpmpp_sde", "lcm"):
        sampler = comfy.samplers.ksampler(name, {"s_churn": 5.0} if name == "euler" else {})
        edit_schedule_for(sampler, sigmas := torch.tensor([4.0, 2.0, 0.0]), None, None, "This test")
        assert sigmas.tolist() == [4.0, 2.0, 0.0]
    assert torch.equal(torch.get_rng_state(), before)


WHOLE = ("heunpp2", "uni_pc", "uni_pc_bh2")  # not step by step, and refused


@pytest.mark.parametrize(
    ("kind", "name"),
    [("EPS", name) for name in ALL if name not in WHOLE]
    + [("FLOW", name) for name in ("heun", "dpm_2_ancestral", "dpmpp_2s_ancestral", "sa_solver_pece")],
)
def test_within_time_travel_each_level_is_due_once_at_a_latent_that_lasts(tiny_models, kind, name):
    """A second-order sampler asks at the next level on each of its passes, before it gets there. sa_solver begins again
    at each step of the window, with the latent that it is given."""
    travel = travelling_sampler(comfy.samplers.sampler_object(name), 0.2, 0.8, 3)
    guider, levels, shown = _sampled(tiny_models[kind], name, sampler=travel)
    assert len(shown) > STEPS or name == "sa_solver_pece"
    if name != "dpm_fast":
        assert [level for level, _ in guider.edited] == pytest.approx(levels, rel=2e-3)
    assert guider.once.in_place == (name not in PREDICTIONS or name == "sa_solver")
    if guider.once.in_place and name not in FIRST_NOISE and name != "sa_solver_pece":
        assert all(any(x is theirs for theirs in shown) for _, x in guider.edited)


def test_a_sampler_that_is_refused_is_refused_within_time_travel(tiny_models):
    travel = travelling_sampler(comfy.samplers.ksampler("dpm_adaptive"), 0.2, 0.8, 2)
    with pytest.raises(ValueError, match=r"cannot work with dpm_adaptive"):
        _sampled(tiny_models["EPS"], "dpm_adaptive", sampler=travel)
