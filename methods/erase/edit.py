"""An edit: what a solved or trained erasure is, apart from any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from .lowrank import LowRank, followed_by, total
from .records import EditReport, EditSpec, links
from .targets import reaches

KEYS_AND_VALUES = ("k", "v")
"""Both projections of a cross-attention that read the text embedding."""
NOTHING = "nothing"
"""The text embedding is the conditioning itself."""


@dataclass(frozen=True)
class Edit:
    """One erasure on a wire (``CONCEPTS_EDIT``). It is never changed; all tensors are float32 on the CPU.

    ``text`` is M of T = I + M, (d, d): every ``attn2.to_k`` and ``to_v`` weight W becomes W·T. On transformers the
    weights are those of ``entry``. ``pooled`` is the same for the pooled text embedding.

    Trained edits have no common map. ``layers`` gives ΔW of single weights by the host's key: those of the model
    (``diffusion_model.….weight``) or of the text encoder (``clip_l.…``, ``clip_g.…``). ``diffs`` gives whole
    differences for what has no rank, such as biases.
    """

    text: LowRank | None = None
    pooled: LowRank | None = None
    layers: Mapping[str, LowRank] = field(default_factory=dict)
    diffs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    targets: tuple[str, ...] = KEYS_AND_VALUES
    """The projections that ``text`` changes."""
    blocks: str = ""
    """A regular expression: ``text`` changes only weights whose key contains a match. Empty means every block."""
    spec: EditSpec = field(default_factory=EditSpec)
    """How it was made: concepts, anchors, solver, seeds, CLIP skip."""
    clip: tuple[float, ...] = ()
    """Fingerprint of the text encoder it was made with; empty if unknown."""
    base: tuple[float, ...] = ()
    """Fingerprint of the model it was made on."""
    report: EditReport = field(default_factory=EditReport)
    """What was measured."""
    entry: tuple[str, ...] = ()
    """The weights that ``text`` changes on a transformer, by the host's key: the first that the text meets. Empty means
    a UNet's."""
    through: str = NOTHING
    """What lies between the conditioning and these weights; only behind nothing does T act on conditionings too."""

    @property
    def width(self) -> int | None:
        """Width of the text embedding the edit is for, or None where it only changes single weights."""
        return self.text.width if self.text is not None else None

    def reads_text(self, key: str) -> bool:
        """Whether ``text`` changes this weight."""
        return key in self.entry if self.entry else reaches(key, self.targets, self.blocks)

    def specs(self) -> list[EditSpec]:
        """How each edit of a chain was made, first to last; a single edit has one entry."""
        return links(self.spec)

    def reports(self) -> list[EditReport]:
        """What was measured, in the order of ``specs``."""
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
    _check_chainable(first, second)
    lead = first if first.text is not None else second
    return replace(
        lead,
        text=_chained_maps(first.text, second.text),
        pooled=_chained_maps(first.pooled, second.pooled),
        layers=_chained_layers(first, second),
        diffs=_summed_diffs(first.diffs, second.diffs),
        clip=first.clip or second.clip,
        base=first.base or second.base,
        spec={"chain": [*first.specs(), *second.specs()]},
        report={"chain": [*first.reports(), *second.reports()]},
    )


def _check_chainable(first: Edit, second: Edit) -> None:
    if first.text is None or second.text is None:
        return
    if first.width != second.width:
        raise ValueError(
            f"One edit is for text embeddings of width {first.width}, the other for {second.width}; chain edits of "
            "one family of models."
        )
    if _place(first) != _place(second):
        raise ValueError(
            "The edits go to different weights (keys or values, or other blocks), so no single edit equals both; use "
            "Apply Erasure twice instead."
        )


def _place(edit: Edit) -> tuple[object, ...]:
    return edit.targets, edit.blocks, edit.entry, edit.through


def _chained_maps(first: LowRank | None, second: LowRank | None) -> LowRank | None:
    if first is None or second is None:
        return first if second is None else second
    return followed_by(first, second)


def _chained_layers(first: Edit, second: Edit) -> dict[str, LowRank]:
    """ΔW of single weights. The map of ``second`` also acts on what ``first`` added to a weight: Δ becomes ΔT."""
    merged = {key: _delta_before_map(key, delta, second) for key, delta in first.layers.items()}
    for key, delta in second.layers.items():
        merged[key] = total(merged[key], delta) if key in merged else delta
    return merged


def _delta_before_map(key: str, delta: LowRank, edit: Edit) -> LowRank:
    if edit.text is None or not edit.reads_text(key):
        return delta
    return LowRank(delta.up, delta.down + (delta.down @ edit.text.up) @ edit.text.down)


def _summed_diffs(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    merged = dict(first)
    for key, difference in second.items():
        merged[key] = merged[key] + difference if key in merged else difference
    return merged
