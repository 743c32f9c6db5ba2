"""What an edit says about itself: how it was made (``EditSpec``) and what was measured (``EditReport``).

Both are values that JSON knows. Saved files contain them, so keys never change. A chained edit has only ``chain``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, TypeVar


class ErasedRecord(TypedDict):
    """A concept of Erase Concept as it is in files (``spec.Erased``); ``previous`` is always null."""

    concept: str
    anchor: str
    templates: Sequence[str]
    scope: str
    weight: float
    names: Sequence[str]
    previous: None


class PreservedRecord(TypedDict):
    """An entry of Preserve Concepts as it is in files (``spec.Preserved``); ``previous`` is always null."""

    prompts: Sequence[str]
    weight: float
    whole: bool
    averaged: bool
    previous: None


class TrainedConcept(TypedDict, total=False):
    """A concept that was trained away, and what it became."""

    concept: str
    anchor: str


class EditSpec(TypedDict, total=False):
    """How an edit was made. The first entries belong to all edits, then to solved ones, then to trained ones."""

    chain: list[EditSpec]
    solver: str
    """Name of the solver, or of the training method."""
    clip_skip: int | None

    erase: list[ErasedRecord]
    preserve: list[PreservedRecord]
    settings: dict[str, float]
    targets: list[str]
    blocks: str
    pooled: bool
    rank: int

    budget: str
    seed: int
    size: list[int]
    iterations: int
    eta: float
    eta_alone: float
    rate: float
    layers: str
    concepts: list[TrainedConcept]
    kept: list[str]
    """The preserved prompts."""
    start: EditSpec
    """Spec of the edit that the training went on from."""


class ConceptResult(TypedDict, total=False):
    """What a solved edit leaves of a concept."""

    concept: str
    left: float
    """Distance of its keys and values from the anchor's, relative to the unedited distance; mean over its tokens."""
    most: float
    """The same for its worst token."""
    margin: float | None
    """How much longer an embedding must be to bring it back, relative to the unedited model; None is beyond measure."""


class HeldRow(TypedDict):
    """What is held of a preserved prompt (a word, its end, its padding), and how far that moved."""

    row: str
    moved: float


class HeldRows(TypedDict, total=False):
    """What edits of older files do not say of a preserved prompt."""

    rows: list[HeldRow]
    """In the order of the prompt, which the keys of a file would lose."""


class PromptDrift(HeldRows):
    """How far a preserved prompt moved, relative to its size."""

    prompt: str
    moved: float


class TrainingResult(TypedDict, total=False):
    """How a training ended: why, its rank, and both losses as ``[first, last]``."""

    reason: str
    rank: int
    erase: list[float]
    preserve: list[float]
    note: str


class EditReport(TypedDict, total=False):
    """What was measured of an edit. All but ``chain`` and ``training`` are of solved edits."""

    chain: list[EditReport]
    concepts: list[ConceptResult]
    kept: list[PromptDrift]
    """The preserved prompts."""
    captions: float
    """How far captions that are preserved on average moved, relative to their size."""
    rank: int
    rows: int
    """How many token rows are erased."""
    lost: float
    """Share of the energy that fewer ranks gave up."""
    regeneration: list[float]
    """RECE's residual before each epoch and at the end."""
    change: float
    """How much all weights change, relative to their size."""
    notes: list[str]
    training: TrainingResult
    """Only of a trained edit."""


Record = TypeVar("Record", EditSpec, EditReport)


def links(chained: Record) -> list[Record]:
    """The specs (or reports) of the edits in a chain, first to last; a single edit has one."""
    if "chain" not in chained:
        return [chained]
    return [link for part in chained["chain"] for link in links(part)]
