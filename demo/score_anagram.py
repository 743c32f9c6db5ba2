"""``dev.py score anagram``: in how many anagrams the judge names every reading, for each way of combining the views.

The tasks are dealt out to processes of one thread each, since a small network gains little from more threads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import torch

from ..host.contrast import contrasted
from ..host.guider import ViewPrompt, ViewsGuider
from ..host.phrases import encode_with_phrase
from ..host.time_travel import travelling
from ..methods.anagram.combine import AVERAGING, MULTI_TASK_FAST, MULTI_TASK_FULL, Combination, combiner
from ..methods.anagram.overlap import AntiSegregation
from ..methods.anagram.prediction import Predictions
from ..methods.anagram.score import Readings
from ..methods.anagram.views import Settings, View, view_named
from ..nodes.anagram import pull_of
from . import vocabulary
from .board import Board
from .judge import CLASSES, Judge
from .run import ROOT
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
THREE = "three views"
SETS_OF_THREE = (("identity", "rotate_180", "flip"), ("identity", "rotate_cw", "rotate_180"))
TILES = 4  # of patch_permute: tiles of 4 × 4 latent cells
STEPS, CFG = 20, 5.0  # a third less time than 30 steps; the judge's verdicts of averaging were the same
SEEDS = [11, 12]


@dataclass(frozen=True)
class Method:
    """A row of the board: how the views are combined, and how often the sampler takes each step of its middle."""

    combination: Combination
    repeats: int = 1


METHODS = {
    "averaging": Method(AVERAGING),
    "rectify": Method(Combination(rectification="match")),
    "balance": Method(Combination(balance="guidance norm")),
    "contrast": Method(Combination(contrast=0.5)),
    "anti-segregation": Method(Combination(together=AntiSegregation(0.03))),
    "multi-task": Method(MULTI_TASK_FULL),
    "time travel": Method(AVERAGING, repeats=2),
    "multi-task, travel": Method(MULTI_TASK_FAST, repeats=2),
}
TRAVEL = (0.2, 0.8)  # sampling percent


@dataclass(frozen=True)
class Task:
    """What one anagram must show: a concept for each view."""

    concepts: tuple[str, ...]
    views: tuple[View, ...]
    background: str

    @property
    def kind(self) -> str:
        return self.views[1].name if len(self.views) == 2 else THREE


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
    """What is counted over the pictures of one row: of every picture its kind of views, which views were named right,
    alignment and concealment."""

    pictures: list[tuple[str, list[bool], float, float]] = field(default_factory=list)
    calls: int = 0

    def metrics(self) -> dict[str, float]:
        pairs = [right for kind, right, *_ in self.pictures if kind != THREE]
        shown: dict[str, float] = {"n": len(pairs)}
        if pairs:
            shown |= {
                "both_right": statistics.mean(map(all, pairs)),
                "worst_view_right": min(statistics.mean(view) for view in zip(*pairs, strict=True)),
                "mean_view_right": statistics.mean(ok for right in pairs for ok in right),
            }
        shown |= {
            "alignment": statistics.mean(a for *_, a, _ in self.pictures),
            "concealment": statistics.mean(c for *_, c in self.pictures),
            "model_calls": self.calls,
        }
        for kind in dict.fromkeys(kind for kind, *_ in self.pictures):
            named = [right for other, right, *_ in self.pictures if other == kind]
            shown[f"{kind}: all right"] = statistics.mean(map(all, named))
            shown[f"{kind}: worst view"] = min(statistics.mean(view) for view in zip(*named, strict=True))
        return shown


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
        prompts = contrasted(prompts, settings.contrast)
        return ViewsGuider(model, prompts, lambda **known: combine(Predictions(**known)), CFG, pull_of(settings))

    @torch.inference_mode()
    def make(self, task: Task, method: Method, tally: Tally) -> torch.Tensor:
        """The pictures of one task, (seeds, h, w, 3)."""
        model = self.painter.model.clone()

        def count(executor, *args, **kwargs):
            tally.calls += 1
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "score", count)
        noise = noise_for(self.seeds)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
        sampler = travelling(comfy.samplers.sampler_object("euler"), *TRAVEL, method.repeats)
        latents = self.guider(task, method.combination, model).sample(
            noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1
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
        columns = [CLASSES.index(c) for c in task.concepts]
        similarity = torch.stack([self.judge.probabilities(shown)[:, columns] for shown in upright], 1)
        readings = Readings(similarity, temperature=0.25)
        for right, *figures in zip(
            zip(*named, strict=True), readings.alignment.tolist(), readings.concealment.tolist(), strict=True
        ):
            tally.pictures.append((task.kind, list(right), *figures))


def share(arguments: argparse.Namespace, todo: list[Task], say: bool) -> dict[str, dict[str, Any]]:
    """Makes and reads the anagrams of these tasks, for each method its tally and the seconds it took."""
    maker, found = Maker(SEEDS[:1] if arguments.quick else SEEDS), {}
    for method in arguments.method or METHODS:
        tally, rows, started = Tally(), [], time.monotonic()
        for number, task in enumerate(todo, 1):
            rows.append(maker.make(task, METHODS[method], tally))
            if say and number % 10 == 0:
                print(f"    {method}: {number} of {len(todo)} anagrams of this process", flush=True)
        found[method] = asdict(tally) | {"seconds": time.monotonic() - started}
        if arguments.sheets:
            save_sheet(rows, arguments.sheets / f"{method} {arguments.part or 0}.png")
    return found


def shares(arguments: argparse.Namespace, given: list[str]) -> list[dict[str, dict[str, Any]]]:
    """All shares of the tasks, each from a process of its own."""
    runner = [sys.executable, str(ROOT / "demo" / "run.py"), "demo.score_anagram", *given]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        parts = [Path(folder, f"{part}.json") for part in range(arguments.processes)]
        started = []
        for part, path in enumerate(parts):
            command = [*runner, "--part", str(part), "--json", str(path)]
            started.append(stack.enter_context(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})))
            stack.callback(started[-1].terminate)
        if any([process.wait() for process in started]):
            raise RuntimeError("a process of the score board failed; its own message stands above")
        return [json.loads(path.read_text()) for path in parts]


def parser() -> argparse.ArgumentParser:
    """The command line of the board."""
    made = argparse.ArgumentParser(prog="dev.py score anagram")
    made.add_argument("--json", type=Path)
    made.add_argument("--quick", action="store_true", help="6 pairs in 2 kinds of view, 2 sets of three, 1 seed")
    made.add_argument("--pairs", type=int, default=len(PAIRS), help="only the first so many pairs")
    made.add_argument("--kind", choices=KINDS, action="append", help="only this kind of view (again for more)")
    made.add_argument("--sheets", type=Path, help="a folder for sheets of all pictures")
    made.add_argument("--method", choices=list(METHODS), action="append", help="only this row (again for more)")
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--part", type=int, help=argparse.SUPPRESS)  # which share a process of the board makes
    return made


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    options = parser().parse_args(arguments)
    logging.disable(logging.INFO)
    kinds = tuple(options.kind or (KINDS[:2] if options.quick else KINDS))
    triples = 0 if options.kind else 2 if options.quick else len(TRIPLES)
    todo = list(tasks(min(options.pairs, 6) if options.quick else options.pairs, kinds, triples))
    if options.part is not None:
        found = share(options, todo[options.part :: options.processes], say=options.part == 0)
        options.json.write_text(json.dumps(found))
        return 0
    board, found = Board("anagram", SEEDS[:1] if options.quick else SEEDS), shares(options, arguments)
    for method in options.method or METHODS:
        parts = [part[method] for part in found]
        tally = Tally([p for part in parts for p in part["pictures"]], sum(part["calls"] for part in parts))
        board.add(method, tally.metrics(), sum(part["seconds"] for part in parts))
    board.write(options.json)
    return 0
