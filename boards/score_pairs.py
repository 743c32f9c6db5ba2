"""``dev.py score pairs``: which pairs of concepts the demo model can draw as one picture that reads both ways.

As with any model, some pairs bend into each other and most do not; the papers choose theirs by hand. Here every pair of
the vocabulary is tried roughly, and the best are tried again on other seeds. In both rounds half of the pictures are
made by plain averaging and half by the multi-task remedies: pairs that one of them chose alone would favour it. Both
the judge and the scorer must name them. The pairs of the anagram board are the best of those, for each demo model; its
seeds are others.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch

from ..demo import vocabulary
from ..demo.judge import UNSURE_BELOW
from . import score_anagram
from .anagram_tasks import AnagramTask, Concepts, tasks
from .board import Board, Job, add_model_option, board_parser, with_progress
from .score_anagram import STEPS
from .workers import parallel_map

FINALISTS = 40
VIEWS = {
    "turned": ("rotate_180", "flip"),
    "rotate_cw": ("rotate_cw",),
    "jigsaw": ("jigsaw",),
    "patch_permute": ("patch_permute",),
}
"""The kinds of view for which pairs are chosen together. The first round has the first of them, the second has all."""


class PairRound(NamedTuple):
    """The rows of the anagram board, the seeds and the steps that pairs are tried with."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int = STEPS


FIRST = PairRound(("averaging", "balance and contrast"), (31,), steps=10)
AGAIN = {
    "unet": PairRound(("averaging", "multi-task"), (32, 33)),
    "dit": PairRound(("averaging", "multi-task, no gradient"), (32, 33)),
}


def every_pair(kind: str) -> list[AnagramTask]:
    """Every two concepts once, in this kind of view."""
    return list(tasks({kind: itertools.combinations(vocabulary.CONCEPTS, 2)}))


def jobs(todo: Iterable[AnagramTask], by: PairRound) -> list[Job[AnagramTask]]:
    """Each task by each method of the round."""
    return [Job(method, task, by.seeds, by.steps) for task, method in itertools.product(todo, by.methods)]


@torch.inference_mode()
def worst_scores(job: Job[AnagramTask], model: str = "unet") -> tuple[Concepts, list[float]]:
    """For each picture the lowest probability of a view's concept, by judge or scorer."""
    pictures = torch.from_numpy(score_anagram.result_of(job, model).pictures).float() / 255
    runner = score_anagram.runner(job.seeds, model)
    scores = [runner.probabilities(network, job.task, pictures) for network in (runner.judge, runner.scorer)]
    return job.task.concepts, torch.cat(scores, 1).amin(1).tolist()


def ranked(tries: Iterable[tuple[Concepts, list[float]]]) -> list[tuple[Concepts, float, float]]:
    """Pairs from best to worst: (concepts, share of pictures with the worse view named, its mean score)."""
    worst: dict[Concepts, list[float]] = {}
    for concepts, scores in tries:
        worst.setdefault(concepts, []).extend(scores)
    worth = [(c, statistics.mean(p >= UNSURE_BELOW for p in ps), statistics.mean(ps)) for c, ps in worst.items()]
    return sorted(worth, key=lambda entry: entry[1:], reverse=True)


def finalists(name: str, kind: str, todo: list[AnagramTask], many: int, model: str) -> list[Concepts]:
    """The best of the first round."""
    first = jobs(todo, FIRST)
    with closing(parallel_map(partial(worst_scores, model=model), first)) as scores:
        tries = with_progress(scores, len(first), "tries", f"{name} ({kind})")
        return [concepts for concepts, _, _ in ranked(tries)[:many]]


def score_group(name: str, quick: bool, board: Board, model: str) -> None:
    """Adds the finalists of one group of views to the board, best first."""
    kinds = VIEWS[name]
    todo, many = (every_pair(kinds[0])[:20], 4) if quick else (every_pair(kinds[0]), FINALISTS)
    best = finalists(name, kinds[0], todo, many, model)
    again = jobs(tasks({kind: best for kind in kinds}), AGAIN[model])
    n = len(kinds) * len(AGAIN[model].methods) * len(AGAIN[model].seeds)
    with closing(parallel_map(partial(worst_scores, model=model), again)) as scores:
        results = ranked(scores)
    for concepts, both, alignment in results:
        with board.row(f"{name}: {' and '.join(concepts)}") as metrics:
            metrics |= {"both_right": both, "alignment": alignment, "n": n}


def main(arguments: list[str]) -> int:
    """Prints the finalists of each group of views, best first; ``--json FILE`` writes them."""
    parser = board_parser("pairs", "only the first 20 pairs, and 4 of them again")
    parser.add_argument("--views", choices=VIEWS, action="append", help="only pairs for these views (again for more)")
    add_model_option(parser, AGAIN)
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    board = Board("pairs", [*FIRST.seeds, *AGAIN[options.model].seeds])
    for name in options.views or VIEWS:
        score_group(name, options.quick, board, options.model)
    board.write(options.json)
    return 0
