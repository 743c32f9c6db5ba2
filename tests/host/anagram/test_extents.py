"""A view with an area, a mask or sampling percents has no say elsewhere: there the others draw alone."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.model_patch import with_views
from comfyui_concepts.host.anagram.pixel_sync import PixelSyncGuider
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.methods.anagram.combine import AVERAGING, Combination, combiner
from comfyui_concepts.methods.anagram.extents import within_extents
from comfyui_concepts.methods.anagram.schedule import Keyframe
from comfyui_concepts.methods.anagram.views import view_named

HALF = torch.zeros(8, 8)
HALF[:, :4] = 1
BOUNDS = {
    "area": {"area": (8, 4, 0, 0), "strength": 1.0},
    "area at the right": {"area": (8, 4, 0, 4), "strength": 0.5},
    "mask": {"mask": HALF[None], "mask_strength": 1.0},
    "percents": {"start_percent": 0.5, "end_percent": 1.0},
    "area and percents": {"area": (8, 4, 0, 0), "strength": 1.0, "start_percent": 0.5, "end_percent": 1.0},
}


def _cond(seed, **values):
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), values]]


def _drawn(guider):
    """The first prediction of a sampling."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", 1)
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=3)


def _of(model, cfg, *prompts):
    return _drawn(ViewsGuider(model, prompts, combiner(AVERAGING, [p.weight for p in prompts]), cfg))


def _weighed(model, weighing, *prompts, cfgs=()):
    combine = combiner(Combination(weighing), [p.weight for p in prompts], cfgs=cfgs)
    return _drawn(ViewsGuider(model, prompts, combine, 4.0))


def _keyframes(*weights):
    return (Keyframe(0.0, weights), Keyframe(1.0, weights))


def _prompt(name, seed, weight=1.0, **values):
    return ViewPrompt(view_named(name), _cond(seed, **values), _cond(99), weight=weight)


def _place(name, bounds):
    """Where the view acts, (8, 8) in the canonical frame."""
    left = view_named(name).inverse(HALF) > 0.5
    right = view_named(name).inverse(1 - HALF) > 0.5
    return {"area at the right": right}.get(bounds, left & ("percents" not in bounds))


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("name", ["flip", "rotate_cw", "patch_permute"])
def test_outside_of_its_extent_the_others_draw_alone(tiny_models, name, bounds, cfg):
    model, others = tiny_models["EPS"], [_prompt("identity", 0, 1.0), _prompt("rotate_180", 1, 2.0)]
    alone = _of(model, cfg, *others)
    both = _of(model, cfg, *others, _prompt(name, 2, **BOUNDS[bounds]))
    outside = ~_place(name, bounds)
    torch.testing.assert_close(both[..., outside], alone[..., outside], rtol=1e-3, atol=1e-4)
    if (~outside).any():
        assert float((both - alone)[..., ~outside].abs().mean()) > 1e-3
    if bounds == "mask":
        whole = _of(model, cfg, *others, _prompt(name, 2))
        torch.testing.assert_close(both[..., ~outside], whole[..., ~outside], rtol=1e-3, atol=1e-4)


OTHERS = {
    "schedule": (_keyframes(2.0, 1.0, 3.0), _keyframes(1.0, 3.0)),
    "a schedule that leaves one out": (_keyframes(1.0, 0.0, 1.0), _keyframes(0.0, 1.0)),
    "a schedule of the bounded view alone": (_keyframes(1.0, 0.0, 0.0), "manual"),
    "alternate, in the bounded view's step": ("alternate", "manual"),
    "prioritise first": ("prioritise first", "manual"),
}


@pytest.mark.parametrize("weighing", OTHERS)
def test_outside_of_its_extent_the_others_count_as_they_do_at_this_step(tiny_models, weighing):
    """Where none of them does, as the user weighs them."""
    model, others = tiny_models["EPS"], [_prompt("identity", 0, 1.0), _prompt("rotate_180", 1, 2.0)]
    with_bounded, without = OTHERS[weighing]
    alone = _weighed(model, without, *others)
    both = _weighed(model, with_bounded, _prompt("flip", 2, **BOUNDS["area"]), *others)
    outside = ~_place("flip", "area")
    torch.testing.assert_close(both[..., outside], alone[..., outside], rtol=1e-3, atol=1e-4)


def test_outside_of_its_extent_its_own_guidance_does_not_count(tiny_models):
    model, others = tiny_models["EPS"], [_prompt("identity", 0, 1.0), _prompt("rotate_180", 1, 2.0)]
    both = _weighed(model, "manual", _prompt("flip", 2, **BOUNDS["area"]), *others, cfgs=(12.0, None, None))
    outside = ~_place("flip", "area")
    torch.testing.assert_close(both[..., outside], _of(model, 4.0, *others)[..., outside], rtol=1e-3, atol=1e-4)


def test_in_the_stock_ksampler_too(tiny_models):
    def drawn(*prompts):
        model, positive, negative = with_views(tiny_models["EPS"], prompts, combiner(AVERAGING, [1.0] * len(prompts)))
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(4.0)
        return _drawn(guider)

    late = _prompt("flip", 2, **BOUNDS["percents"])
    torch.testing.assert_close(drawn(_prompt("identity", 0), late), drawn(_prompt("identity", 0)), rtol=1e-3, atol=1e-4)


class _Lossless:
    """A VAE that is exact: pictures of four channels, one pixel a cell."""

    def spacial_compression_encode(self):
        return 1

    def decode(self, z):
        return (z.movedim(1, -1) + 1) / 2

    def encode(self, picture):
        return (picture * 2 - 1).movedim(-1, 1)


@pytest.mark.parametrize("bounds", ["area", "mask", "percents"])
def test_in_pixel_sync_too(tiny_models, bounds):
    def drawn(*prompts):
        return _drawn(PixelSyncGuider(tiny_models["EPS"], prompts, 4.0, _Lossless(), lambda p: p.mean(0)))

    alone = drawn(_prompt("identity", 0))
    both = drawn(_prompt("identity", 0), _prompt("flip", 2, **BOUNDS[bounds]))
    outside = ~_place("flip", bounds)
    torch.testing.assert_close(both[..., outside], alone[..., outside], rtol=1e-3, atol=1e-4)


def test_a_view_that_is_only_shown_says_nothing_elsewhere_and_where_no_view_acts_all_stays():
    first, second, third = (torch.full((1, 1, 1, 3), float(n)) for n in (1, 2, 4))
    first_extent = torch.tensor([[[[True, False, False]]]])
    also = torch.tensor([[[[True, True, False]]]])
    found = within_extents([first, second, third], [first_extent, also, None], torch.tensor([[1.0, 1.0, 0.0]]))
    assert [f.flatten().tolist() for f in found] == [[1, 2, 1], [2, 2, 2], [4, 4, 4]]
