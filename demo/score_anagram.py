"""``dev.py score anagram``: in how many anagrams the judge names every reading, for each way of combining the views."""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import comfy.patcher_extension
import comfy.samplers
import torch

from ..host.guider import ViewPrompt, ViewsGuider
from ..host.phrases import encode_with_phrase
from ..methods.anagram.combine import AVERAGING, Combination, combiner
from ..methods.anagram.overlap import AntiSegregation
from ..methods.anagram.prediction import Predictions
from ..methods.anagram.score import Readings
from ..methods.anagram.views import Settings, View, view_named
from ..nodes.anagram import pull_of
from . import vocabulary
from .board import Board
from .judge import CLASSES, Judge
from .sampling import Painter, encode, noise_for
from .score_model import save_sheet

# pairs of like colour, chosen from the art before anything was measured: an anagram has one palette, which in the papers the
# shared style of the prompts takes care of
PAIRS = (
    ("moon", "banana"), ("heart", "apple"), ("pumpkin", "fox"), ("frog", "cactus"), ("rabbit", "snowman"),
    ("pig", "donut"), ("star", "sunflower"), ("strawberry", "ladybug"), ("burger", "pizza"), ("turtle", "frog"),
    ("panda", "penguin"), ("cat", "pumpkin"), ("crown", "banana"), ("clock", "heart"), ("tree", "cactus"),
    ("snowman", "panda"), ("dog", "burger"), ("apple", "mushroom"), ("pig", "octopus"), ("watermelon", "turtle"),
    ("owl", "dog"), ("star", "moon"), ("car", "ladybug"), ("cake", "strawberry"),
)  # fmt: skip
TRIPLES = (
    ("moon", "banana", "star"), ("heart", "apple", "strawberry"), ("frog", "cactus", "turtle"), ("pumpkin", "fox", "cat"),
    ("rabbit", "snowman", "panda"), ("burger", "pizza", "dog"), ("ladybug", "car", "clock"), ("pig", "donut", "octopus"),
)  # fmt: skip
KINDS = ("flip", "rotate_180", "rotate_cw", "jigsaw", "patch_permute")
SETS_OF_THREE = (("identity", "rotate_180", "flip"), ("identity", "rotate_cw", "rotate_180"))
TILES = 4  # of patch_permute: tiles of 4 × 4 latent cells
STEPS, CFG = 30, 5.0
SEEDS = [11, 12]

METHODS: dict[str, Combination] = {
    "averaging": AVERAGING,
    "rectify": Combination(rectification="match"),
    "balance": Combination(balance="guidance norm"),
    "anti-segregation": Combination(together=AntiSegregation(0.03)),
    "multi-task": Combination("guidance norm", "match", together=AntiSegregation(0.03)),
}


@dataclass(frozen=True)
class Task:
    """What one anagram must show: a concept for each view."""

    concepts: tuple[str, ...]
    views: tuple[View, ...]
    background: str

    @property
    def kind(self) -> str:
        return self.views[1].name if len(self.views) == 2 else "three views"


def tasks(pairs: int, kinds: tuple[str, ...], triples: int) -> Iterator[Task]:
    """The fixed tasks of the board: every pair in every kind of view, then sets of three views."""
    backgrounds = list(vocabulary.BACKGROUNDS)
    for number, pair in enumerate(PAIRS[:pairs]):
        for kind in kinds:
            views = (
                view_named("identity"),
                view_named(kind, Settings(TILES if kind == "patch_permute" else 0, number)),
            )
            yield Task(pair, views, backgrounds[number % len(backgrounds)])
    for number, concepts in enumerate(TRIPLES[:triples]):
        names = SETS_OF_THREE[number % len(SETS_OF_THREE)]
        yield Task(concepts, tuple(map(view_named, names)), backgrounds[number % len(backgrounds)])


def _caption(concept: str, background: str) -> str:
    return vocabulary.scene_of((concept,), background).caption()


@dataclass
class Tally:
    """What is counted over the pictures of one row."""

    right: dict[str, list[list[bool]]] = field(default_factory=dict)  # by kind: of every picture, each view
    readings: list[Readings] = field(default_factory=list)
    calls: int = 0

    def metrics(self) -> dict[str, float]:
        pairs = [views for kind, rows in self.right.items() if kind != "three views" for views in rows]
        by_view = list(zip(*pairs, strict=True))
        shown: dict[str, float] = {
            "both_right": statistics.mean(all(v) for v in pairs),
            "worst_view_right": min(statistics.mean(view) for view in by_view),
            "mean_view_right": statistics.mean(ok for view in pairs for ok in view),
            "alignment": statistics.mean(a for r in self.readings for a in r.alignment.tolist()),
            "concealment": statistics.mean(c for r in self.readings for c in r.concealment.tolist()),
            "model_calls": self.calls,
            "n": len(pairs),
        }
        return shown | {f"{kind}": statistics.mean(all(v) for v in rows) for kind, rows in self.right.items()}


class Maker:
    """Samples anagrams with the demo model and has the judge read them."""

    def __init__(self, seeds: list[int]) -> None:
        self.painter, self.judge, self.seeds = Painter(), Judge.load(), seeds

    def guider(self, task: Task, settings: Combination, model) -> ViewsGuider:
        negative = encode(self.painter.clip, "")
        prompts = [
            ViewPrompt(
                view, encode_with_phrase(self.painter.clip, _caption(concept, task.background), concept), negative
            )
            for view, concept in zip(task.views, task.concepts, strict=True)
        ]
        combine = combiner(settings, [1.0] * len(prompts))
        return ViewsGuider(model, prompts, lambda **known: combine(Predictions(**known)), CFG, pull_of(settings))

    @torch.inference_mode()
    def make(self, task: Task, settings: Combination, tally: Tally) -> torch.Tensor:
        """The pictures of one task, (seeds, h, w, 3)."""
        model = self.painter.model.clone()

        def count(executor, *args, **kwargs):
            tally.calls += 1
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "score", count)
        noise = noise_for(self.seeds)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
        latents = self.guider(task, settings, model).sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1
        )
        pictures = self.painter.vae.decode(latents).float()
        self._read(task, pictures, tally)
        return pictures

    def _read(self, task: Task, pictures: torch.Tensor, tally: Tally) -> None:
        upright = [view.show(pictures.movedim(-1, 1)).movedim(1, -1) for view in task.views]
        named = [
            [verdict.name == concept for verdict in self.judge.look(shown)]
            for shown, concept in zip(upright, task.concepts, strict=True)
        ]
        tally.right.setdefault(task.kind, []).extend(map(list, zip(*named, strict=True)))
        columns = [CLASSES.index(c) for c in task.concepts]
        similarity = torch.stack([self.judge.probabilities(shown)[:, columns] for shown in upright], 1)
        tally.readings.append(Readings(similarity, temperature=0.25))


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    parser = argparse.ArgumentParser(prog="dev.py score anagram")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="6 pairs in 2 kinds of view, 2 sets of three, 1 seed")
    parser.add_argument("--sheets", type=Path, help="a folder for sheets of all pictures")
    parser.add_argument("--method", choices=list(METHODS), action="append", help="only this row (again for more)")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    seeds = SEEDS[:1] if options.quick else SEEDS
    todo = list(tasks(6, KINDS[:2], 2) if options.quick else tasks(len(PAIRS), KINDS, len(TRIPLES)))
    board, maker = Board("anagram", seeds), Maker(seeds)
    for method in options.method or METHODS:
        with board.row(method) as metrics:
            tally, rows = Tally(), []
            for number, task in enumerate(todo, 1):
                rows.append(maker.make(task, METHODS[method], tally))
                if number % 20 == 0:
                    print(f"    {number} of {len(todo)} anagrams", flush=True)
            metrics |= tally.metrics()
            if options.sheets:
                save_sheet(rows, options.sheets / f"{method}.png")
    board.write(options.json)
    return 0
