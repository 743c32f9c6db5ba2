"""The model call: a wrapper around it, the rows of its batch, and the host's batched evaluation that makes the calls.

The host evaluates all conditionings of a step at once and cuts them into model calls. Only their ids tell which rows of
a call belong to which conditioning entry: a position says nothing, since the host sorts them, splits them and adds
others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from uuid import UUID

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch

from ..types import BaseModel, Conds, EvaluationArguments, Executor, ModelOptions, TransformerOptions

EVALUATION_SLOT = "sampler_calc_cond_batch_function"
"""The model option in which a single function may replace the host's batched evaluation."""

Evaluation = Callable[[EvaluationArguments], list[torch.Tensor]]
"""A function for that slot: one denoised prediction per conditioning."""


class ModelCall(NamedTuple):
    """The arguments of one model call. ``call._replace(x=…)`` is the call with another latent.

    ``x`` is (rows, channels, …, height, width); ``c_concat`` holds what an inpainting model sees next to it, ``others``
    the further conditioning by the host's names.
    """

    x: torch.Tensor
    timestep: torch.Tensor
    c_concat: torch.Tensor | None
    c_crossattn: torch.Tensor | None
    control: object
    transformer_options: TransformerOptions
    others: Mapping[str, object]


RunCall = Callable[[ModelCall], torch.Tensor]
"""Makes a model call and returns its output, shaped like ``x``."""


def around_model_call(
    model_options: ModelOptions, key: str, fn: Callable[[ModelCall, RunCall], torch.Tensor]
) -> ModelOptions:
    """A copy of the options under which every model call is ``fn(call, run)``.

    Args:
        key: of ``host.keys``. Wrappers under one key add up.
        fn: returns ``run(call)``, or the output of a changed call, or a changed output.
    """

    def wrapper(executor: Executor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return fn(_model_call(*args, **kwargs), lambda call: executor(*call[:-1], **call.others))

    options = comfy.model_patcher.create_model_options_clone(model_options)
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    comfy.patcher_extension.add_wrapper_with_key(kind, key, wrapper, options, is_model_options=True)
    return options


def _model_call(
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: torch.Tensor | None = None,
    c_crossattn: torch.Tensor | None = None,
    control: object = None,
    transformer_options: TransformerOptions | None = None,
    **others: object,
) -> ModelCall:
    """The arguments as the host passes them, by position or by name."""
    options = {} if transformer_options is None else transformer_options
    return ModelCall(x, t, c_concat, c_crossattn, control, options, others)


class EntryRows(NamedTuple):
    """The rows of a model call that belong to one conditioning entry."""

    uuid: UUID
    rows: slice


def conditioning_rows(transformer_options: TransformerOptions, batch: int) -> list[EntryRows]:
    """Which rows of a model call, or of an attention in it, belong to which conditioning entry.

    Args:
        batch: the number of rows.

    Returns:
        All entries in the order of their rows, those of other nodes among them. Empty if the host names none.
    """
    uuids = transformer_options.get("uuids") or ()
    size = batch // max(len(uuids), 1)
    return [EntryRows(uuid, slice(n * size, (n + 1) * size)) for n, uuid in enumerate(uuids)]


def active_entries(conds: Conds, sigma: torch.Tensor) -> Conds:
    """The entries that the host evaluates at this sigma: the percents of others are not reached yet, or are over."""
    return [
        entry
        for entry in conds
        if not ("timestep_start" in entry and bool(sigma[0] > entry["timestep_start"]))
        and not ("timestep_end" in entry and bool(sigma[0] < entry["timestep_end"]))
    ]


def evaluate(
    model: BaseModel, conds: list[Conds | None], x: torch.Tensor, sigma: torch.Tensor, model_options: ModelOptions
) -> list[torch.Tensor]:
    """The host's batched evaluation, or that of another pack in the host's single slot.

    Args:
        conds: a None gets a prediction of zeros.
        x: the noisy latent, (batch, channels, …, height, width).

    Returns:
        One denoised prediction per conditioning, shaped like ``x``.
    """
    other: Evaluation | None = model_options.get(EVALUATION_SLOT)
    if other is None:
        return comfy.samplers.calc_cond_batch(model, conds, x, sigma, model_options)
    return other({"conds": conds, "input": x, "sigma": sigma, "model": model, "model_options": model_options})


def with_evaluation(model_options: ModelOptions, evaluation: Evaluation) -> ModelOptions:
    """A copy of the options with our function in the single slot.

    To chain another pack's, call ``evaluate`` inside it with the options as they were.
    """
    return {**model_options, EVALUATION_SLOT: evaluation}
