"""Asking the model in several views of one noisy picture, in one batched call.

Each view has its own conditioning. Its rows of the batch are shown to the model in the view's frame and brought back
to the canonical frame at once, so samplers, inpainting and img2img never notice. Rows are told apart by the uuid the
host gives every conditioning entry; rows of other conditionings pass untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch

from .. import keys

Conds = list[dict[str, Any]]
"""One conditioning as the sampler holds it."""


class Invertible(Protocol):
    """What a view is here: two transforms of the last two dimensions."""

    @property
    def forward(self) -> Callable[[torch.Tensor], torch.Tensor]: ...
    @property
    def inverse(self) -> Callable[[torch.Tensor], torch.Tensor]: ...


@dataclass(frozen=True)
class ViewConds:
    """A view with its processed conditionings; ``negative`` is None where the host skips the negative (cfg 1).

    ``known`` is a clean latent, (1 or batch, …), that stands in for the model's answer in this view; nothing is asked then.
    """

    view: Invertible
    positive: Conds
    negative: Conds | None
    known: torch.Tensor | None = None


# entries of a conditioning that are drawn in the view's upright frame, or that need a model call of their own
UPRIGHT_ONLY = ("area", "mask", "control", "gligen", "hooks")


def needs_own_frame(conds: Conds | None) -> bool:
    """Whether a conditioning holds something that lives in the view's frame (area, mask, ControlNet, …)."""
    return any(entry.get(key) is not None for entry in conds or () for key in UPRIGHT_ONLY)


Evaluate = Callable[[list[Conds | None], torch.Tensor, dict[str, Any]], list[torch.Tensor]]
"""A host's batched evaluation at one noise level: conditionings, latent and options to one denoised prediction for each."""


def predict_views(
    model: Any, views: Sequence[ViewConds], x: torch.Tensor, sigma: torch.Tensor, model_options: dict[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The denoised predictions of every view, each brought back to the canonical frame.

    Args:
        x: the noisy latent in the canonical frame, (batch, channels, …, height, width).

    Returns:
        Positive and negative predictions, one of each a view, shaped like ``x``. (Without a negative, zeros, as the host.)
    """
    return answers_of(lambda conds, z, options: _evaluate(model, conds, z, sigma, options), views, x, model_options)


def answers_of(
    evaluate: Evaluate, views: Sequence[ViewConds], x: torch.Tensor, model_options: dict[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same of any evaluation."""
    asked = [v for v in views if v.known is None]
    answers = zip(*_predict_asked(evaluate, asked, x, model_options), strict=True) if asked else iter(())
    pairs = [next(answers) if v.known is None else (v.known.to(x).expand_as(x),) * 2 for v in views]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _predict_asked(evaluate, views, x, model_options):
    """The predictions of views that the model is asked for."""
    if any(needs_own_frame(c) for v in views for c in (v.positive, v.negative)):
        return _predict_one_by_one(evaluate, views, x, model_options)
    conds = [v.positive for v in views] + [v.negative for v in views]
    out = evaluate(conds, x, in_frames(model_options, frames_of(views)))
    return out[: len(views)], out[len(views) :]


def frames_of(views: Sequence[ViewConds]) -> dict[Any, Invertible]:
    """The view of every conditioning entry, by the entry's uuid."""
    return {entry["uuid"]: v.view for v in views for conds in (v.positive, v.negative) for entry in conds or ()}


def _predict_one_by_one(evaluate, views, x, model_options):
    """A model call a view on the turned latent itself: ControlNet hints, masks and areas then lie as they were drawn."""
    positive, negative = [], []
    for v in views:
        options = in_frames(model_options, frames_of([v]), latent_is_turned=True)
        pair = evaluate([v.positive, v.negative], v.view.forward(x).contiguous(), options)
        positive.append(v.view.inverse(pair[0]))
        negative.append(v.view.inverse(pair[1]))
    return positive, negative


def _evaluate(model, conds, x, sigma, model_options):
    """The host's batched evaluation, or whatever another pack put in its single slot."""
    other = model_options.get("sampler_calc_cond_batch_function")
    if other is None:
        return comfy.samplers.calc_cond_batch(model, conds, x, sigma, model_options)
    return other({"conds": conds, "input": x, "sigma": sigma, "model": model, "model_options": model_options})


def in_frames(
    model_options: dict[str, Any], frames: Mapping[Any, Invertible], latent_is_turned: bool = False
) -> dict[str, Any]:
    """A copy of the options under which rows whose uuid is in ``frames`` are shown to the model in that view.

    Args:
        latent_is_turned: the latent is in the view's frame already, and so shall the answer be; only what the host puts
            beside it (the picture of an inpainting model) is still to be turned.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        rows = [frames.get(uuid) for uuid in (transformer_options or {}).get("uuids", ())]
        if not any(rows):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        if c_concat is not None:
            c_concat = _by_row(c_concat, rows, "forward")
        if latent_is_turned:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        x = _by_row(x, rows, "forward")
        out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        return _by_row(out, rows, "inverse")

    comfy.patcher_extension.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.APPLY_MODEL, keys.VIEWS, wrapper, options, is_model_options=True
    )
    return options


def _by_row(x: torch.Tensor, rows: Sequence[Invertible | None], direction: str) -> torch.Tensor:
    """Applies each row's view to its chunk of the batch."""
    chunks = x.chunk(len(rows))
    return torch.cat(
        [chunk if view is None else getattr(view, direction)(chunk) for chunk, view in zip(chunks, rows, strict=True)]
    )
