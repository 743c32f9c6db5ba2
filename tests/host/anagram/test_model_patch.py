"""Anagrams through the stock KSampler, time travel, and given components, next to the real host."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import comfy.controlnet
import comfy.k_diffusion.sampling
import comfy.nested_tensor
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.anagram.contrast import contrasted_prompts
from comfyui_concepts.host.anagram.guidance import check_view
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.model_patch import with_views
from comfyui_concepts.host.anagram.views import ViewPrompt, own_controls
from comfyui_concepts.host.engine import time_travel
from comfyui_concepts.host.engine.time_travel import renoised_latent, travelling_sampler
from comfyui_concepts.methods.anagram.combine import AVERAGING, MULTI_TASK_FAST, combiner
from comfyui_concepts.methods.anagram.overlap import GradientStep, descent, segregation
from comfyui_concepts.methods.anagram.views import view_named
from comfyui_concepts.nodes.anagram.views import AnagramView

SAMPLERS = ["euler", "dpmpp_2m", "dpmpp_sde", "uni_pc", "euler_cfg_pp", "ddim"]


def _cond(seed: int, tokens: int = 7) -> list:
    return [[torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(seed)), {}]]


def _combine(names, settings=AVERAGING, cfgs=()):
    views = [view_named(n) for n in names]
    return combiner(settings, [1.0] * len(names), views, cfgs)


def _prompts(*names):
    return [ViewPrompt(view_named(n), _cond(i), _cond(99)) for i, n in enumerate(names)]


def _noise(batch=1, size=(8, 8)):
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(1))


def _ksampler(model, positive, negative, sampler="euler", cfg=7.0, denoise=1.0, batch=1, mask=None, size=(8, 8)):
    noise = _noise(batch, size)
    latent = torch.zeros_like(noise) if denoise == 1.0 else torch.full_like(noise, 0.3)
    return comfy.sample.sample(
        model,
        noise,
        5,
        cfg,
        sampler,
        "normal",
        positive,
        negative,
        latent,
        denoise=denoise,
        noise_mask=mask,
        disable_pbar=True,
        seed=3,
    )


def _guided(model, prompts, combine, sampler="euler", cfg=7.0, gradient_step=None):
    noise = _noise()
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 5)
    return ViewsGuider(model, prompts, combine, cfg, gradient_step).sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=3
    )


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_identity_view_is_the_plain_ksampler_bit_for_bit(tiny_models, sampler, kind):
    model = tiny_models[kind]
    ours = _ksampler(*with_views(model, _prompts("identity"), _combine(["identity"])), sampler)
    assert torch.equal(ours, _ksampler(model, _cond(0), _cond(99), sampler))


@pytest.mark.parametrize(
    "settings",
    [
        {"cfg": 1.0},
        {"batch": 2},
        {"denoise": 0.5},
        {"mask": torch.arange(64).view(1, 1, 8, 8) % 2.0},
        {"size": (8, 12)},
    ],
    ids=str,
)
def test_one_identity_view_is_the_plain_ksampler_in_every_use(tiny_models, settings):
    model = tiny_models["EPS"]
    ours = _ksampler(*with_views(model, _prompts("identity"), _combine(["identity"])), **settings)
    assert torch.equal(ours, _ksampler(model, _cond(0), _cond(99), **settings))


@pytest.mark.parametrize("settings", [AVERAGING, MULTI_TASK_FAST], ids=["averaging", "multi-task"])
def test_the_ksampler_samples_what_the_guider_samples(tiny_models, settings):
    names = ["identity", "flip", "rotate_cw"]
    model, combine = tiny_models["V_PREDICTION"], _combine(["identity", "flip", "rotate_cw"], settings)
    ours = _ksampler(*with_views(model, _prompts(*names), combine))
    torch.testing.assert_close(ours, _guided(model, _prompts(*names), combine), rtol=1e-5, atol=1e-5)


def test_a_patch_that_asks_the_model_again_is_answered_by_all_views(tiny_models):
    """However many entries a view's prompt has."""
    gaps: list[float] = []

    def again(args):
        (asked,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
        )
        gaps.append((asked - args["cond_denoised"]).abs().max().item())
        return args["denoised"]

    model = tiny_models["EPS"].clone()
    model.set_model_sampler_post_cfg_function(again)
    prompts = [*_prompts("identity"), ViewPrompt(view_named("flip"), [*_cond(1), *_cond(2)], _cond(99))]
    _ksampler(*with_views(model, prompts, _combine(["identity", "flip"])))
    assert len(gaps) == 5
    assert max(gaps) < 1e-3


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_the_ksampler_takes_the_gradient_step_of_the_guider(new_model, sampler):
    model, gradient_step = new_model("EPS"), GradientStep(segregation, partial(descent, strength=0.05), 0.0, 1.0, 1)
    prompts = [
        ViewPrompt(p.view, [[c, {keys.PHRASE_POSITIONS: (1, 2)}] for c, _ in p.positive], p.negative)
        for p in _prompts("identity", "flip")
    ]
    combine = _combine(["identity", "flip"])
    patched, positive, negative = with_views(model, prompts, combine, gradient_step)
    first, again = (_ksampler(patched, positive, negative, sampler) for _ in range(2))
    assert torch.equal(first, _guided(model, prompts, combine, sampler, gradient_step=gradient_step))
    assert torch.equal(first, again)
    assert not torch.allclose(first, _guided(model, prompts, combine, sampler))


def test_the_ksampler_refuses_a_gradient_step_without_phrases_and_with_an_adaptive_sampler(new_model):
    model, gradient_step = new_model("EPS"), GradientStep(segregation, partial(descent, strength=0.05), 0.0, 1.0, 1)
    combine = _combine(["identity", "flip"])
    with pytest.raises(ValueError, match="Encode Concept Phrase"):
        with_views(model, _prompts("identity", "flip"), combine, gradient_step)
    prompts = [
        ViewPrompt(p.view, [[c, {keys.PHRASE_POSITIONS: (1, 2)}] for c, _ in p.positive], p.negative)
        for p in _prompts("identity", "flip")
    ]
    with pytest.raises(ValueError, match="dpm_adaptive"):
        _ksampler(*with_views(model, prompts, combine, gradient_step), "dpm_adaptive")


def _deep(value):
    """All of a nested dict, lists copied, its leaves by identity."""
    if isinstance(value, dict):
        return {key: _deep(inner) for key, inner in value.items()}
    return list(map(id, value)) if isinstance(value, list) else id(value)


def test_the_patched_model_leaves_the_given_one_as_it_was(tiny_models):
    model = tiny_models["EPS"].clone()
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    model.add_wrapper_with_key("predict_noise", "test", lambda executor, *args: executor(*args))
    before = _ksampler(model, _cond(0), _cond(99)), _deep(model.wrappers), _deep(model.model_options)
    _ksampler(*with_views(model, _prompts("identity", "flip"), _combine(["identity", "flip"])))
    assert (_deep(model.wrappers), _deep(model.model_options)) == before[1:]
    assert torch.equal(_ksampler(model, _cond(0), _cond(99)), before[0])


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde"])
def test_the_ksampler_makes_the_same_picture_twice_of_a_sampler_that_draws_noise(tiny_models, sampler):
    patched = with_views(tiny_models["EPS"], _prompts("identity", "flip"), _combine(["identity", "flip"]))
    assert torch.equal(_ksampler(*patched, sampler), _ksampler(*patched, sampler))


def test_the_ksampler_must_get_the_prompts_that_come_with_the_model(tiny_models):
    model, positive, negative = with_views(
        tiny_models["EPS"], _prompts("identity", "flip"), _combine(["identity", "flip"])
    )
    with pytest.raises(ValueError, match="positive holds no prompt for view 1"):
        _ksampler(model, _cond(0), negative)
    with pytest.raises(ValueError, match="negative holds no prompt for view 1"):
        _ksampler(model, positive, _cond(99))


def test_a_prompt_bound_to_an_area_is_refused_with_a_way_out(tiny_models):
    bound = [[_cond(0)[0][0], {"area": (4, 4, 0, 0)}]]
    with pytest.raises(ValueError, match="use Anagram Guider"):
        with_views(tiny_models["EPS"], [ViewPrompt(view_named("flip"), bound, _cond(99))], _combine(["flip"]))


class _Control(comfy.controlnet.ControlBase):
    """Stands in for a ControlNet: adds one half to the middle of the network."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        return {"middle": [torch.full((1, 64, 4, 4), 0.5)], "input": [], "output": []}


def _controlled(seed, *, also_negative):
    return [[_cond(seed)[0][0], {"control": _Control(), "control_apply_to_uncond": also_negative}]]


@pytest.mark.parametrize("also_negative", [False, True])
def test_a_control_acts_in_its_own_view_alone(tiny_models, also_negative):
    """With the older Apply ControlNet also on the negative, which is that view's, as in the plain KSampler."""
    model, positive = tiny_models["EPS"], _controlled(0, also_negative=also_negative)
    single = [ViewPrompt(view_named("identity"), positive, _cond(99))]
    assert torch.equal(
        _ksampler(*with_views(model, single, _combine(["identity"]))), _ksampler(model, positive, _cond(99))
    )
    prompts = [*_prompts("identity"), ViewPrompt(view_named("flip"), positive, _cond(98))]
    combine = _combine(["identity", "flip"])
    ours = _ksampler(*with_views(model, prompts, combine))
    torch.testing.assert_close(ours, _guided(model, prompts, combine), rtol=1e-4, atol=1e-4)
    assert positive[0][1]["control_apply_to_uncond"] == also_negative  # the given conditioning is as it was


def test_controls_are_copied_to_the_negative_as_the_host_copies_them():
    first, second = _controlled(0, also_negative=True), _controlled(1, also_negative=True)
    one = own_controls(ViewPrompt(view_named("flip"), [*first, *second, *_cond(2)], [*_cond(8), *_cond(9)]))
    assert [values["control"] for _, values in one.negative] == [p[0][1]["control"] for p in (first, second)]
    assert not any(values.get("control_apply_to_uncond") for _, values in one.positive)
    settled = ViewPrompt(view_named("flip"), first, [*_controlled(3, also_negative=False), *_cond(9)])
    assert own_controls(settled).negative == settled.negative
    plain = ViewPrompt(view_named("flip"), _cond(1), _cond(9))
    assert own_controls(plain) is plain


def test_a_view_the_canvas_cannot_take_is_refused(tiny_models):
    with pytest.raises(ValueError, match="square"):
        _ksampler(*with_views(tiny_models["EPS"], _prompts("rotate_cw"), _combine(["rotate_cw"])), size=(8, 12))


def test_a_view_the_canvas_cannot_take_is_refused_before_a_reference_of_another_size(tiny_models):
    prompts = [replace(_prompts("rotate_cw")[0], reference_latent=torch.zeros(1, 4, 16, 16))]
    with pytest.raises(ValueError, match="square"):
        _ksampler(*with_views(tiny_models["EPS"], prompts, _combine(["rotate_cw"])), size=(8, 12))


def test_two_equal_components_are_plain_sampling(tiny_models):
    names = ["low_pass", "high_pass"]
    prompts = [ViewPrompt(view_named(n), _cond(0), _cond(99)) for n in names]
    plain = _guided(tiny_models["EPS"], _prompts("identity"), _combine(["identity"]))
    torch.testing.assert_close(_guided(tiny_models["EPS"], prompts, _combine(names)), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_a_given_component_is_in_the_result(tiny_models, kind):
    """And the model is asked for the other one alone."""
    model, given = tiny_models[kind], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    low, high = view_named("low_pass"), view_named("high_pass")
    prompts = [ViewPrompt(low, _cond(99), _cond(99), reference_latent=given), ViewPrompt(high, _cond(1), _cond(99))]
    result = _guided(model, prompts, _combine(["low_pass", "high_pass"]))
    # a blur is no projection, so a little of the prompt's part is seen in it as well; what is left of it is not the
    # given
    known = result - _guided(
        model,
        [ViewPrompt(low, _cond(99), _cond(99), reference_latent=0 * given), prompts[1]],
        _combine(["low_pass", "high_pass"]),
    )
    assert torch.nn.functional.cosine_similarity(known.flatten(), low.component(given).flatten(), dim=0) > 0.9


def test_a_reference_of_another_size_is_refused(tiny_models):
    prompts = [
        ViewPrompt(view_named("low_pass"), _cond(9), _cond(99), reference_latent=torch.zeros(1, 4, 16, 16)),
        ViewPrompt(view_named("high_pass"), _cond(1), _cond(99)),
    ]
    with pytest.raises(ValueError, match="scale the reference picture"):
        _guided(tiny_models["EPS"], prompts, _combine(["low_pass", "high_pass"]))


def test_a_view_of_its_own_cfg_is_sampled_by_it(tiny_models):
    model = tiny_models["EPS"]
    own = _guided(model, _prompts("flip"), _combine(["flip"], cfgs=[3.0]), cfg=7.0)
    plain = _guided(model, _prompts("flip"), _combine(["flip"]), cfg=3.0)
    torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cfg", [0.0, 1.0])
def test_a_views_own_cfg_that_the_samplers_would_silence_is_refused(tiny_models, cfg):
    prompts = [*_prompts("identity"), replace(_prompts("flip")[0], cfg=7.0)]
    patched = with_views(tiny_models["EPS"], prompts, _combine(["identity", "flip"], cfgs=[None, 7.0]))
    with pytest.raises(ValueError, match=f"'flip' has its own cfg, 7, and the sampler's is {cfg:g}"):
        _ksampler(*patched, cfg=cfg)


def test_the_nodes_hand_on_a_views_own_cfg():
    plain = AnagramView(lambda cell: view_named("identity"), _cond(0), None, 1.0, None)
    own = AnagramView(lambda cell: view_named("flip"), _cond(1), None, 1.0, plain, 7.0)
    prompts = own.prompts(_cond(99))
    assert [p.cfg for p in prompts] == [None, 7.0]


def _plain(model, sampler, **known):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(_cond(0), _cond(99))
    guider.set_cfg(5.0)
    noise = _noise()
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 10)
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=3, **known)


def test_one_repeat_is_the_sampler_itself():
    sampler = comfy.samplers.sampler_object("dpmpp_2m")
    assert travelling_sampler(sampler, 0.2, 0.8, 1) is sampler
    assert travelling_sampler(sampler, 0.8, 0.2, 3) is sampler


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
def test_time_travel_repeats_the_window_the_same_way_each_time(tiny_models, kind):
    seen: list[int] = []
    travel = travelling_sampler(comfy.samplers.sampler_object("euler"), 0.2, 0.8, 3)
    first = _plain(tiny_models[kind], travel, callback=lambda step, *_: seen.append(step))
    assert set(seen) == set(range(10))
    repeated = [step for step in range(10) if seen.count(step) == 3]
    assert repeated == list(range(repeated[0], repeated[-1] + 1))
    assert all(seen.count(step) == 1 for step in range(10) if step not in repeated)
    assert 4 <= len(repeated) <= 8
    assert torch.isfinite(first).all()
    assert torch.equal(_plain(tiny_models[kind], travel), first)
    assert not torch.allclose(first, _plain(tiny_models[kind], comfy.samplers.sampler_object("euler")))


def test_a_window_outside_the_schedule_changes_nothing(tiny_models):
    travel = travelling_sampler(comfy.samplers.sampler_object("dpmpp_2m"), 0.9999, 1.0, 4)
    assert torch.equal(
        _plain(tiny_models["EPS"], travel), _plain(tiny_models["EPS"], comfy.samplers.sampler_object("dpmpp_2m"))
    )


@pytest.mark.parametrize("name", ["heunpp2", "uni_pc", "uni_pc_bh2"])
def test_samplers_that_need_the_whole_schedule_are_refused(name):
    with pytest.raises(ValueError, match=r"plans its steps over the whole schedule; use heun"):
        travelling_sampler(comfy.samplers.sampler_object(name), 0.2, 0.8, 2)
    assert travelling_sampler(comfy.samplers.sampler_object(name), 0.2, 0.8, 1).sampler_function  # the plain one


def test_heun_stays_of_second_order_in_the_window(tiny_models):
    """Each pass asks at its own level and at the next: the same picture as heun's, step by step, without the
    renoising."""
    asked: list[float] = []

    class Noting(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, *args, **kwargs):
            asked.append(float(timestep.max()))
            return super().predict_noise(x, timestep, *args, **kwargs)

    travel = travelling_sampler(comfy.samplers.sampler_object("heun"), 0.2, 0.8, 2)
    guider, noise = Noting(tiny_models["EPS"]), _noise()
    guider.set_conds(_cond(0), _cond(99))
    sigmas = comfy.samplers.calculate_sigmas(tiny_models["EPS"].get_model_object("model_sampling"), "normal", 6)
    guider.sample(noise, torch.zeros_like(noise), travel, sigmas, disable_pbar=True, seed=3)
    taken = travel.sampler_function.passes(tiny_models["EPS"].get_model_object("model_sampling"), sigmas)
    assert max(taken) == 2
    steps = list(zip(sigmas.tolist(), sigmas[1:].tolist(), taken, strict=False))
    wanted = [level for high, low, passes in steps for _ in range(passes) for level in (high, low) if level > 0]
    assert asked == pytest.approx(wanted)


def test_an_ancestral_sampler_draws_other_noise_on_each_pass(tiny_models, drawn):
    travel = travelling_sampler(comfy.samplers.sampler_object("euler_ancestral"), 0.2, 0.8, 2)
    first = _plain(tiny_models["EPS"], travel)
    assert len(drawn) > 10
    flat = torch.nn.functional.normalize(torch.stack(drawn).flatten(1), dim=1)
    assert (flat @ flat.T - torch.eye(len(flat))).abs().max() < 0.5
    assert torch.equal(_plain(tiny_models["EPS"], travel), first)  # the same seed, the same picture


def test_churn_is_shared_out_among_the_steps_of_the_whole_schedule(tiny_models):
    """Samplers divide it by the steps they are given, and within the window that is one."""
    hats = []
    travel = travelling_sampler(comfy.samplers.ksampler("euler", {"s_churn": 2.0}), 0.2, 0.8, 2)
    watched = travel.sampler_function.function

    def watching(model, x, sigmas, callback=None, **known):
        return watched(model, x, sigmas, callback=lambda k: hats.append(float(k["sigma_hat"] / k["sigma"])), **known)

    object.__setattr__(travel.sampler_function, "function", watching)
    _plain(tiny_models["EPS"], travel)
    assert hats == pytest.approx([1.2] * len(hats))  # 2.0 over 10 steps


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2s_ancestral", "lcm"])
@pytest.mark.parametrize("begins", [0, 1])
def test_the_noise_of_going_back_up_is_nobody_elses(tiny_models, drawn, monkeypatch, begins, sampler):
    """Newer hosts begin the noise of a sampler at the seed after the run's own on a CPU."""
    watched, added = comfy.k_diffusion.sampling.default_noise_sampler, []

    def noting(x, noise, *levels):
        added.append(noise)
        return renoised_latent(x, noise, *levels)

    monkeypatch.setattr(
        comfy.k_diffusion.sampling, "default_noise_sampler", lambda x, seed: watched(x, seed=seed + begins)
    )
    monkeypatch.setattr(time_travel, "renoised_latent", noting)
    _plain(tiny_models["EPS"], travelling_sampler(comfy.samplers.sampler_object(sampler), 0.2, 0.8, 2))
    first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert len(added) > 3
    everyone = torch.stack([first, *added, *drawn[begins == 0 :]])  # older hosts' own first draw is the first noise
    flat = torch.nn.functional.normalize(everyone.flatten(1), dim=1)
    assert (flat @ flat.T - torch.eye(len(flat))).abs().max() < 0.5


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_going_back_up_restores_the_level_of_signal_and_noise(new_model, kind, scale):
    """Also of flow models whose noise has another scale than one, as newer hosts have."""
    sampling = new_model(kind).get_model_object("model_sampling")
    sampling.noise_scale = scale
    low, high = (float(sampling.percent_to_sigma(p)) for p in (0.6, 0.4))
    x0, before, fresh = (torch.randn(1, 4, 256, 256, generator=torch.Generator().manual_seed(i)) for i in range(3))
    scale = scale if kind == "FLOW" else 1.0
    a, s = (1 - low, low * scale) if kind == "FLOW" else (1.0, low)
    up = renoised_latent(a * x0 + s * before, fresh, sampling, low, high)
    a_high = 1 - high if kind == "FLOW" else 1.0
    assert (up * x0).mean() / x0.square().mean() == pytest.approx(a_high, abs=0.02)
    assert (up - a_high * x0).std() == pytest.approx(high * scale, rel=0.02)


def test_a_packed_pair_or_a_sound_is_refused(tiny_models):
    for latent in (comfy.nested_tensor.NestedTensor([_noise(), _noise()]), torch.zeros(1, 1, 512)):
        with pytest.raises(ValueError, match="not on a packed pair or a sound"):
            check_view(view_named("flip"), tiny_models["EPS"], latent)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_the_host_is_asked_for_room_for_all_views(tiny_models, views, monkeypatch):
    names, shapes = ["identity", "rotate_180", "flip"][:views], []
    prepare = comfy.sampler_helpers._prepare_sampling

    def noting(model, noise_shape, *args, **known):
        shapes.append(list(noise_shape))
        return prepare(model, noise_shape, *args, **known)

    monkeypatch.setattr(comfy.sampler_helpers, "_prepare_sampling", noting)
    _ksampler(*with_views(tiny_models["EPS"], _prompts(*names), _combine(names)), batch=2)
    _guided(tiny_models["EPS"], _prompts(*names), _combine(names))
    contrast = contrasted_prompts(_prompts(*names), 0.5)  # one more entry for every pair of views
    _guided(tiny_models["EPS"], contrast, _combine(names))
    rows = [2 * views, views, views + math.ceil(views * (views - 1) / 2)]
    assert shapes == [[n, 4, 8, 8] for n in rows]
