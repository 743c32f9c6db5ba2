"""Contrast: each view is guided away from what the other views show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import node_helpers

from ..engine.base_prompts import WORDS
from ..types import Conditioning, Options
from .views import UPRIGHT_ONLY, ViewPrompt, own_controls

_BOUND_TO_VIEW = (*UPRIGHT_ONLY, "mask_strength", "set_area_to_bounds", "control_apply_to_uncond")
"""The values of an entry that belong to its view: where on the canvas it counts, and what steers it there."""
_SHARED = ("area", "mask", "set_area_to_bounds", "control", "hooks")
"""Those of them that fit any text; a GLIGEN box has its own text."""
_OF_PROMPT = (*WORDS, "start_percent", "end_percent", "clip_start_percent", "clip_end_percent", "strength")
"""The values that go with a prompt wherever it is read: its words, and when they count."""


def contrasted_prompts(prompts: Sequence[ViewPrompt], strength: float) -> list[ViewPrompt]:
    """The prompts with the others' positives added to each negative.

    The host's negative prediction of view i is then (u + strength · Σ oⱼ) / (1 + strength · (N − 1)). Here oⱼ is the
    prediction of prompt j in view i.

    Left out is what stands beside the others' words, since it is made for another view: areas, masks, controls, hooks,
    the picture of an inpainting model. This view's own takes its place, or guidance away from the others would also be
    guidance towards its control. Left alone are views with a reference, views without weight, and components, which see
    the same picture from one side. Strength 0 changes nothing.
    """
    free = [
        i for i, p in enumerate(prompts) if p.has_weight and p.reference_latent is None and p.view.component is None
    ]
    if strength == 0 or len(free) < 2:
        return list(prompts)
    out = list(prompts)
    for i in free:
        others = [entry for j in free if j != i for entry in prompts[j].positive]
        out[i] = _guided_away(own_controls(prompts[i]), others, strength)
    return out


def _guided_away(prompt: ViewPrompt, others: Conditioning, strength: float) -> ViewPrompt:
    """The view with the other entries in its negative, bound to this view's places."""
    bare = [[cond, {k: v for k, v in values.items() if k in _OF_PROMPT}] for cond, values in others]
    away = [
        entry
        for binding in _bindings(prompt, strength)
        for entry in node_helpers.conditioning_set_values(bare, binding)
    ]
    return replace(prompt, negative=[*prompt.negative, *away], contrasted=True)


def _bindings(prompt: ViewPrompt, strength: float) -> list[Options]:
    """The places and controls of the view's own entries, each once, with the strength of another entry there.

    Entries for the whole canvas share the strength out, and entries for a part of it are then passed over: the whole
    covers them. Where there are only parts, such as a left and a right one, each has full strength in its place.
    """
    found: dict[tuple[object, ...], Options] = {}
    for _, values in prompt.positive:
        own = {key: values[key] for key in _SHARED if values.get(key) is not None}
        beside = {k: v for k, v in values.items() if k not in (*_BOUND_TO_VIEW, *_OF_PROMPT)}
        found.setdefault(tuple((k, tuple(v) if k == "area" else id(v)) for k, v in own.items()), {**beside, **own})
    whole = [own for own in found.values() if "area" not in own and "mask" not in own]
    share = strength / max(len(whole), 1)
    return [{**own, "strength": share} for own in whole or found.values()]
