"""Away from the other readings: in each view, what the other views show counts as something not to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import node_helpers

from .guider import ViewPrompt
from .views import UPRIGHT_ONLY


def contrasted(prompts: Sequence[ViewPrompt], strength: float) -> list[ViewPrompt]:
    """The prompts with the others' positives added to each negative, so that the host's negative prediction of view i is
    (u + strength · Σ oⱼ) / (1 + strength · (N − 1)), oⱼ the prediction of prompt j in view i.

    Areas, masks and controls of the other prompts stay behind: they are drawn for the other view. Views that a picture
    stands in for, and components, see the same picture from one side and are left alone. Strength 0 changes nothing.
    """
    free = [p for p in prompts if p.known is None and getattr(p.view, "component", None) is None]
    if strength == 0 or len(free) < 2:
        return list(prompts)
    away = [_bare(p.positive, strength) for p in free]
    return [
        replace(p, negative=[*p.negative, *(entry for q, own in zip(free, away, strict=True) if q is not p for entry in own)])
        if any(p is f for f in free) else p
        for p in prompts
    ]  # fmt: skip


def _bare(conditioning: list, strength: float) -> list:
    kept = [[cond, {k: v for k, v in values.items() if k not in UPRIGHT_ONLY}] for cond, values in conditioning]
    return node_helpers.conditioning_set_values(kept, {"strength": strength})
