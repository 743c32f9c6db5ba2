"""``dev.py score pairs``: which pairs of concepts the demo model can draw as one picture that reads both ways.

As with any model, some pairs bend into each other and most do not; the papers choose theirs by hand. Here every pair of the
vocabulary is tried once by plain averaging; the best are tried again, on other seeds, by averaging and by multi-task (pairs
that one of them chose alone would favour it), and both the judge and the reader must name them. The pairs of the anagram board
are the best of those; its seeds are others again.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch

from . import score_anagram, vocabulary
from .board import Board, counted
from .judge import UNSURE_BELOW
from .score_anagram import Concepts, Task, tasks
from .workers import spread

CHEAPEST = "averaging"
METHODS = (CHEAPEST, "multi-task")
FIRST, AGAIN = (31,), (32, 33)
FINALISTS = 60
VIEWS = {"turned": ("rotate_180", "flip"), "jigsaw": ("jigsaw",), "patch_permute": ("patch_permute",)}
"""The kinds of view for which pairs are chosen together. They are first tried in the first of them, and again in all."""


def every_pair(kind: str) -> list[Task]:
    """Every two concepts once, in this kind of view."""
    return list(tasks({kind: itertools.combinations(vocabulary.CONCEPTS, 2)}))


def finals(pairs: Iterable[Concepts], kinds: Iterable[str]) -> list[tuple[Task, str]]:
    """The pairs that are tried again, in each of these kinds of view, and by which method."""
    chosen = list(pairs)
    return list(itertools.product(tasks({kind: chosen for kind in kinds}), METHODS))


def first_try(task: Task) -> tuple[Concepts, list[float]]:
    """Per picture, how well the worse view reads to the judge."""
    return task.concepts, score_anagram.carry_out((task, CHEAPEST, FIRST)).alignment


@torch.inference_mode()
def second_try(order: tuple[Task, str]) -> tuple[Concepts, list[float]]:
    """Per picture, how well the worse view reads to the one that reads it worse, judge or reader."""
    task, method = order
    pictures = torch.from_numpy(score_anagram.carry_out((task, method, AGAIN)).pictures).float() / 255
    maker = score_anagram.maker(AGAIN)
    read = [maker.read_by(eye, task, pictures) for eye in (maker.judge, maker.reader)]
    return task.concepts, torch.cat(read, 1).amin(1).tolist()


def ranked(tries: Iterable[tuple[Concepts, list[float]]]) -> list[tuple[Concepts, float, float]]:
    """Pairs from best to worst: (concepts, share of pictures in which the worse view is named, how well it reads on average)."""
    worst: dict[Concepts, list[float]] = {}
    for concepts, read in tries:
        worst.setdefault(concepts, []).extend(read)
    worth = [(c, statistics.mean(p >= UNSURE_BELOW for p in read), statistics.mean(read)) for c, read in worst.items()]
    return sorted(worth, key=lambda entry: entry[1:], reverse=True)


def main(arguments: list[str]) -> int:
    """Prints the finalists of each group of views, best first; ``--json FILE`` writes them."""
    parser = argparse.ArgumentParser(prog="dev.py score pairs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="only the first 20 pairs, and 4 of them again")
    parser.add_argument("--views", choices=VIEWS, action="append", help="only pairs for these views (again for more)")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    board = Board("pairs", [*FIRST, *AGAIN])
    for name in options.views or VIEWS:
        kinds = VIEWS[name]
        todo, again = (every_pair(kinds[0])[:20], 4) if options.quick else (every_pair(kinds[0]), FINALISTS)
        first = counted(spread(first_try, todo), len(todo), "pairs", name)
        best = [concepts for concepts, _, _ in ranked(first)[:again]]
        for concepts, both, alignment in ranked(spread(second_try, finals(best, kinds))):
            with board.row(f"{name}: {' and '.join(concepts)}") as metrics:
                metrics |= {"both_right": both, "alignment": alignment, "n": len(kinds) * len(METHODS) * len(AGAIN)}
    board.write(options.json)
    return 0
