"""Away from the other readings: in each view, what the other views show counts as something not to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import node_helpers

from .guider import ViewPrompt, own_controls
from .views import UPRIGHT_ONLY

_DRAWN = (*UPRIGHT_ONLY, "mask_strength", "set_area_to_bounds", "control_apply_to_uncond")
"""What an entry says of its own view: where on the canvas it counts, and what steers it there."""
_KEPT = ("area", "mask", "set_area_to_bounds", "control", "hooks")
"""What of it holds for any text; a GLIGEN box has a text of its own."""


def contrasted(prompts: Sequence[ViewPrompt], strength: float) -> list[ViewPrompt]:
    """The prompts with the others' positives added to each negative, so that the host's negative prediction of view i is
    (u + strength · Σ oⱼ) / (1 + strength · (N − 1)), oⱼ the prediction of prompt j in view i.

    Areas, masks, controls and hooks of the other prompts stay behind, for they are made for the other view; this view's own
    take their place, or guidance away from the others would also be guidance towards its control. Views that a picture
    stands in for, and components, see the same picture from one side and are left alone, and so are views that do not count.
    Strength 0 changes nothing.
    """
    free = [
        i for i, p in enumerate(prompts) if p.counted and p.known is None and getattr(p.view, "component", None) is None
    ]
    if strength == 0 or len(free) < 2:
        return list(prompts)
    out = list(prompts)
    for i in free:
        others = [entry for j in free if j != i for entry in prompts[j].positive]
        out[i] = _away_from(others, own_controls(prompts[i]), strength)
    return out


def _away_from(others: list, prompt: ViewPrompt, strength: float) -> ViewPrompt:
    """The view with the other entries in its negative, as they would be asked in this view."""
    bare = [[cond, {k: v for k, v in values.items() if k not in _DRAWN}] for cond, values in others]
    away = [e for drawn in _drawn(prompt, strength) for e in node_helpers.conditioning_set_values(bare, drawn)]
    return replace(prompt, negative=[*prompt.negative, *away])


def _drawn(prompt: ViewPrompt, strength: float) -> list[dict[str, Any]]:
    """What the view's own entries are bound to and steered by, each once, with the strength of another entry under it.

    Entries for the whole canvas share the strength out. Beside them those of a part of it are passed over: the whole covers
    it. Where there are only parts, such as a left and a right one, each is of full strength in its place.
    """
    found: dict[Any, dict[str, Any]] = {}
    for _, values in prompt.positive:
        own = {key: values[key] for key in _KEPT if values.get(key) is not None}
        found.setdefault(tuple((k, tuple(v) if k == "area" else id(v)) for k, v in own.items()), own)
    whole = [own for own in found.values() if "area" not in own and "mask" not in own]
    share = strength / max(len(whole), 1)
    return [{**own, "strength": share} for own in whole or found.values()]
