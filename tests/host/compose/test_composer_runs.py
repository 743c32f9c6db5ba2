"""LoRA-Composer inside the host's samplers: the noise they get, weights kept in other ways, inpaint masks, faults."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.compose import guider as composer_module
from comfyui_concepts.host.compose.enhancement import AttentionMaps, CapturedMaps, Enhancer
from comfyui_concepts.host.compose.guider import AttentionAccumulator, ComposeGuider
from comfyui_concepts.host.compose.injection import Injection
from comfyui_concepts.host.compose.projections import ProjectedConcepts
from comfyui_concepts.host.engine.latent_edits import EditSchedule
from comfyui_concepts.methods.compose.reinit import Window
from comfyui_concepts.methods.compose.settings import Compose

from ..faults import FAULTS, assert_as_remembered, faults_at, load_off_the_device, remembered
from .composer_cases import SIZE, concept, guider_of, halves, randn, run, sample

PULLED = Compose(stop="never", end=0.6)  # at two levels of three
ONE_PULL = Compose(stop="never", end=0.3)


@pytest.fixture(scope="module")
def model(new_model):
    return new_model("EPS", sd15=True)


@pytest.fixture(scope="module")
def two(model):
    return [concept(5, 1.0, model), concept(6, 1.0, model)]


# ---- the first noise ------------------------------------------------------------------------------------------------

BOXES = Window(8, 0, 8, 6), Window(8, 18, 8, 6)


class Listening(comfy.samplers.Sampler):
    """Takes no step, and keeps the noise it is handed."""

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *rest, **more):
        self.noise = noise
        return noise


def _boxed():
    covered = torch.zeros(2, *SIZE)
    for region, box in zip(covered, BOXES, strict=True):
        region[box.cells()] = 1
    return covered


def _received(model, two, how, seeds):
    """The noise given, and what the sampler gets of it."""
    given = torch.cat([torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(s)) for s in seeds])
    listening = Listening()
    sample(model, two, _boxed(), Compose(reinit=how, enhancement=0), sampler=listening, noise=given.clone())
    return given, listening.noise


def test_the_noise_is_exchanged_and_nothing_of_it_lost(model, two):
    """Spec B8.9: one permutation of the cells for all channels of a picture, and each picture's own."""
    given, noise = _received(model, two, "swap", range(3))
    for before, after in zip(given, noise, strict=True):
        assert sorted(map(tuple, after.flatten(1).T.tolist())) == sorted(map(tuple, before.flatten(1).T.tolist()))
    moved = (noise != given).any(1)
    assert moved.any((1, 2)).all()
    assert not torch.equal(moved[0], moved[1])
    for seed in range(3):
        assert torch.equal(_received(model, two, "swap", [seed])[1], noise[seed : seed + 1])


def test_copied_noise_keeps_mean_and_deviation_and_off_keeps_it_all(model, two):
    given, noise = _received(model, two, "copy", range(2))
    axes = (1, 2, 3)
    for measure in (torch.mean, torch.std):
        assert torch.allclose(measure(noise, axes), measure(given, axes), atol=1e-5)
    for before, after in zip(given, noise, strict=True):
        assert len({tuple(cell) for cell in after.flatten(1).T.tolist()}) < before[0].numel()  # some came twice
    given, noise = _received(model, two, "off", range(2))
    assert torch.equal(noise, given)


@pytest.mark.parametrize("how", ["swap", "copy"])
def test_each_picture_of_a_batch_gets_the_window_where_its_own_maps_are_hot(model, two, how, monkeypatch):
    hot = [  # by region and picture
        [Window(0, 8, 8, 6), Window(4, 10, 8, 6)],
        [Window(0, 2, 8, 6), Window(0, 17, 8, 6)],
    ]
    maps = torch.zeros(2, 2, 2, *SIZE)  # (regions, batch, words, h, w)
    for region, windows in enumerate(hot):
        for picture, window in enumerate(windows):
            maps[region, picture, region][window.cells()] = 1.0
    monkeypatch.setattr(AttentionMaps, "of", lambda *_: CapturedMaps(list(maps), None))
    given, noise = _received(model, two, how, range(2))
    for picture, (before, after) in enumerate(zip(given, noise, strict=True)):
        expected = before.clone()
        for box, windows in zip(BOXES, hot, strict=True):
            at, of = (slice(None), *box.cells()), (slice(None), *windows[picture].cells())
            expected[at] = before[of]
            if how == "swap":
                expected[of] = before[at]
        if how == "copy":
            expected = (expected - expected.mean()) / expected.std() * before.std() + before.mean()
        assert torch.allclose(after, expected, atol=0 if how == "swap" else 1e-5)


# ---- weights kept in other ways -------------------------------------------------------------------------------------


def _forgetting(monkeypatch):
    """From now on keys and values are computed at every question."""
    at = ProjectedConcepts.at
    monkeypatch.setattr(ProjectedConcepts, "at", lambda self, *key: (self.cached.clear(), at(self, *key))[1])


def _with_another_lora(patcher):
    """The model with a host's patch on keys and values: merged into loaded weights, added at use elsewhere."""
    patched, weights = patcher.clone(), patcher.model.state_dict()
    keys = [key for key in weights if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    patched.add_patches({key: ("diff", (randn(*weights[key].shape, scale=0.3).float(),)) for key in keys})
    return patched


@pytest.mark.parametrize("kept", ["half", "off the device"])
def test_weights_cast_or_brought_at_use_give_the_same_and_so_do_keys_and_values_of_every_step(
    new_model, two, kept, monkeypatch
):
    """Spec B8.6."""
    model, whole = new_model("EPS", torch.float16 if kept == "half" else torch.float32, sd15=True), new_model(sd15=True)
    whole.model.load_state_dict(model.model.state_dict())
    if kept == "off the device":
        model, whole = _with_another_lora(model), _with_another_lora(whole)
    expected, _ = sample(whole, two, halves(), ONE_PULL, steps=2)
    if kept == "off the device":
        load_off_the_device(monkeypatch)
    out, guider = sample(model, two, halves(), ONE_PULL, steps=2)
    assert guider.updates == 1
    assert (model.model.manual_cast_dtype is torch.float32) == (kept == "half")
    assert model.model.model_lowvram == (kept == "off the device")
    assert torch.allclose(out, expected, atol=1e-4)
    _forgetting(monkeypatch)
    assert torch.equal(sample(model, two, halves(), ONE_PULL, steps=2)[0], out)


# ---- samplers and inpaint masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "uni_pc", "dpmpp_2m", "dpmpp_2m_sde"])
def test_outside_of_an_inpaint_mask_is_the_given_latent(model, two, sampler, caplog):
    """Gradient steps go on with what the sampler sees of the mask; that they do not last is said once a sampling."""
    caplog.set_level("INFO")
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., 4:, 6:18] = 1
    latent = randn(1, 4, *SIZE, seed=9).float()
    told = {"steps": 3, "sampler": sampler, "mask": mask, "latent": latent}
    out, guider = sample(model, two, halves(), PULLED, **told)
    assert torch.isfinite(out).all()
    assert guider.updates == 2
    assert sum("acts on the predictions alone" in r.message for r in caplog.records) == 1
    outside = (1 - mask).bool().expand_as(out)
    ends_at = 0.05 if sampler == "uni_pc" else 1e-5  # whose last level the host puts a little above zero
    assert torch.allclose(out[outside], latent[outside], atol=ends_at)
    assert torch.equal(sample(model, two, halves(), PULLED, **told)[0], out)
    plain, _ = sample(model, two, halves(), replace(PULLED, enhancement=0), **told)
    assert not torch.allclose(out[~outside], plain[~outside], atol=1e-3)


@pytest.mark.parametrize(("sampler", "lasts"), [("euler", True), ("dpmpp_2m", True), ("heun", True), ("uni_pc", False)])
def test_without_a_mask_edits_last_where_the_sampler_goes_on_with_its_latent(
    model, two, sampler, lasts, caplog, monkeypatch
):
    caplog.set_level("INFO")
    kept, lasted = EditSchedule.apply, []

    def watched(self, x, edited):
        out = kept(self, x, edited)
        lasted.append(out is x)
        return out

    monkeypatch.setattr(EditSchedule, "apply", watched)
    sample(model, two, halves(), ONE_PULL, sampler=sampler, steps=2)
    assert lasted == [lasts]
    assert sum("acts on the predictions alone" in r.message for r in caplog.records) == (not lasts)


# ---- faults ---------------------------------------------------------------------------------------------------------


PLACES = {
    "filling": (ProjectedConcepts, "fill", ONE_PULL),
    "rearranging": (AttentionMaps, "_entry", ONE_PULL),
    "looking": (AttentionMaps, "_entry", replace(ONE_PULL, reinit="off")),
    "in a layer that is looked at": (Injection, "_override", replace(ONE_PULL, reinit="off")),
    "pulling": (Enhancer, "_scaled", ONE_PULL),
    "in a layer": (Injection, "_after", replace(ONE_PULL, reinit="off", enhancement=0)),
    "watching": (AttentionAccumulator, "_override", ONE_PULL),
    "finding": (composer_module, "regions_of_concepts", replace(ONE_PULL, automatic=0.1)),
    "showing": (ComposeGuider, "panels", replace(ONE_PULL, enhancement=0)),
}


@pytest.mark.parametrize(("where", "fault"), faults_at(PLACES))
def test_the_host_is_as_it_was_whatever_happens(model, two, where, fault, monkeypatch):
    before = remembered(model)
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 2)  # as on a GPU
    monkeypatch.setattr(comfy.model_management, "in_training", False, raising=False)
    modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    (owner, name, settings), error = PLACES[where], FAULTS[fault]()
    original = getattr(owner, name)

    def failing(*args):
        original(*args)
        raise error

    guider = guider_of(model, two, None if where in ("watching", "finding") else halves(), settings)
    with monkeypatch.context() as broken:
        broken.setattr(owner, name, failing)
        with pytest.raises(type(error)) as raised:
            run(guider, steps=2, callback=lambda *_: None)
    assert raised.value is error
    assert_as_remembered(model, before)
    assert guider.run is None
    assert guider.model_options is model.model_options
    assert (comfy.model_management.in_training, comfy.model_management.NUM_STREAMS) == (False, 2)
    assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == modes


@pytest.mark.parametrize("where", ["in a layer that is looked at", "finding"])
def test_after_a_fault_the_same_guider_makes_what_a_new_one_makes(model, two, where, monkeypatch):
    (owner, name, settings), covered = PLACES[where], None if where == "finding" else halves()
    guider = guider_of(model, two, covered, settings)
    with monkeypatch.context() as broken:
        broken.setattr(owner, name, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(guider, steps=3)
    again, (new, _) = run(guider, steps=3), sample(model, two, covered, settings, steps=3)
    assert torch.equal(again, new)
