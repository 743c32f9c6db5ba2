"""What an edit says about itself: how it was made (``EditSpec``) and what was measured (``EditReport``).

Both are values that JSON knows, and saved files hold them: keys never change. A chained edit has only ``chain``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, TypeVar


class ErasedRecord(TypedDict):
    """A concept of Erase Concept as files hold it (``spec.Erased``); ``previous`` is always null."""

    concept: str
    anchor: str
    templates: Sequence[str]
    scope: str
    weight: float
    names: Sequence[str]
    previous: None


class PreservedRecord(TypedDict):
    """An entry of Preserve Concepts as files hold it (``spec.Preserved``); ``previous`` is always null."""

    prompts: Sequence[str]
    weight: float
    whole: bool
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
    """What a solved edit leaves of a concept: the share that is left (mean, and ``most`` of its tokens), the margin."""

    concept: str
    left: float
    most: float
    margin: float | None


class PromptDrift(TypedDict):
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
    """What was measured of an edit; ``methods.erase.diagnose.measure`` explains the figures of a solved one."""

    chain: list[EditReport]
    concepts: list[ConceptResult]
    kept: list[PromptDrift]
    """The preserved prompts."""
    rank: int
    rows: int
    lost: float
    regeneration: list[float]
    change: float
    notes: list[str]
    training: TrainingResult
    """Only of a trained edit."""


Record = TypeVar("Record", EditSpec, EditReport)


def links(chained: Record) -> list[Record]:
    """The specs (or reports) of the edits in a chain, first to last; a single edit has one."""
    if "chain" not in chained:
        return [chained]
    return [link for part in chained["chain"] for link in links(part)]
