"""Anagrams on transformers of every family: the same bits for one view, one call for all, refusals in words."""

from __future__ import annotations

import logging

import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.request import anagram_request
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.methods.anagram.combine import AVERAGING, Combination
from comfyui_concepts.methods.anagram.views import Settings, view_named

from ..tiny_transformers import conditioning, counted, names, noise, shared_transformer

FAST = [name for name in names() if name != "flux2"]
"""Flux.2's text has 512 rows: it gets one test of everything."""
STEPS = 2


def _views(name: str, *views: str, parts: int = 0) -> list[ViewPrompt]:
    """Views with prompts of unequal length and a negative of a third one."""
    negative = conditioning(name, 7, seed=99)
    return [
        ViewPrompt(view_named(view, Settings(parts=parts)), conditioning(name, 10 + 3 * n, seed=n), negative)
        for n, view in enumerate(views)
    ]


def _sample(guider, name: str, sampler="euler", batch=1, size=(8, 8)) -> torch.Tensor:
    start = noise(guider.model_patcher, *size, batch=batch)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
    return guider.sample(
        start, torch.zeros_like(start), comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=1
    )


def _plain(model, name: str, cfg: float):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(name, 10, seed=0), conditioning(name, 7, seed=99))
    guider.set_cfg(cfg)
    return guider


def _ours(model, prompts, cfg: float, settings: Combination = AVERAGING):
    asked = anagram_request(prompts, settings)
    return ViewsGuider(model, asked.prompts, asked.combine, cfg)


USES = [(2.0, "euler", 1), (1.0, "euler", 1), (2.0, "dpmpp_2m", 2)]


@pytest.mark.parametrize("name", [*FAST, "flux2"])
def test_one_identity_view_is_plain_sampling_bit_for_bit(name):
    for cfg, sampler, batch in USES if name != "flux2" else USES[:1]:
        model = shared_transformer(name)
        plain = _sample(_plain(model, name, cfg), name, sampler, batch)
        ours = _sample(_ours(model, _views(name, "identity"), cfg), name, sampler, batch)
        assert torch.equal(ours, plain), (cfg, sampler, batch)


@pytest.mark.parametrize("name", [*FAST, "flux2"])
def test_views_share_a_call_whatever_the_lengths_of_their_prompts(name):
    model, calls = counted(shared_transformer(name))
    _sample(_ours(model, _views(name, "identity", "flip", "rotate_180"), 2.0), name)
    assert calls == [6] * STEPS
    calls.clear()
    _sample(_ours(model, _views(name, "identity", "flip"), 1.0), name)
    assert calls == [2] * STEPS


def test_pieces_start_where_the_model_s_squares_do():
    model = shared_transformer("zimage")
    good = _ours(model, _views("zimage", "identity", "tile_transpose", parts=4), 1.0)
    assert torch.isfinite(_sample(good, "zimage")).all()
    mixed = _ours(model, _views("zimage", "identity", "patch_permute", parts=8), 1.0)
    with pytest.raises(ValueError, match=r"squares of 2 × 2 cells.* try parts = 2 or 4"):
        _sample(mixed, "zimage")


def test_a_view_that_cuts_only_columns_may_have_any_height():
    view = view_named("roll", Settings())
    view.check_patches(6, 8, 2)
    with pytest.raises(ValueError, match="two pieces"):
        view.check_patches(8, 6, 2)
    view.check_patches(8, 6, 1)


def test_at_cfg_1_a_contrast_says_once_that_it_does_nothing(caplog):
    model, settings = shared_transformer("zimage"), Combination(contrast=0.5)
    with caplog.at_level(logging.WARNING):
        contrasted = _sample(_ours(model, _views("zimage", "identity", "flip"), 1.0, settings), "zimage")
    assert caplog.text.count("Contrast does nothing at cfg 1") == 1
    assert torch.equal(contrasted, _sample(_ours(model, _views("zimage", "identity", "flip"), 1.0), "zimage"))


def test_odd_sizes_work_or_are_refused_in_words():
    model = shared_transformer("cosmos")
    ours = _ours(model, _views("cosmos", "identity", "flip"), 1.0)
    try:
        _sample(_plain(model, "cosmos", 1.0), "cosmos", size=(9, 7))
    except AssertionError:  # older hosts fill nothing up
        with pytest.raises(ValueError, match="set width and height to multiples of 16"):
            _sample(ours, "cosmos", size=(9, 7))
    else:
        assert torch.isfinite(_sample(ours, "cosmos", size=(9, 7))).all()
