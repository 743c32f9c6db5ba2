"""An edit: what a solved or trained erasure is, apart from any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .lowrank import LowRank, followed_by, total
from .targets import reaches

KEYS_AND_VALUES = ("k", "v")
"""Which projections of a cross-attention an edit of the text embedding goes to: both."""


def links(chained: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The specs (or reports) of the edits that were chained, first to last; of a single edit its own."""
    if "chain" not in chained:
        return [chained]
    return [link for part in chained["chain"] for link in links(part)]


@dataclass(frozen=True)
class Edit:
    """One erasure on a wire (``CONCEPTS_EDIT``). Nothing in it is ever changed; all tensors are float32 on the CPU.

    ``text`` is M of T = I + M, (d, d): every ``attn2.to_k`` and ``to_v`` weight W becomes W·T. ``pooled`` is the same for
    the pooled text embedding (SDXL). Trained edits have no common map: ``layers`` gives ΔW of single weights by the
    host's key, of the model (``diffusion_model.….weight``) or of the text encoder (``clip_l.…``, ``clip_g.…``), and
    ``diffs`` whole differences for what has no rank, such as biases.
    """

    text: LowRank | None = None
    pooled: LowRank | None = None
    layers: Mapping[str, LowRank] = field(default_factory=dict)
    diffs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    targets: tuple[str, ...] = KEYS_AND_VALUES
    """Which projections ``text`` goes to."""
    blocks: str = ""
    """A regular expression that a weight's key must match for ``text`` to go there; empty is every block."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """How it was made, in values JSON knows: concepts, anchors, solver, seeds, clip skip."""
    clip: tuple[float, ...] = ()
    """Fingerprint of the text encoder it was made with; empty is unknown."""
    base: tuple[float, ...] = ()
    """Fingerprint of the model it was made on."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, in values JSON knows."""

    @property
    def width(self) -> int | None:
        """Width of the text embedding the edit is for, or None where it only changes single weights."""
        return self.text.width if self.text is not None else None

    def specs(self) -> list[Mapping[str, Any]]:
        """What was asked for: one entry an edit, of a chain all of them."""
        return links(self.spec)

    def reports(self) -> list[Mapping[str, Any]]:
        """What was measured: one entry an edit, in the order of ``specs``."""
        return links(self.report)

    @property
    def empty(self) -> bool:
        """Whether the edit changes nothing at all."""
        maps = [m for m in (self.text, self.pooled, *self.layers.values()) if m is not None]
        return not any(m.rank for m in maps) and not self.diffs

    def on_clip(self) -> dict[str, LowRank]:
        """The part of ``layers`` that belongs to the text encoder."""
        return {key: m for key, m in self.layers.items() if not key.startswith("diffusion_model.")}

    def on_model(self) -> dict[str, LowRank]:
        """The part of ``layers`` that belongs to the model."""
        return {key: m for key, m in self.layers.items() if key.startswith("diffusion_model.")}


def chain(first: Edit, second: Edit) -> Edit:
    """Both edits as one, ``first`` applied before ``second``: the same weights as applying one after the other.

    Raises:
        ValueError: the maps are for embeddings of different width, or go to different projections.
    """
    if first.empty or second.empty:
        return second if first.empty else first
    if first.text is not None and second.text is not None:
        if first.width != second.width:
            raise ValueError(
                f"One edit is for text embeddings of width {first.width}, the other for {second.width}; chain edits of "
                "one family of models."
            )
        if (first.targets, first.blocks) != (second.targets, second.blocks):
            raise ValueError(
                "The edits go to different weights (keys or values, or other blocks), so that no single edit equals "
                "both; use Apply Erasure twice instead."
            )
    lead = first if first.text is not None else second
    return replace(
        lead,
        text=_both(first.text, second.text),
        pooled=_both(first.pooled, second.pooled),
        layers=_layers(first, second),
        diffs=_diffs(first.diffs, second.diffs),
        clip=first.clip or second.clip,
        base=first.base or second.base,
        spec={"chain": [*first.specs(), *second.specs()]},
        report={"chain": [*first.reports(), *second.reports()]},
    )


def _both(first: LowRank | None, second: LowRank | None) -> LowRank | None:
    if first is None or second is None:
        return first if second is None else second
    return followed_by(first, second)


def _layers(first: Edit, second: Edit) -> dict[str, LowRank]:
    """ΔW of single weights: those of ``first`` are seen through the map of ``second`` where that reaches them."""
    merged = {key: _through(key, delta, second) for key, delta in first.layers.items()}
    for key, delta in second.layers.items():
        merged[key] = total(merged[key], delta) if key in merged else delta
    return merged


def _through(key: str, delta: LowRank, edit: Edit) -> LowRank:
    if edit.text is None or not reaches(key, edit.targets, edit.blocks):
        return delta
    return LowRank(delta.up, delta.down + (delta.down @ edit.text.up) @ edit.text.down)


def _diffs(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    merged = dict(first)
    for key, difference in second.items():
        merged[key] = merged[key] + difference if key in merged else difference
    return merged
