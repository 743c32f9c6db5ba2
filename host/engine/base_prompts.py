"""Base prompts that the concepts of a picture can share a model call with."""

from __future__ import annotations

from typing import NamedTuple

from ..types import Conditioning

_NOT_IN_ONE_CALL = {
    "area": "an area (Conditioning (Set Area))",
    "mask": "a mask (Conditioning (Set Mask))",
    "gligen": "GLIGEN boxes",
    "hooks": "LoRA hooks",
    "default": "a default conditioning",
}


class BasePrompts(NamedTuple):
    """The prompts of the whole picture, and the guidance scale that weighs them."""

    positive: Conditioning
    negative: Conditioning
    cfg: float


def check_base_prompts(positive: Conditioning, negative: Conditioning) -> None:
    """Refuses base prompts that need separate model calls.

    Raises:
        ValueError: an empty conditioning, or one with areas, masks, GLIGEN or hooks.
    """
    for name, conds in (("positive", positive), ("negative", negative)):
        if not conds:
            raise ValueError(f"The {name} prompt is empty; connect a CLIP Text Encode (its text may be empty).")
        if what := needs_own_call(conds):
            raise ValueError(
                f"The {name} prompt has {what}, which would split the one model call of all concepts; use the regions "
                "of the concepts to say where things are."
            )


def needs_own_call(conditioning: Conditioning) -> str | None:
    """What the entries carry that the host evaluates in a model call of its own, in words; None if nothing."""
    for _, values in conditioning:
        for key, what in _NOT_IN_ONE_CALL.items():
            if values.get(key) is not None:
                return what
    return None
