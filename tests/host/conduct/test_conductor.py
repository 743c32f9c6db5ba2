"""Concept Conductor inside the host's samplers: plain without concepts, right gradients, nothing left behind."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.conduct import layout as layout_module
from comfyui_concepts.host.conduct.guider import ConductGuider, ConductRun
from comfyui_concepts.host.conduct.layout import (
    Aligner,
    Denoiser,
    LayoutReference,
    trajectory,
)
from comfyui_concepts.host.conduct.merging import Merging
from comfyui_concepts.host.conduct.networks.unet import UNetPaths, guidance_site, mask_site
from comfyui_concepts.host.conduct.paths import ConceptPath, Paths
from comfyui_concepts.host.engine.base_prompts import BasePrompts
from comfyui_concepts.host.engine.latent_edits import EditSchedule
from comfyui_concepts.host.engine.sampling import percent_of
from comfyui_concepts.host.lora.concept import Concept
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.methods.conduct.settings import Conduct
from comfyui_concepts.methods.regions import Box, Region

from ..faults import FAULTS, assert_as_remembered, faults_at, load_off_the_device, remembered

HALVES = [Region("left", (Box(0, 0, 0.5, 1),)), Region("right", (Box(0.5, 0, 0.5, 1),))]
QUICK = Conduct(iterations=1, guidance_end=0.6, refine_start=0.2, refine_end=0.9)


def _text(seed, dtype=torch.float32):
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)).to(dtype), {}]]


def _lora(model, seed):
    tensors, generator = {}, torch.Generator().manual_seed(seed)
    for path, module in model.model.diffusion_model.named_modules():
        if path.endswith((".to_q", ".to_k", ".to_v", "ff.net.2")):
            out, inner = module.weight.shape
            name = f"lora_unet_{path.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = torch.randn(4, inner, generator=generator) * 0.3
            tensors[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.3
    return LoraFile(f"random {seed}", tensors)


def _guider(model, strengths=(1.0, 1.0), settings=QUICK, layout=True, cfg=3.0, dtype=torch.float32):
    concepts = [
        Concept(f"c{n}", "", _lora(model, n), s, _text(n, dtype), _text(50 + n, dtype))
        for n, s in enumerate(strengths, 1)
    ]
    reference = LayoutReference(_text(7, dtype), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4)))
    return ConductGuider(
        model,
        BasePrompts(_text(8, dtype), _text(9, dtype), cfg),
        concepts,
        HALVES[: len(concepts)],
        settings,
        reference if layout else None,
    )


def _sample(guider, sampler="euler", batch=1, steps=3, mask=None):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(11))[:batch]
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", steps)
    sampler = comfy.samplers.sampler_object(sampler)
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, denoise_mask=mask, disable_pbar=True, seed=3)


def _plain(model, cfg=3.0):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(_text(8), _text(9))
    guider.set_cfg(cfg)
    return _sample(guider)


@pytest.fixture(scope="module")
def model(new_model):
    return new_model("EPS")


@pytest.mark.parametrize("strengths", [(), (0.0, 0.0)])
@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION"])
def test_without_concepts_it_is_the_plain_guider_bit_for_bit(tiny_models, kind, strengths):
    assert torch.equal(_sample(_guider(tiny_models[kind], strengths)), _plain(tiny_models[kind]))


def test_every_ingredient_changes_the_picture_and_runs_repeat(model):
    whole = _sample(_guider(model))
    assert torch.equal(whole, _sample(_guider(model)))
    others = {
        "no layout": _sample(_guider(model, layout=False)),
        "no concepts": _plain(model),
        "cfg 1": _sample(_guider(model, cfg=1.0)),
        "whole transformers": _sample(_guider(model, settings=replace(QUICK, whole_transformers=True))),
        "no injection": _sample(_guider(model, settings=replace(QUICK, injection_end=-1.0))),
    }
    for name, other in others.items():
        assert torch.isfinite(other).all(), name
        assert not torch.equal(other, whole), name


def test_a_second_run_of_one_guider_is_the_first_and_keeps_the_reference(model):
    guider = _guider(model)
    first = _sample(guider)
    kept = next(iter(guider.layout.cache.values()))
    assert torch.equal(_sample(guider), first)
    assert next(iter(guider.layout.cache.values())) is kept
    _sample(guider, steps=5)
    assert next(iter(guider.layout.cache.values())) is not kept


def test_a_model_that_another_node_has_changed_gets_a_trajectory_of_its_own(model):
    """Patches of the attention or of the noise schedule change no weights, and the host's number of a model's patches
    neither."""
    reference = _guider(model).layout

    def kept_for(patcher):
        guider = _guider(patcher)
        guider.layout = reference
        _sample(guider)
        (known,) = reference.cache.values()
        return known[1]

    plain = kept_for(model)
    assert kept_for(model) is plain
    changed = model.clone()
    changed.set_model_attn1_output_patch(lambda output, extra: output * 0.5)
    other = kept_for(changed)
    assert changed.patches_uuid == model.patches_uuid
    assert not all(torch.equal(plain[level], other[level]) for level in plain)
    with_another_schedule = changed.clone()
    assert kept_for(with_another_schedule) is not other


def test_pictures_of_a_batch_do_not_meet(model):
    both, alone = _sample(_guider(model), batch=2), _sample(_guider(model))
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "heun", "uni_pc"])
@pytest.mark.parametrize("masked", [False, True])
def test_samplers_and_inpaint_masks(model, sampler, masked, caplog):
    caplog.set_level("INFO")
    mask = (torch.arange(64).view(1, 1, 8, 8) % 2).float() if masked else None
    guider = _guider(model)
    assert torch.isfinite(_sample(guider, sampler, mask=mask)).all()
    told = sum("acts on the predictions alone" in r.message for r in caplog.records)
    assert told == (masked or sampler == "uni_pc")
    assert torch.equal(guider.masks.sum(1), torch.ones(1, 8, 8))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpm_2", "dpmpp_sde"])
def test_the_edits_that_last_are_those_of_the_guided_levels(model, sampler, monkeypatch):
    """Not the latents that a sampler of second order throws away."""
    edited, steps = [], []
    whole = Aligner._moved
    monkeypatch.setattr(
        Aligner, "_moved", lambda self, x, *rest: (edited.append(float(rest[0].max())), whole(self, x, *rest))[1]
    )
    guider, settings = _guider(model), QUICK
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    kept = EditSchedule.apply
    latents = []
    monkeypatch.setattr(EditSchedule, "apply", lambda self, x, moved: (latents.append(x), kept(self, x, moved))[1])
    guider.sample(
        noise,
        torch.zeros_like(noise),
        comfy.samplers.sampler_object(sampler),
        sigmas,
        disable_pbar=True,
        seed=3,
        callback=lambda step, x0, x, total: steps.append(x),
    )
    sampling = model.get_model_object("model_sampling")
    guided = [float(s) for s in sigmas[:-1] if settings.guides_at(percent_of(sampling, float(s)))]
    assert edited == pytest.approx(guided)
    assert 1 < len(guided) < 6
    assert all(mine is theirs for mine, theirs in zip(latents, steps, strict=False))


def test_only_what_takes_gradients_asks_newer_hosts_for_ordinary_weights(model):
    dynamic, plain = model.clone(), model.clone()
    dynamic.is_dynamic, dynamic.get_non_dynamic_delegate = lambda: True, lambda: plain
    assert _guider(dynamic).model_patcher is plain
    for other in (
        {"layout": False},
        {"strengths": (0.0, 0.0)},
        {"settings": replace(QUICK, guidance_weight=0.0)},
    ):
        assert _guider(dynamic, **other).model_patcher is dynamic


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_layer_wise_prompt_of_another_model_is_refused(model, side):
    """LoRA-Composer has the same test: with a wrong number of layers, words would be read by layers they are not
    for."""
    guider = _guider(model)
    getattr(guider.concepts[0], side)[0][1][keys.LAYER_CONTEXTS] = torch.randn(16, 7, 32)
    with pytest.raises(ValueError, match="for 16 layers, and this model has 7 cross-attentions; load the checkpoint"):
        ConductGuider(model, BasePrompts(_text(8), _text(9), 3.0), guider.concepts, None, QUICK)


def _aligner(guider, model, sigma, x):
    """An aligner outside of a sampling: its paths, and a reference that is the latent itself if ``x`` is."""
    model.model.current_patcher = model
    conds = {
        name: comfy.samplers.process_conds(
            model.model, x, {"positive": comfy.sampler_helpers.convert_cond(text)}, x.device
        )["positive"]
        for name, text in (("base", _text(8, x.dtype)), ("layout", _text(7, x.dtype)))
    }
    guider.inner_model, guider.conds = model.model, {}
    for n, concept in enumerate(guider.concepts):
        for side, text in (("positive", concept.positive), ("negative", concept.negative)):
            made = comfy.sampler_helpers.convert_cond(text)
            guider.conds[f"{side} {n}"] = comfy.samplers.process_conds(model.model, x, {side: made}, x.device)[side]
    guider.conds |= {"positive": conds["base"], "negative": conds["base"]}
    paths = guider.new_paths(x)
    layout = ConceptPath(conds["layout"], conds["layout"])
    sigmas = torch.tensor([sigma, 0.0])
    return Aligner(paths, layout, {sigma: x.clone()}, sigmas, guider.settings, EditSchedule()), paths


def test_the_gradient_is_right_and_a_small_step_lowers_the_loss(new_model):
    """Spec A8.8: against finite differences in float64; the forward pass ends at the guidance site."""
    model = new_model("EPS", torch.float64)
    sigma, generator = 2.0, torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
    aligner, paths = _aligner(_guider(model, dtype=torch.float64), model, sigma, torch.zeros_like(x))
    steps = []

    def loss_at(z):
        with torch.no_grad():
            total = 0.0
            for n, path in enumerate(paths.paths):
                keys = aligner._keys(path, z, torch.tensor([sigma]), {})
                total += (1.0 if n == 0 else 0.5) * float((keys - wanted).square().mean(-1).sum())
            return total

    with torch.no_grad():
        wanted = aligner._keys(aligner.layout, torch.zeros_like(x), torch.tensor([sigma]), {})
    out = aligner._moved(x, torch.tensor([sigma]), wanted, {})
    gradient = (x - out) / (aligner.settings.guidance_weight * (1 + sigma**2))
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    h = 1e-3
    numeric = (loss_at(x + h * direction) - loss_at(x - h * direction)) / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-3)
    steps = [loss_at(x), loss_at(x - 1e-3 * gradient)]
    assert steps[1] < steps[0]
    assert aligner.losses[0] == pytest.approx(steps[0], rel=1e-6)


def test_the_early_exit_gradient_is_the_full_one_bit_for_bit(model, monkeypatch):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    aligner, _ = _aligner(_guider(model), model, 2.0, torch.zeros_like(x))
    with torch.no_grad():
        wanted = aligner._keys(aligner.layout, torch.zeros_like(x), torch.tensor([2.0]), {})
    early = aligner._moved(x, torch.tensor([2.0]), wanted, {})
    whole = UNetPaths.capture
    monkeypatch.setattr(UNetPaths, "capture", lambda self, stop: whole(self, stop=False))
    assert torch.equal(aligner._moved(x, torch.tensor([2.0]), wanted, {}), early)


def test_a_latent_that_is_the_reference_under_its_prompt_does_not_move(model):
    """Spec A8.8: no loss, no gradient; the concepts are left out of it, whose keys differ by their LoRAs."""
    guider = _guider(model, strengths=(1.0,))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    aligner, paths = _aligner(guider, model, 2.0, x)
    paths.paths = [aligner.layout]
    assert torch.equal(aligner(x.clone(), torch.tensor([2.0]), {}), x)
    assert aligner.losses == [0.0]


def test_inversion_comes_back(model):
    """Sampling from the inverted latent with the same prompt leads near the reference: the steps are the sampler's own,
    reversed."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(_text(7), _text(7))
    guider.set_cfg(1.0)
    conds = comfy.samplers.process_conds(
        model.model,
        torch.zeros(1, 4, 8, 8),
        {"positive": comfy.sampler_helpers.convert_cond(_text(7))},
        torch.device("cpu"),
    )["positive"]
    model.model.current_patcher = model
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 20)
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        levels = trajectory(
            LayoutReference(_text(7), latent), Denoiser(model.model, conds, {}), model, sigmas, torch.zeros(1, 4, 8, 8)
        )
    assert set(levels) == {float(s) for s in sigmas if s > 0}
    noise = levels[float(sigmas[0])] / (1 + sigmas[0] ** 2) ** 0.5
    back = guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True
    )
    assert (back - latent).square().mean() < 0.2 * latent.square().mean()
    with pytest.raises(ValueError, match="scale the reference"):
        trajectory(
            LayoutReference(_text(7), latent), Denoiser(model.model, conds, {}), model, sigmas, torch.zeros(1, 4, 8, 16)
        )


def test_a_control_net_of_inference_weights_goes_with_a_layout(model, control_net):
    """The gradient does not go through the control, whose weights autograd could not keep."""
    guider = _guider(model)
    assert next(control_net.control_model.parameters()).is_inference()
    for name in [n for n in guider.original_conds if n.startswith("positive")]:
        guider.original_conds[name][0]["control"] = control_net
    controlled = _sample(guider)
    assert torch.isfinite(controlled).all()
    assert not torch.equal(controlled, _sample(_guider(model)))


def test_weights_that_stay_off_the_device_give_the_same(new_model, monkeypatch):
    expected, low = _sample(_guider(new_model("EPS"))), new_model("EPS")
    load_off_the_device(monkeypatch)
    assert torch.allclose(_sample(_guider(low)), expected, atol=1e-4)
    assert low.model.model_lowvram


CASES = ["points", "layers", "denoise", "odd size", torch.float16, torch.bfloat16]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_less_usual_samplings_are_finite_and_repeat(new_model, case):
    model = new_model("EPS", case if isinstance(case, torch.dtype) else torch.float32)
    if isinstance(case, torch.dtype):
        model.model.manual_cast_dtype = None  # it computes in half precision, too
    height, width = (9, 7) if case == "odd size" else (8, 8)
    guider, generator = _guider(model), torch.Generator().manual_seed(4)
    latent = torch.randn(1, 4, height, width, generator=generator)
    points = ((0.2, 0.5), (0.8, 0.5)) if case == "points" else ()
    if case == "layers":
        guider.concepts[0].positive[0][1][keys.LAYER_CONTEXTS] = torch.randn(7, 7, 32, generator=generator)
    regions = None if case == "points" else HALVES
    layout = LayoutReference(_text(7), latent, points=points)
    guider = ConductGuider(model, BasePrompts(_text(8), _text(9), 3.0), guider.concepts, regions, QUICK, layout)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    sigmas = sigmas[1:] if case == "denoise" else sigmas
    start, runs = latent if case == "denoise" else torch.zeros_like(latent), []
    for _ in range(2):
        noise = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(11))
        sampler = comfy.samplers.sampler_object("euler")
        runs.append(guider.sample(noise, start, sampler, sigmas, disable_pbar=True, seed=3))
    assert torch.isfinite(runs[0]).all()
    assert torch.equal(*runs)
    assert torch.equal(guider.masks.sum(1), torch.ones(1, height, width))
    assert (guider.masks[:, 1:].sum((-2, -1)) > 0).all()


@pytest.mark.parametrize("sigmas", [(0.0,), (2.0,)])
def test_a_sampling_without_steps_makes_no_trajectory_and_keeps_the_known_one(model, sigmas):
    """Split Sigmas at the last step leaves one noise level."""
    guider = _guider(model)
    layout = replace(guider.layout, points=((0.2, 0.5), (0.8, 0.5)))
    guider = ConductGuider(model, BasePrompts(_text(8), _text(9), 3.0), guider.concepts, None, QUICK, layout)
    _sample(guider)
    kept = next(iter(layout.cache.values()))
    latent, euler = torch.ones(1, 4, 8, 8), comfy.samplers.sampler_object("euler")
    out = guider.sample(torch.zeros_like(latent), latent, euler, torch.tensor(sigmas), disable_pbar=True, seed=3)
    assert torch.allclose(out, latent, atol=1e-6)
    assert next(iter(layout.cache.values())) is kept


PLACES = ["inverting", "at points", "aligning", "asking", "refining", "two phases", "whole transformers"]


@pytest.mark.parametrize(("where", "fault"), faults_at(PLACES))
def test_the_model_is_as_it_was_whatever_happens(model, where, fault, monkeypatch):
    before, error = remembered(model), FAULTS[fault]()
    owner, name = {
        "aligning": (Aligner, "_keys"),
        "refining": (ConductRun, "_refined"),
        "inverting": (layout_module, "_inverted"),
        "at points": (ConductGuider, "_masks_at_points"),
    }.get(where, (Merging, "merge"))
    original = getattr(owner, name)

    def failing(*args):
        original(*args)
        raise error

    monkeypatch.setattr(owner, name, failing)
    if where == "two phases":
        monkeypatch.setattr(Paths, "_fits_one_call", lambda *_: False)
    guider = _guider(model, settings=replace(QUICK, whole_transformers=where == "whole transformers"))
    guider.points = [(0.2, 0.5), (0.8, 0.5)] if where == "at points" else []
    with pytest.raises(type(error)):
        _sample(guider)
    monkeypatch.undo()
    assert_as_remembered(model, before)
    assert guider.run is None


def test_prompts_that_need_calls_of_their_own_are_refused(model):
    positive = _text(8)
    positive[0][1]["area"] = (8, 8, 0, 0)
    with pytest.raises(ValueError, match="an area.*regions of the concepts"):
        ConductGuider(model, BasePrompts(positive, _text(9), 3.0), [], None, QUICK)
    with pytest.raises(ValueError, match="dpm_adaptive"):
        _sample(_guider(model), "dpm_adaptive")


def test_the_sites_are_the_papers_on_sd15(new_model):
    unet = new_model("EPS", torch.float32, sd15=True).model.diffusion_model
    assert guidance_site(unet).block == ("output", 3)
    assert mask_site(unet, 64, 64).block == ("output", 8)
