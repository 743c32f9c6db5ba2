"""The views of one noisy picture, evaluated in one batched call.

Each view has its own conditioning. Its rows of the batch are shown to the model in the view's frame and brought back to
the canonical frame at once, so samplers, inpainting and img2img never notice. The uuid that the host gives every
conditioning entry tells the rows apart; rows of other conditionings pass untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from uuid import UUID

import comfy.samplers
import node_helpers
import torch

from ...methods.anagram.views import View
from .. import keys
from ..engine import base_prompts
from ..engine.cond_or_uncond import CondOrUncond, cond_or_uncond_of, with_cond_or_uncond
from ..engine.model_call import ModelCall, RunCall, around_model_call, conditioning_rows
from ..text.equal_lengths import with_equal_lengths
from ..types import BaseModel, Conditioning, Conds, ModelOptions

PROMPT_TYPES = ("positive", "negative")

UPRIGHT_ONLY = ("area", "mask", "control", "gligen", "hooks")
"""Entries of a conditioning that are drawn in the view's upright frame, or that need a model call of their own."""

_BOUNDS = {"area", "mask", "timestep_start", "timestep_end"}
_STRENGTHS = ("strength", "mask_strength")
"""What an entry says of where, when, and how much it counts."""


@dataclass(frozen=True)
class ViewPrompt:
    """One view of a picture and the CONDITIONINGs that describe it.

    Attributes:
        reference_latent: a clean latent, as it travels on a wire, that takes the place of the prompt,
            (1 or batch, channels, …, height, width).
        cfg: the view's own guidance scale, None for the sampler's.
        weight: how much the view counts. A view of weight 0 is shown only: contrast and gradient step leave it out.
        contrasted: whether the negative holds the other views' prompts.
    """

    view: View
    positive: Conditioning
    negative: Conditioning
    reference_latent: torch.Tensor | None = None
    cfg: float | None = None
    weight: float = 1.0
    contrasted: bool = False

    @property
    def has_weight(self) -> bool:
        return self.weight > 0


@dataclass(frozen=True)
class ViewConds:
    """A view with its processed conditionings; ``negative`` is None where the host skips the negative (cfg 1).

    ``reference_latent`` is a clean latent, (1 or batch, …), that takes the place of the prediction; nothing is
    evaluated then. ``weight`` is that of its ``ViewPrompt``.
    """

    view: View
    positive: Conds
    negative: Conds | None
    reference_latent: torch.Tensor | None = None
    weight: float = 1.0


def check_latent(latent: torch.Tensor) -> None:
    """Refuses anything but a single latent with height and width: a pair of latents, packed by the host, or a sound.

    Raises:
        ValueError: what to use instead.
    """
    if getattr(latent, "is_nested", False) or latent.ndim < 4:
        raise ValueError(
            "Anagrams work on one picture's latent, not on a packed pair or a sound; use an ordinary Empty Latent "
            "Image."
        )


def tagged_prompt(prompt: ViewPrompt, **values: object) -> tuple[Conditioning, Conditioning]:
    """Positive and negative of a view with the host's ``prompt_type``, and any further values, in every entry.

    Raises:
        ValueError: one of them is empty.
    """
    if not prompt.positive or not prompt.negative:
        raise ValueError(
            f"The view '{prompt.view.name}' has an empty conditioning, so there is nothing to draw; "
            "connect a CLIP Text Encode to it (its text may be empty)."
        )
    return (
        node_helpers.conditioning_set_values(prompt.positive, {"prompt_type": "positive", **values}),
        node_helpers.conditioning_set_values(prompt.negative, {"prompt_type": "negative", **values}),
    )


def own_controls(prompt: ViewPrompt) -> ViewPrompt:
    """The view with the controls of its positive on its own negative too, where Apply ControlNet wants that."""
    positive, negative = base_prompts.own_controls(prompt.positive, prompt.negative)
    if positive is prompt.positive:
        return prompt
    return replace(prompt, positive=positive, negative=negative)


def conds_of_view(
    model: BaseModel, prompt: ViewPrompt, positive: Conds, negative: Conds | None, noise: torch.Tensor
) -> ViewConds:
    """The view with these conditionings, and its reference as the model sees clean latents.

    Raises:
        ValueError: the reference has another size than the noise.
    """
    latent = prompt.reference_latent
    if latent is None:
        return ViewConds(prompt.view, positive, negative, weight=prompt.weight)
    if latent.shape[1:] != noise.shape[1:] or len(latent) not in (1, len(noise)):
        raise ValueError(
            f"The reference's latent is {tuple(latent.shape)} and the picture's is {tuple(noise.shape)}; scale the "
            "reference picture to the canvas before VAE Encode."
        )
    return ViewConds(prompt.view, positive, negative, model.process_latent_in(latent.to(noise)), prompt.weight)


def needs_own_frame(conds: Conds | None) -> bool:
    """Whether a conditioning holds something that lives in the view's frame (area, mask, ControlNet, …)."""
    return any(entry.get(key) is not None for entry in conds or () for key in UPRIGHT_ONLY)


def extent_of(view: ViewConds, turned: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor | None:
    """Where any of a view's positive entries counts at this noise level, as the host reckons; None is everywhere.

    Args:
        turned: a latent in the view's frame, (batch, channels, …, height, width).

    Returns:
        True and false in the view's frame, shaped like ``turned``. All false outside of the entries' sampling percents.
    """
    if view.reference_latent is not None or not all(_BOUNDS & entry.keys() for entry in view.positive):
        return None
    counts = torch.zeros_like(turned)
    for entry in view.positive:
        bounds = {key: entry[key] for key in (*_BOUNDS, *_STRENGTHS) if key in entry}
        found = comfy.samplers.get_area_and_mult({**bounds, "model_conds": {}, "uuid": entry["uuid"]}, turned, sigma)
        if found is not None:
            inside, area = counts, found.area or ()
            for axis in range(len(area) // 2):
                inside = inside.narrow(axis + 2, area[axis + len(area) // 2], area[axis])
            inside += found.mult
    return counts != 0


def in_canonical_frame(view: View, where: torch.Tensor) -> torch.Tensor:
    """True and false of a view's frame in the canonical one. Views that change signs change none of it."""
    return view.inverse(where.float()).abs() > 0.5


Evaluate = Callable[[list[Conds | None], torch.Tensor, ModelOptions], list[torch.Tensor]]
"""A batched evaluation at one sigma: conditionings, latent and options to one denoised prediction per conditioning."""

PredictionPairs = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Positive and negative predictions, one of each per view."""


def in_one_call(
    model: BaseModel,
    views: Sequence[ViewConds],
    conds: list[Conds | None],
    x: torch.Tensor,
    sigma: torch.Tensor,
    options: ModelOptions,
) -> tuple[list[Conds | None], ModelOptions]:
    """Prompts of one length, so that all views share a call. A view alone stays as it would be without us."""
    return with_equal_lengths(model, conds, x, sigma, options) if len(views) > 1 else (conds, options)


def predict_views(
    evaluate: Evaluate,
    views: Sequence[ViewConds],
    x: torch.Tensor,
    model_options: ModelOptions,
    numbers: CondOrUncond | None = None,
) -> PredictionPairs:
    """The denoised predictions of every view, each brought back to the canonical frame.

    Args:
        x: the noisy latent in the canonical frame, (batch, channels, …, height, width).
        numbers: what other packs read of the entries, 0 or 1; None stands for positives and negatives.

    Returns:
        Positive and negative predictions, shaped like ``x``. (Without a negative, zeros, as the host gives them.)
    """
    prompted = [v for v in views if v.reference_latent is None]
    both = cond_or_uncond_of((v.positive for v in views), (v.negative for v in views)) if numbers is None else numbers

    def evaluate_numbered(conds: list[Conds | None], z: torch.Tensor, options: ModelOptions) -> list[torch.Tensor]:
        own, options = with_cond_or_uncond(conds, options, both)
        return evaluate(own, z, options)

    predicted = (
        zip(*_predict_prompted(evaluate_numbered, prompted, x, model_options), strict=True) if prompted else iter(())
    )
    pairs = [
        next(predicted) if v.reference_latent is None else (v.reference_latent.to(x).expand_as(x),) * 2 for v in views
    ]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _predict_prompted(
    evaluate: Evaluate, views: Sequence[ViewConds], x: torch.Tensor, model_options: ModelOptions
) -> PredictionPairs:
    """The predictions of views with a prompt."""
    if any(needs_own_frame(c) for v in views for c in (v.positive, v.negative)):
        return _predict_one_by_one(evaluate, views, x, model_options)
    out = evaluate(
        [*(v.positive for v in views), *(v.negative for v in views)], x, in_frames(model_options, frames_of(views))
    )
    return out[: len(views)], out[len(views) :]


def frames_of(views: Sequence[ViewConds]) -> dict[UUID, View]:
    """The view of every conditioning entry, by the entry's uuid."""
    return {entry["uuid"]: v.view for v in views for entry in chain(v.positive, v.negative or ())}


def _predict_one_by_one(
    evaluate: Evaluate, views: Sequence[ViewConds], x: torch.Tensor, model_options: ModelOptions
) -> PredictionPairs:
    """One evaluation per view on the transformed latent itself: ControlNet hints, masks and areas then lie as drawn."""
    positive, negative = [], []
    for v in views:
        options = in_frames(model_options, frames_of([v]), latent_is_turned=True)
        pair = evaluate([v.positive, v.negative], v.view.forward(x).contiguous(), options)
        positive.append(v.view.inverse(pair[0]))
        negative.append(v.view.inverse(pair[1]))
    return positive, negative


def in_frames(model_options: ModelOptions, frames: Mapping[UUID, View], latent_is_turned: bool = False) -> ModelOptions:
    """A copy of the options under which the model sees the rows of an entry in the view that ``frames`` names for it.

    Args:
        latent_is_turned: the latent is in the view's frame already and the output stays there. Only what the host adds
            to the latent (the picture of an inpainting model) is transformed.
    """

    def call_in_frames(call: ModelCall, run: RunCall) -> torch.Tensor:
        entries = conditioning_rows(call.transformer_options, len(call.x))
        views = [(entry.rows, frames.get(entry.uuid)) for entry in entries]
        if not any(view for _, view in views):
            return run(call)
        if call.c_concat is not None:
            call = call._replace(c_concat=_by_rows(call.c_concat, views, "forward"))
        if latent_is_turned:
            return run(call)
        return _by_rows(run(call._replace(x=_by_rows(call.x, views, "forward"))), views, "inverse")

    return around_model_call(model_options, keys.VIEWS, call_in_frames)


def _by_rows(x: torch.Tensor, views: Sequence[tuple[slice, View | None]], direction: str) -> torch.Tensor:
    """Each view applied to its rows of the batch."""
    return torch.cat([x[rows] if view is None else getattr(view, direction)(x[rows]) for rows, view in views])
