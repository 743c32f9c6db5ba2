"""What other packs read of the rows of a call: 0 for a positive, 1 for a negative, whatever is evaluated at once.

The host numbers the conditionings of one evaluation. With several views or concepts that runs past 1, and packs that
read ``cond_or_uncond`` (image prompts, Self-Attention Guidance) know 0 and 1 only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

import torch

from ..types import Conds, ModelOptions, Options, TransformerOptions

FUNCTION_SLOT = "model_function_wrapper"
"""The model option in which a single function may stand around every model call."""

CondOrUncond = Mapping[UUID, int]
"""0 or 1 for every conditioning entry, by its uuid."""


def cond_or_uncond_of(*conds: Iterable[Conds | None]) -> dict[UUID, int]:
    """0 for the entries of the first group of conditionings, 1 for those of the second."""
    return {entry["uuid"]: number for number, group in enumerate(conds) for cond in group for entry in cond or ()}


def with_cond_or_uncond(
    conds: Sequence[Conds | None], model_options: ModelOptions, numbers: CondOrUncond
) -> tuple[list[Conds | None], ModelOptions]:
    """The conditionings and options of an evaluation in which other packs read these numbers.

    They read them in the options of a model call, in the arguments of a function around it, and in those of a
    ControlNet. An entry that is not listed keeps the host's number.
    """
    if all(numbers.get(entry["uuid"], n) == n for n, cond in enumerate(conds) for entry in cond or ()):
        return list(conds), model_options
    return _with_controls(conds, numbers), {**model_options, FUNCTION_SLOT: _function(model_options, numbers)}


def _renumbered(transformer_options: TransformerOptions, numbers: CondOrUncond) -> TransformerOptions:
    """A copy of the options of a model call with these numbers in it."""
    pairs = zip(transformer_options["uuids"], transformer_options["cond_or_uncond"], strict=True)
    return {**transformer_options, "cond_or_uncond": [numbers.get(uuid, number) for uuid, number in pairs]}


def _function(model_options: ModelOptions, numbers: CondOrUncond) -> Callable[..., torch.Tensor]:
    """A function around every model call, or around the one that another pack has put there."""
    other: Callable[..., torch.Tensor] | None = model_options.get(FUNCTION_SLOT)

    def around(apply_model: Callable[..., torch.Tensor], args: Options) -> torch.Tensor:
        options = _renumbered(args["c"]["transformer_options"], numbers)
        c = {**args["c"], "transformer_options": options}
        if other is None:
            return apply_model(args["input"], args["timestep"], **c)
        return other(apply_model, {**args, "c": c, "cond_or_uncond": options["cond_or_uncond"]})

    return around


def _with_controls(conds: Sequence[Conds | None], numbers: CondOrUncond) -> list[Conds | None]:
    """The conditionings with such controls. One control stays one object, or the host would split the call."""
    made: dict[int, _Control] = {}

    def of(entry: Options) -> Options:
        control = entry.get("control")
        return (
            entry if control is None else {**entry, "control": made.setdefault(id(control), _Control(control, numbers))}
        )

    return [cond and [of(entry) for entry in cond] for cond in conds]


class _Control:
    """A ControlNet that reads these numbers; everything else is the ControlNet's own."""

    def __init__(self, control: Any, numbers: CondOrUncond) -> None:
        self._control, self._numbers = control, numbers

    def get_control(
        self, x: torch.Tensor, t: torch.Tensor, cond: Options, batched_number: int, options: TransformerOptions
    ) -> object:
        own = _renumbered(options, self._numbers)
        return self._control.get_control(x, t, {**cond, "transformer_options": own}, batched_number, own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)
