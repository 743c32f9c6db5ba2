"""``dev.py score anagram``: in how many anagrams the judge names every reading, for each way of combining the views."""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import comfy.patcher_extension
import comfy.samplers
import numpy as np
import torch

from ..demo import vocabulary
from ..demo.judge import CLASSES, READER, Judge
from ..demo.sampling import Painter, encode, noise_for
from ..host.anagram.guider import ViewsGuider
from ..host.anagram.request import anagram_request
from ..host.anagram.views import ViewPrompt
from ..host.engine.time_travel import travelling_sampler
from ..host.engine.vae import cell_side
from ..host.text.tokens import encode_with_phrase
from ..methods.anagram.balance import ViewScorer
from ..methods.anagram.combine import AVERAGING, MULTI_TASK_FULL, Combination
from ..methods.anagram.score import Readings
from ..methods.anagram.views import Settings, View, view_named
from .board import Board, counted
from .score_model import save_sheet
from .workers import spread

Concepts = tuple[str, ...]

TURNED: tuple[Concepts, ...] = (
    ("apple", "heart"), ("banana", "pizza"), ("banana", "star"), ("car", "apple"),
    ("car", "watermelon"), ("dog", "rabbit"), ("frog", "strawberry"), ("mushroom", "cake"),
    ("mushroom", "strawberry"), ("owl", "banana"), ("penguin", "banana"), ("penguin", "owl"),
    ("penguin", "sunflower"), ("penguin", "tree"), ("pizza", "heart"), ("pizza", "watermelon"),
    ("star", "heart"), ("star", "moon"), ("strawberry", "heart"), ("sunflower", "apple"),
    ("tree", "apple"), ("tree", "cactus"), ("turtle", "pumpkin"), ("turtle", "watermelon"),
)  # fmt: skip
QUARTERED: tuple[Concepts, ...] = (
    ("apple", "heart"), ("apple", "strawberry"), ("banana", "moon"), ("banana", "star"),
    ("banana", "watermelon"), ("cactus", "mushroom"), ("cactus", "snowman"), ("cake", "star"),
    ("car", "banana"), ("car", "cactus"), ("cat", "rabbit"), ("dog", "pizza"),
    ("fish", "pumpkin"), ("mushroom", "strawberry"), ("owl", "bus"), ("owl", "fish"),
    ("owl", "pizza"), ("penguin", "car"), ("penguin", "tree"), ("penguin", "turtle"),
    ("rabbit", "bus"), ("star", "moon"), ("tree", "apple"), ("tree", "cactus"),
)  # fmt: skip
SAWN: tuple[Concepts, ...] = (
    ("apple", "heart"), ("apple", "strawberry"), ("banana", "pizza"), ("bus", "snowman"),
    ("car", "pizza"), ("car", "strawberry"), ("car", "sunflower"), ("cat", "frog"),
    ("cat", "snowman"), ("fish", "sunflower"), ("fox", "car"), ("frog", "crown"),
    ("ladybug", "car"), ("owl", "bus"), ("panda", "rabbit"), ("pizza", "star"),
    ("star", "moon"), ("strawberry", "burger"), ("strawberry", "heart"), ("strawberry", "pizza"),
    ("tree", "sunflower"), ("turtle", "cactus"), ("turtle", "sunflower"), ("turtle", "tree"),
)  # fmt: skip
TILED: tuple[Concepts, ...] = (
    ("apple", "banana"), ("banana", "heart"), ("banana", "star"), ("burger", "star"),
    ("cactus", "banana"), ("car", "banana"), ("cat", "moon"), ("dog", "star"),
    ("fox", "apple"), ("fox", "banana"), ("fox", "burger"), ("mushroom", "banana"),
    ("mushroom", "pizza"), ("penguin", "sunflower"), ("pizza", "star"), ("rabbit", "banana"),
    ("rabbit", "pizza"), ("star", "heart"), ("star", "moon"), ("sunflower", "banana"),
    ("sunflower", "star"), ("tree", "banana"), ("tree", "star"), ("turtle", "star"),
)  # fmt: skip
PAIRS = {"flip": TURNED, "rotate_180": TURNED, "rotate_cw": QUARTERED, "jigsaw": SAWN, "patch_permute": TILED}
"""For each kind of view, the 24 of the 630 pairs of the vocabulary that averaging and multi-task do best together, on other seeds
(``dev.py score pairs``). Half turns, quarter turns and cuts bend other things into each other."""
TRIPLES: tuple[Concepts, ...] = (
    ("moon", "banana", "star"), ("heart", "apple", "strawberry"), ("frog", "cactus", "turtle"), ("pumpkin", "fox", "cat"),
    ("rabbit", "snowman", "panda"), ("burger", "pizza", "dog"), ("ladybug", "car", "clock"), ("pig", "donut", "octopus"),
)  # fmt: skip
THREE = "three views"
SETS_OF_THREE = (("identity", "rotate_180", "flip"), ("identity", "rotate_cw", "rotate_180"))
TILES = 2  # of patch_permute, a side: the latent has 16 × 16 cells, and in a tile of 4 × 4 nothing can be drawn
SHUFFLE = 7  # the seed of the views that shuffle: with it, none of the four tiles stays where it is
STEPS, CFG = 20, 5.0  # the templates take 30 steps; 20 keep a full board within its time
SEEDS = [11, 12]


@dataclass(frozen=True)
class Method:
    """A row of the board: how the views are combined, and how often the sampler takes each step of its middle.

    Attributes:
        use_scorer: whether the views are weighed by how well each reads, the paper's balance. No CLIP knows the demo model's
            pictures, so a second judge, of other weights, takes its place. The one that names the pictures does not steer them.
        candidates: pictures made per seed. The scorer picks one of them, as a user does from a contact sheet.
    """

    combination: Combination
    repeats: int = 1
    use_scorer: bool = False
    candidates: int = 1


METHODS = {
    "averaging": Method(AVERAGING),
    "rectify": Method(Combination(rectification="match")),
    "rectify, as the paper": Method(Combination(rectification="unit")),
    "balance": Method(AVERAGING, use_scorer=True),
    "guidance norm": Method(Combination("guidance norm")),
    "contrast": Method(Combination(contrast=0.5)),
    "balance and contrast": Method(Combination(contrast=0.5), use_scorer=True),
    "anti-segregation": Method(Combination(anti_segregation=MULTI_TASK_FULL.anti_segregation)),
    "multi-task": Method(MULTI_TASK_FULL, use_scorer=True),
    "multi-task, unread": Method(MULTI_TASK_FULL),
    "time travel": Method(AVERAGING, repeats=2),
}
METHODS |= {
    f"{name}, best of four": replace(METHODS[name], candidates=4) for name in ("averaging", "balance and contrast")
}
TRAVEL = (0.2, 0.8)  # sampling percent
AS_COSINES = (0.2, 0.3)
"""CLIP's cosines of a picture with a caption it does not show, and with its own. The balance is made for such scores: the
probabilities of a classifier are a hundredfold apart, and would throw the weights from one end to the other."""


class Task(NamedTuple):
    """What one anagram must show: a concept for each view, named."""

    concepts: Concepts
    names: tuple[str, ...]
    background: str

    def views(self, cell: int = 1) -> list[View]:
        """On a latent, or with the side of its cells in pixels as they are seen on its picture."""
        return [view_named(n, Settings(TILES if n == "patch_permute" else 0, SHUFFLE, cell)) for n in self.names]

    @property
    def kind(self) -> str:
        return self.names[1] if len(self.names) == 2 else THREE


def tasks(pairs: Mapping[str, Iterable[Concepts]], triples: Iterable[Concepts] = ()) -> Iterator[Task]:
    """The fixed tasks of these concepts: the pairs of each kind of view, then sets of three views."""
    for kind, several in pairs.items():
        for concepts in several:
            yield Task(concepts, ("identity", kind), _background(concepts))
    for number, concepts in enumerate(triples):
        yield Task(concepts, SETS_OF_THREE[number % len(SETS_OF_THREE)], _background(concepts))


def _background(concepts: Concepts) -> str:
    """The same for the same concepts wherever they are asked for: on another, they are another task."""
    backgrounds = list(vocabulary.BACKGROUNDS)
    return backgrounds[sum(map(vocabulary.CONCEPTS.index, concepts)) % len(backgrounds)]


def _caption(concept: str, background: str) -> str:
    return vocabulary.scene_of((concept,), background).caption()


class Reading(NamedTuple):
    """What was read in the pictures of one task: for each which views were named right, alignment and concealment."""

    task: Task
    right: list[tuple[bool, ...]]
    alignment: list[float]
    concealment: list[float]
    calls: int
    rows: int
    pictures: np.ndarray  # (seeds, h, w, 3), bytes


def metrics_of(readings: Sequence[Reading]) -> dict[str, float]:
    """The figures of a row."""
    pairs = [right for r in readings if r.task.kind != THREE for right in r.right]
    alignments = [a for r in readings for a in r.alignment]
    concealments = [c for r in readings for c in r.concealment]
    shown: dict[str, float] = {"n": len(pairs)}
    if pairs:
        shown |= {
            "both_right": statistics.mean(map(all, pairs)),
            "worst_view_right": min(statistics.mean(view) for view in zip(*pairs, strict=True)),
            "mean_view_right": statistics.mean(ok for right in pairs for ok in right),
        }
    shown |= {
        "alignment": statistics.mean(alignments),
        "concealment": statistics.mean(concealments),
        "alignment, best tenth from": float(np.quantile(alignments, 0.9)),
        "concealment, best tenth from": float(np.quantile(concealments, 0.9)),
        "model_calls": sum(r.calls for r in readings),
        "model_rows": sum(r.rows for r in readings),
    }
    for kind in dict.fromkeys(r.task.kind for r in readings):
        named = [right for r in readings if r.task.kind == kind for right in r.right]
        shown[f"{kind}: all right"] = statistics.mean(map(all, named))
        shown[f"{kind}: worst view"] = min(statistics.mean(view) for view in zip(*named, strict=True))
    return shown


class Maker:
    """Samples anagrams with the demo model and has the judge name them."""

    def __init__(self, seeds: list[int]) -> None:
        self.painter, self.judge, self.scorer, self.seeds = Painter(), Judge.load(), Judge.load(READER), seeds

    def guider(self, task: Task, method: Method, model: Any) -> ViewsGuider:
        settings = method.combination
        if method.use_scorer:
            settings = settings.weighed_by(ViewScorer(partial(self.score, task)))
        negative = encode(self.painter.clip, "")
        prompts = [
            ViewPrompt(
                view, encode_with_phrase(self.painter.clip, _caption(concept, task.background), concept), negative
            )
            for view, concept in zip(task.views(), task.concepts, strict=True)
        ]
        request = anagram_request(prompts, settings)
        return ViewsGuider(model, request.prompts, request.combine, CFG, request.gradient_step)

    @torch.inference_mode()
    def make(self, task: Task, method: Method, steps: int = STEPS) -> Reading:
        """Samples the pictures of one task and reads them."""
        model, rows = self.painter.model.clone(), []

        def count(executor, x, *args, **kwargs):
            rows.append(len(x))
            return executor(x, *args, **kwargs)

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "score", count)
        noise = noise_for([seed + 100 * more for seed in self.seeds for more in range(method.candidates)])
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
        sampler = travelling_sampler(comfy.samplers.sampler_object("euler"), *TRAVEL, method.repeats)
        latents = self.guider(task, method, model).sample(
            noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1
        )
        pictures = self.painter.vae.decode(latents).float()
        return self._read(
            task, self._best_of(method.candidates, task, pictures) if method.candidates > 1 else pictures, rows
        )

    def _best_of(self, several: int, task: Task, pictures: torch.Tensor) -> torch.Tensor:
        """Of every so many pictures the one whose worse view reads best to the scorer."""
        best = self.probabilities(self.scorer, task, pictures).amin(1).view(-1, several).argmax(1)
        return pictures.unflatten(0, (-1, several))[torch.arange(len(best)), best]

    def score(self, task: Task, clean: torch.Tensor) -> torch.Tensor:
        """How well clean latents (batch, …) of the model's own scale read in each view, (batch, views), to the scorer."""
        none, well = AS_COSINES
        pictures = self.painter.vae.decode(self.painter.model.model.process_latent_out(clean)).float()
        return none + (well - none) * self.probabilities(self.scorer, task, pictures)

    def probabilities(self, judge: Judge, task: Task, pictures: torch.Tensor) -> torch.Tensor:
        """How well pictures (batch, h, w, 3) read in each view to judge or scorer, (batch, views)."""
        each = zip(self._upright(task, pictures), task.concepts, strict=True)
        return torch.stack([judge.probabilities(shown)[:, CLASSES.index(concept)] for shown, concept in each], 1)

    def _upright(self, task: Task, pictures: torch.Tensor) -> list[torch.Tensor]:
        views = task.views(cell_side(self.painter.vae))
        return [view.show(pictures.movedim(-1, 1)).movedim(1, -1) for view in views]

    def _read(self, task: Task, pictures: torch.Tensor, rows: list[int]) -> Reading:
        upright = self._upright(task, pictures)
        named = [
            [verdict.name == concept for verdict in self.judge.look(shown)]
            for shown, concept in zip(upright, task.concepts, strict=True)
        ]
        columns = [CLASSES.index(c) for c in task.concepts]
        similarity = torch.stack([self.judge.probabilities(shown)[:, columns] for shown in upright], 1)
        scores = Readings(similarity, temperature=0.25)
        return Reading(
            task, list(zip(*named, strict=True)), scores.alignment.tolist(), scores.concealment.tolist(), len(rows),
            sum(rows), (pictures * 255).round().byte().numpy(),
        )  # fmt: skip


@cache
def maker(seeds: tuple[int, ...]) -> Maker:
    return Maker(list(seeds))


class Order(NamedTuple):
    """One task by one method."""

    task: Task
    method: str
    seeds: tuple[int, ...]
    steps: int = STEPS


def carry_out(order: Order) -> Reading:
    return maker(order.seeds).make(order.task, METHODS[order.method], order.steps)


def parser() -> argparse.ArgumentParser:
    """The command line of the board."""
    made = argparse.ArgumentParser(prog="dev.py score anagram")
    made.add_argument("--json", type=Path)
    made.add_argument("--quick", action="store_true", help="6 pairs in 2 kinds of view, 2 sets of three, 1 seed")
    made.add_argument("--pairs", type=int, default=len(TURNED), help="only the first so many pairs of a view")
    made.add_argument("--kind", choices=PAIRS, action="append", help="only this kind of view (again for more)")
    made.add_argument("--sheets", type=Path, help="a folder for sheets of all pictures")
    made.add_argument("--method", choices=list(METHODS), action="append", help="only this row (again for more)")
    return made


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    options = parser().parse_args(arguments)
    logging.disable(logging.INFO)
    kinds = options.kind or list(PAIRS)[: 2 if options.quick else None]
    triples = 0 if options.kind else 2 if options.quick else len(TRIPLES)
    pairs = min(options.pairs, 6) if options.quick else options.pairs
    todo = list(tasks({kind: PAIRS[kind][:pairs] for kind in kinds}, TRIPLES[:triples]))
    seeds = tuple(SEEDS[:1] if options.quick else SEEDS)
    board = Board("anagram", list(seeds))
    for method in options.method or METHODS:
        with board.row(method) as metrics:
            made = spread(carry_out, [Order(task, method, seeds) for task in todo])
            readings = list(counted(made, len(todo), "anagrams", method))
            metrics |= metrics_of(readings)
        if options.sheets:
            save_sheet([torch.from_numpy(r.pictures) / 255 for r in readings], options.sheets / f"{method}.png")
    board.write(options.json)
    return 0
