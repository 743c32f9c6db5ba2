"""``dev.py score pairs``: which pairs of concepts the demo model can draw as one picture that reads both ways.

As with any model, some pairs bend into each other and most do not; the papers choose theirs by hand. Here every pair of the
vocabulary is tried roughly, and the best are tried again on other seeds. In both rounds half of the pictures are made by plain
averaging and half by the multi-task remedies (pairs that one of them chose alone would favour it), and both the judge and the
scorer must name them. The pairs of the anagram board are the best of those; its seeds are others again.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from ..demo import vocabulary
from ..demo.judge import UNSURE_BELOW
from . import score_anagram
from .board import Board, counted
from .score_anagram import STEPS, Concepts, Order, Task, tasks
from .workers import spread

FINALISTS = 40
VIEWS = {
    "turned": ("rotate_180", "flip"), "rotate_cw": ("rotate_cw",), "jigsaw": ("jigsaw",), "patch_permute": ("patch_permute",),
}  # fmt: skip
"""The kinds of view for which pairs are chosen together. They are first tried in the first of them, and again in all."""


class Round(NamedTuple):
    """By which rows of the anagram board, on which seeds and with how many steps pairs are tried."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int = STEPS


FIRST = Round(("averaging", "balance and contrast"), (31,), steps=10)
AGAIN = Round(("averaging", "multi-task"), (32, 33))


def every_pair(kind: str) -> list[Task]:
    """Every two concepts once, in this kind of view."""
    return list(tasks({kind: itertools.combinations(vocabulary.CONCEPTS, 2)}))


def orders(todo: Iterable[Task], by: Round) -> list[Order]:
    """Each task by each method of the round."""
    return [Order(task, method, by.seeds, by.steps) for task, method in itertools.product(todo, by.methods)]


@torch.inference_mode()
def tried(order: Order) -> tuple[Concepts, list[float]]:
    """Per picture, how well the worse view reads to the one that reads it worse, judge or scorer."""
    pictures = torch.from_numpy(score_anagram.carry_out(order).pictures).float() / 255
    maker = score_anagram.maker(order.seeds)
    read = [maker.probabilities(judge, order.task, pictures) for judge in (maker.judge, maker.scorer)]
    return order.task.concepts, torch.cat(read, 1).amin(1).tolist()


def ranked(tries: Iterable[tuple[Concepts, list[float]]]) -> list[tuple[Concepts, float, float]]:
    """Pairs from best to worst: (concepts, share of pictures in which the worse view is named, how well it reads on average)."""
    worst: dict[Concepts, list[float]] = {}
    for concepts, read in tries:
        worst.setdefault(concepts, []).extend(read)
    worth = [(c, statistics.mean(p >= UNSURE_BELOW for p in read), statistics.mean(read)) for c, read in worst.items()]
    return sorted(worth, key=lambda entry: entry[1:], reverse=True)


def finalists(name: str, kind: str, todo: list[Task], many: int) -> list[Concepts]:
    """The best of the first round."""
    first = orders(todo, FIRST)
    return [c for c, _, _ in ranked(counted(spread(tried, first), len(first), "tries", f"{name} ({kind})"))[:many]]


def main(arguments: list[str]) -> int:
    """Prints the finalists of each group of views, best first; ``--json FILE`` writes them."""
    parser = argparse.ArgumentParser(prog="dev.py score pairs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="only the first 20 pairs, and 4 of them again")
    parser.add_argument("--views", choices=VIEWS, action="append", help="only pairs for these views (again for more)")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    board = Board("pairs", [*FIRST.seeds, *AGAIN.seeds])
    for name in options.views or VIEWS:
        kinds = VIEWS[name]
        todo, many = (every_pair(kinds[0])[:20], 4) if options.quick else (every_pair(kinds[0]), FINALISTS)
        best = finalists(name, kinds[0], todo, many)
        again = orders(tasks({kind: best for kind in kinds}), AGAIN)
        for concepts, both, alignment in ranked(spread(tried, again)):
            with board.row(f"{name}: {' and '.join(concepts)}") as metrics:
                metrics |= {
                    "both_right": both,
                    "alignment": alignment,
                    "n": len(kinds) * len(AGAIN.methods) * len(AGAIN.seeds),
                }
    board.write(options.json)
    return 0
