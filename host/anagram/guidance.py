"""What the views guider and the model patch for the stock KSampler share: options under which one evaluation of the host
asks every view and hands on one combined answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch

from ...methods.anagram.prediction import Memory
from .. import keys
from ..engine.sampling import percent_of, signal_and_noise, step_of
from ..engine.vae import PIXEL_CHANNELS
from .views import Conds, ViewConds, answers_of, frames_of, in_frames, needs_own_frame, predict_views

Combine = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""All views' predictions to one positive and one negative, in the canonical frame. Called with the keywords ``x``,
``signal``, ``noise``, ``progress``, ``step``, ``positive``, ``negative`` (None without one), ``cfg`` and ``memory``."""


def check_latent(latent: Any) -> None:
    """Refuses what is no single latent with height and width: a pair of latents, packed by the host, or a sound.

    Raises:
        ValueError: what to use instead.
    """
    if getattr(latent, "is_nested", False) or latent.ndim < 4:
        raise ValueError(
            "Anagrams work on one picture's latent, not on a packed pair or a sound; use an ordinary Empty Latent Image."
        )


def check_view(view: Any, model_patcher: Any, latent: torch.Tensor) -> None:
    """Refuses a view that this model's latents or this canvas cannot take.

    Raises:
        ValueError: pixels only, resampled, not square, or parts that do not divide.
    """
    if view.latent == "finished pixels":
        raise ValueError(
            f"The view '{view.name}' resamples what it turns, and resampled noise is no noise the model knows; use Anagram "
            "Pixel Guider, which turns finished pixels, or 'inner_circle' and 'rings', which are exact."
        )
    channels = model_patcher.get_model_object("latent_format").latent_channels
    if view.latent == "pixels only" and channels != PIXEL_CHANNELS:
        raise ValueError(
            f"The view '{view.name}' moves single pixels, their brightness or their colour, which has no meaning on the "
            f"{channels} channels of this model's latents; use Anagram Pixel Guider, a model that works on "
            "pixels, or a view such as 'rotate_180' or 'patch_permute'."
        )
    check_latent(latent)
    view.check(*latent.shape[-2:])


def check_own_cfg(prompts: Sequence[Any], cfg: float, model_options: dict[str, Any]) -> None:
    """Refuses a view's own guidance scale where the sampler's leaves nothing to guide with: at 1 the host asks no negative
    (some samplers tell it to all the same), and at 0 no positive counts.

    Raises:
        ValueError: which view, and what to do.
    """
    skipped = math.isclose(cfg, 1.0) and not model_options.get("disable_cfg1_optimization", False)
    silenced = next((p for p in prompts if p.cfg not in (None, cfg)), None)
    if silenced is not None and (skipped or cfg == 0):
        raise ValueError(
            f"The view '{silenced.view.name}' has a cfg of its own, {silenced.cfg:g}, and the sampler's is {cfg:g}, at which "
            f"{'the positive prompts count for nothing' if cfg == 0 else 'no negative is asked'}; set the sampler's cfg to "
            "another number, such as 1.1 or 5, or the view's to 0."
        )


def known_latent(model: Any, latent: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A latent from a wire as the model sees clean latents, fit for a sampling that starts from this noise.

    Raises:
        ValueError: another size.
    """
    if latent.shape[1:] != noise.shape[1:] or len(latent) not in (1, len(noise)):
        raise ValueError(
            f"The reference's latent is {tuple(latent.shape)} and the picture's is {tuple(noise.shape)}; scale the "
            "reference picture to the canvas before VAE Encode."
        )
    return model.process_latent_in(latent.to(noise))


def times_the_rows(prompts: Sequence[Any]) -> int:
    """How many times as many rows these views are asked for as the host reckons with, a positive and a negative a picture."""
    return max(1, math.ceil(sum(len(p.positive) + len(p.negative) for p in prompts) / 2))


def guide_views(
    model: Any, views: Sequence[ViewConds], combine: Combine, cfg: float, model_options: dict[str, Any], memory: Memory
) -> dict[str, Any]:
    """A copy of the options under which the host's one evaluation is that of all views, combined.

    Positive and negative are combined apart in the canonical frame; the host's own cfg function then runs once, with
    every patch that hangs on it.
    """

    def views_batch(args: dict[str, Any]) -> list[torch.Tensor]:
        skip_negative = args["conds"][1] is None
        asked = [dataclasses.replace(v, negative=None) for v in views] if skip_negative else list(views)
        positive, negative = predict_views(model, asked, args["input"], args["sigma"], model_options)
        return combined(args["input"], args["sigma"], positive, None if skip_negative else negative)

    def combined(x, sigma, positive, negative=None):
        return _combined(model, combine, cfg, memory, x, sigma, model_options, positive, negative)

    routed = _answering_again(model_options, views, combined)
    routed["sampler_calc_cond_batch_function"] = views_batch
    return routed


def _answering_again(
    model_options: dict[str, Any], views: Sequence[ViewConds], combined: Callable[..., list[torch.Tensor]]
) -> dict[str, Any]:
    """A copy of the options for patches that run after guidance and ask the model again with the conditioning they are
    handed, which is that of all views: each view answers with its own entries in its own frame, and the answers are combined.

    A rectification or a view's own cfg then knows of no negative, for none is asked.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)

    def wrapper(executor, model, conds, x, sigma, model_options):
        def evaluate(conds, z, options):
            return executor(model, conds, z, sigma, options)

        def answer(cond):
            own = _by_view(cond, views)
            if not own:
                return evaluate([cond], x, in_frames(model_options, frames_of(views)))[0]
            return combined(x, sigma, answers_of(evaluate, own, x, model_options)[0])[0]

        if len(views) == 1 and not any(needs_own_frame(cond) for cond in conds):  # one call, as it would be without us
            return evaluate(conds, x, in_frames(model_options, frames_of(views)))
        return [answer(cond) for cond in conds]

    kind = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
    comfy.patcher_extension.add_wrapper_with_key(kind, keys.VIEWS, wrapper, options, is_model_options=True)
    return options


def _by_view(cond: Conds | None, views: Sequence[ViewConds]) -> list[ViewConds]:
    """A conditioning sorted out among the views; nothing unless it is of them all and of nobody else."""
    own = [[entry for entry in cond or () if entry["uuid"] in frames_of([v])] for v in views]
    if not all(own) or sum(map(len, own)) < len(cond or ()):
        return []
    return [dataclasses.replace(v, positive=entries, negative=None) for v, entries in zip(views, own, strict=True)]


def _combined(
    model: Any,
    combine: Combine,
    cfg: float,
    memory: Memory,
    x: torch.Tensor,
    sigma: torch.Tensor,
    options: dict[str, Any],
    positive: list[torch.Tensor],
    negative: list[torch.Tensor] | None,
) -> list[torch.Tensor]:
    """One positive and one negative prediction; without a negative the host expects zeros."""
    level = float(sigma.max())
    signal, noise = signal_and_noise(model.model_sampling, level)
    cond, uncond = combine(
        x=x, signal=signal, noise=noise, progress=percent_of(model.model_sampling, level),
        step=step_of(options.get("transformer_options", {}), level), positive=tuple(positive),
        negative=None if negative is None else tuple(negative), cfg=cfg, memory=memory,
    )  # fmt: skip
    return [cond, torch.zeros_like(cond) if uncond is None else uncond]
