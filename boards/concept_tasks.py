"""What the boards of several concepts in one picture share: the pairs, the layouts, the prompts, and what is counted.

for task in tasks(): pictures = …; metrics.count(judge, task, pictures)
figures = metrics.figures()
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..demo import vocabulary
from ..demo.files import lora_file
from ..demo.judge import LEFT, RIGHT, THIRDS, WHOLE, Judge, background_of
from .board import Figures

SIMILAR = (("lion", "tiger"), ("koala", "bear"), ("monkey", "bear"))
PAIRS: tuple[tuple[str, str], ...] = (
    *SIMILAR,
    *(p for p in itertools.combinations(vocabulary.LORA_CONCEPTS, 2) if not {p, p[::-1]} & set(SIMILAR)),
)
"""All 28 pairs of the shipped LoRAs, those that look alike first."""

TRIPLES = (
    ("lion", "robot", "koala"),
    ("tiger", "unicorn", "bear"),
    ("monkey", "dinosaur", "lion"),
    ("koala", "tiger", "robot"),
)

STAND_INS = {
    "lion": "cat",
    "tiger": "cat",
    "koala": "panda",
    "monkey": "dog",
    "unicorn": "rabbit",
    "bear": "panda",
    "robot": "clock",
    "dinosaur": "turtle",
}
"""The nearest noun that the base model knows: the base prompt has it in the place of a concept."""

PixelBox = tuple[int, int, int, int]
"""(x0, y0, x1, y1) in px."""


@dataclass(frozen=True)
class TaskLayout:
    """Where the objects are, left to right, on a canvas of ``width`` × 128."""

    name: str
    width: int
    boxes: tuple[PixelBox, ...]

    def fractions(self) -> list[tuple[float, float, float, float]]:
        """The boxes as (x, y, width, height) in fractions of the canvas."""
        return [(x0 / self.width, y0 / 128, (x1 - x0) / self.width, (y1 - y0) / 128) for x0, y0, x1, y1 in self.boxes]


LAYOUTS = (
    TaskLayout("level", 128, ((2, 34, 62, 94), (66, 34, 126, 94))),
    TaskLayout("left above", 128, ((2, 18, 62, 78), (66, 50, 126, 110))),
    TaskLayout("right above", 128, ((2, 50, 62, 110), (66, 18, 126, 78))),
)
ROW_OF_THREE = TaskLayout("three", 192, ((2, 34, 62, 94), (66, 34, 126, 94), (130, 34, 190, 94)))
ALONE = TaskLayout("alone", 128, ((0, 0, 128, 128),))
"""One object wherever the prompt puts it: its overlap with this box says nothing."""
COLUMNS = {1: (WHOLE,), 2: (LEFT, RIGHT), 3: THIRDS}
SEEDS = (21, 22)


@dataclass(frozen=True)
class ConceptTask:
    """Pictures to make: these concepts at these places, one picture per seed."""

    concepts: tuple[str, ...]
    layout: TaskLayout
    background: str
    seeds: tuple[int, ...] = SEEDS
    bare: bool = False
    """Whether the base prompt names the background alone."""

    def base_prompt(self) -> str:
        """The scene in nouns the base model knows, or its background."""
        if self.bare:
            return f"{self.background} background"
        return self.scene(tuple(STAND_INS[c] for c in self.concepts))

    def concept_prompt(self, concept: str) -> str:
        """The scene with this concept at every place."""
        return self.scene((concept,) * len(self.concepts))

    def true_prompt(self) -> str:
        """The scene by its own nouns, which only a model with the LoRAs on it can read."""
        return self.scene(self.concepts)

    def scene(self, nouns: tuple[str, ...]) -> str:
        return vocabulary.scene_of(nouns, self.background).caption()

    def lone_prompt(self, noun: str) -> str:
        """One object on the same background."""
        return vocabulary.scene_of((noun,), self.background).caption()


def lora_of(concept: str, kind: str = "unet") -> str:
    """The path of a shipped LoRA for a kind of demo model."""
    return str(lora_file(concept, kind))


def tasks(pairs: int = 20, layouts: int = 3, seeds: int = 2) -> Iterator[ConceptTask]:
    """The fixed tasks: every pair in every layout. Backgrounds go round; every second pair is swapped."""
    backgrounds = list(vocabulary.BACKGROUNDS)
    for number, pair in enumerate(PAIRS[:pairs]):
        for layout in LAYOUTS[:layouts]:
            concepts = pair if number % 2 == 0 else pair[::-1]
            yield ConceptTask(concepts, layout, backgrounds[number % len(backgrounds)], SEEDS[:seeds])


def tasks_of_three(count: int = 4, seeds: int = 2) -> Iterator[ConceptTask]:
    """Three concepts side by side."""
    backgrounds = list(vocabulary.BACKGROUNDS)
    for number, concepts in enumerate(TRIPLES[:count]):
        yield ConceptTask(concepts, ROW_OF_THREE, backgrounds[number % len(backgrounds)], SEEDS[:seeds])


def tasks_of_one(backgrounds: int = 5, seeds: int = 2) -> Iterator[ConceptTask]:
    """Every concept by itself: what a pair of them can be expected to reach is this rate squared."""
    for number, concept in enumerate(vocabulary.LORA_CONCEPTS):
        names = list(vocabulary.BACKGROUNDS)
        for step in range(backgrounds):
            yield ConceptTask((concept,), ALONE, names[(number + step) % len(names)], SEEDS[:seeds])


@dataclass
class ConceptMetrics:
    """Counts over the pictures of one method. ``calls``: model calls, ``rows``: their batch rows; both given."""

    right: list[list[bool]] = field(default_factory=list)
    leaks: list[bool] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    backgrounds: list[bool] = field(default_factory=list)
    similar: list[bool] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    calls: int = 0
    rows: int = 0

    def add(self, other: ConceptMetrics) -> None:
        """Takes in the counts of other pictures."""
        for name in ("right", "leaks", "overlaps", "backgrounds", "similar", "wrong", "calls", "rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def count(self, judge: Judge, task: ConceptTask, pictures: torch.Tensor) -> None:
        """Has the judge look at the pictures (seeds, h, w, 3) of a task."""
        columns = COLUMNS[len(task.concepts)]
        seen = list(zip(*(judge.look(pictures, column) for column in columns), strict=True))
        for picture, verdicts in zip(pictures, seen, strict=True):
            names = [v.name for v in verdicts]
            right = [name == concept for name, concept in zip(names, task.concepts, strict=True)]
            self.right.append(right)
            pairs = list(zip(names, task.concepts, strict=True))
            self.leaks += [name in task.concepts and name != concept for name, concept in pairs]
            self.backgrounds.append(background_of(picture) == task.background)
            self.overlaps += [
                overlap(found_box(picture, column), box) for column, box in zip(columns, task.layout.boxes, strict=True)
            ]
            if tuple(sorted(task.concepts)) in {tuple(sorted(p)) for p in SIMILAR}:
                self.similar.append(all(right))
            if not all(right):
                self.wrong.append(f"{' + '.join(task.concepts)}, {task.layout.name}: {', '.join(map(str, verdicts))}")

    def figures(self) -> Figures:
        """The figures of a row.

        Returns:
            ``all_right``: pictures in which every concept is named in its own place. ``leak``: places with another
            concept of the picture. ``layout_iou``: overlap of what is drawn with the box of the task.
        """
        found: Figures = {
            "all_right": statistics.mean(all(r) for r in self.right),
            "each_right": statistics.mean(o for r in self.right for o in r),
            "leak": statistics.mean(self.leaks),
            "layout_iou": statistics.mean(self.overlaps),
            "background_kept": statistics.mean(self.backgrounds),
            "model_calls": self.calls,
            "model_rows": self.rows,
            "concepts": len(self.right[0]),
            "n": len(self.right),
        }
        return found | ({"similar_right": statistics.mean(self.similar)} if self.similar else {})

    def remarks(self) -> list[str]:
        return [f"not as prompted: {line}" for line in self.wrong]


def foreground(picture: torch.Tensor, tolerance: float = 0.1) -> torch.Tensor:
    """Which pixels (h, w) of a picture (h, w, 3) differ from the flat colour of its border."""
    border = torch.cat([picture[:4].flatten(0, 1), picture[-4:].flatten(0, 1), picture[:, :2].flatten(0, 1)])
    return (picture - border.median(0).values).square().mean(-1).sqrt() > tolerance


def found_box(picture: torch.Tensor, column: tuple[float, float, float, float]) -> PixelBox | None:
    """The box around what is in a column of the picture; rows and columns with under 4 pixels of it do not count."""
    x0, x1 = (round(edge * picture.shape[1]) for edge in (column[0], column[2]))
    inside = foreground(picture)[:, x0:x1]
    rows, columns = (torch.nonzero(inside.sum(axis) >= 4).flatten().tolist() for axis in (1, 0))
    return (x0 + columns[0], rows[0], x0 + columns[-1] + 1, rows[-1] + 1) if rows and columns else None


def overlap(a: PixelBox | None, b: PixelBox) -> float:
    """Intersection over union."""
    if a is None:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)
