"""Anagrams for the stock KSampler: a model that knows its views, and one conditioning that carries all their prompts.

The views' prompts travel as one combined CONDITIONING whose entries say which view they belong to; a keyed wrapper of
the model's predictions sorts them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.patcher_extension
import torch

from ...methods.anagram.prediction import Memory
from .. import keys
from ..engine.sampling import asking_for_room
from .anti_segregation import Pull, pulled_model, puller_for
from .guidance import Combine, check_own_cfg, check_view, guide_views, known_latent, times_the_rows
from .guider import ViewPrompt, own_controls, tagged
from .views import Conds, ViewConds


def with_views(
    model: Any, prompts: Sequence[ViewPrompt], combine: Combine, pull: Pull | None = None
) -> tuple[Any, list, list]:
    """A clone of the model that samples the views, and the positive and negative to sample it with.

    Raises:
        ValueError: no view, an empty conditioning, or an area or mask in one: the host would hand it to the others; a
            gradient step and a prompt without a phrase.
    """
    if not prompts:
        raise ValueError("An anagram needs at least one view; connect an Anagram View to 'views'.")
    if pull is not None:
        model = pulled_model(model, prompts)
    positive: list[Any] = []
    negative: list[Any] = []
    for index, prompt in enumerate(prompts):
        pair = tagged(own_controls(prompt), **{keys.VIEW_INDEX: index})
        for side, entries in zip((positive, negative), pair, strict=True):
            _refuse_areas(prompt, entries)
            side.extend(entries)
    patched = model.clone()
    wrapper = _predicting(tuple(prompts), combine, patched)
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, keys.VIEWS, wrapper)
    kind = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
    patched.add_wrapper_with_key(kind, keys.VIEWS, asking_for_room(times_the_rows(prompts)))
    sampling = _sampling(tuple(prompts), pull)
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, keys.VIEWS, sampling)
    return patched, positive, negative


def _refuse_areas(prompt: ViewPrompt, entries: list) -> None:
    for _, values in entries:
        named = next((key for key in ("area", "mask", "gligen") if values.get(key) is not None), None)
        if named:
            raise ValueError(
                f"The prompt of view '{prompt.view.name}' is bound to a part of the canvas ({named}), which the host "
                "would share out among all views here; use Anagram Guider with SamplerCustomAdvanced for that."
            )


def _predicting(prompts: tuple[ViewPrompt, ...], combine: Combine, patched: Any):
    """The wrapper around each prediction. It keeps nothing: the host's guider holds the conditionings of the run."""

    def wrapper(executor, x, timestep, model_options=None, seed=None):
        guider, options = executor.class_obj, model_options or {}
        for prompt in prompts:
            check_view(prompt.view, patched, x)
        check_own_cfg(prompts, guider.cfg, options)
        views = _views_of(guider, prompts, x)
        if (puller := options.get(keys.ANTI_SEGREGATOR)) is not None:
            x = puller(x, timestep, options)
        memory = options.get(keys.PREDICTION_MEMORY) or Memory()
        return executor(x, timestep, guide_views(guider.inner_model, views, combine, guider.cfg, options, memory), seed)

    return wrapper


def _sampling(prompts: tuple[ViewPrompt, ...], pull: Pull | None):
    """The wrapper around a whole sampling, which lays its memory and its gradient step into the options of this run."""

    def wrapper(executor, guider, sigmas, extra_args, callback, noise, latent=None, denoise_mask=None, *args, **kwargs):
        own = {keys.PREDICTION_MEMORY: Memory()}
        if pull is not None:
            views = zip(_views_of(guider, prompts, noise), prompts, strict=True)
            counted = [v for v, prompt in views if prompt.counted]
            own[keys.ANTI_SEGREGATOR] = puller_for(
                guider.inner_model, counted, pull, executor.class_obj, sigmas, denoise_mask
            )
        mine = {**extra_args, "model_options": {**extra_args["model_options"], **own}}
        return executor(guider, sigmas, mine, callback, noise, latent, denoise_mask, *args, **kwargs)

    return wrapper


def _views_of(guider: Any, prompts: Sequence[ViewPrompt], like: torch.Tensor) -> list[ViewConds]:
    """The views with the conditionings of this run, sorted out of those the host's guider holds."""
    return [
        ViewConds(
            prompt.view,
            _of_view(guider.conds.get("positive"), index, "positive"),
            _of_view(guider.conds.get("negative"), index, "negative"),
            None if prompt.known is None else known_latent(guider.inner_model, prompt.known, like),
        )
        for index, prompt in enumerate(prompts)
    ]


def _of_view(conds: Conds | None, index: int, side: str) -> Conds:
    """The entries of one view.

    Raises:
        ValueError: the sampler was given another conditioning.
    """
    own = [entry for entry in conds or () if entry.get(keys.VIEW_INDEX) == index]
    if not own:
        raise ValueError(
            f"The sampler's {side} holds no prompt for view {index + 1}; connect the {side} that comes out of "
            "Anagram for KSampler, together with its model."
        )
    return own
