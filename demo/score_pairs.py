"""``dev.py score pairs``: which pairs of concepts the demo model can draw as one picture that reads both ways.

As with any model, some pairs bend into each other and most do not; the papers choose theirs by hand. Here every pair of the
vocabulary is tried once by plain averaging; the best are tried again, on other seeds and in two views, and both the judge and
the reader must name them. The pairs of the anagram board are the best of those; its seeds are others again.
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
from .score_anagram import Task, tasks
from .workers import spread

METHOD = "averaging"
FIRST, AGAIN = (31,), (32, 33)
FINALISTS = 60
KINDS = ("flip", "rotate_180")

Concepts = tuple[str, ...]


def every_pair() -> list[Task]:
    """Every two concepts once, turned round."""
    return list(tasks(itertools.combinations(vocabulary.CONCEPTS, 2), ("rotate_180",)))


def finals(pairs: Iterable[Concepts]) -> list[Task]:
    """The pairs that are tried again, in each of the two views."""
    return list(tasks(pairs, KINDS))


def first_try(task: Task) -> tuple[Concepts, list[float]]:
    """Per picture, how well the worse view reads to the judge."""
    return task.concepts, score_anagram.carry_out((task, METHOD, FIRST)).alignment


@torch.inference_mode()
def second_try(task: Task) -> tuple[Concepts, list[float]]:
    """Per picture, how well the worse view reads to the one that reads it worse, judge or reader."""
    pictures = torch.from_numpy(score_anagram.carry_out((task, METHOD, AGAIN)).pictures).float() / 255
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
    """Prints the finalists, best first; ``--json FILE`` writes them."""
    parser = argparse.ArgumentParser(prog="dev.py score pairs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="only the first 20 pairs, and 4 of them again")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    todo, again = (every_pair()[:20], 4) if options.quick else (every_pair(), FINALISTS)
    first = counted(spread(first_try, todo), len(todo), "pairs")
    best = [concepts for concepts, _, _ in ranked(first)[:again]]
    board = Board("pairs", [*FIRST, *AGAIN])
    for concepts, both, alignment in ranked(spread(second_try, finals(best))):
        with board.row(" and ".join(concepts)) as metrics:
            metrics |= {"both_right": both, "alignment": alignment, "n": len(KINDS) * len(AGAIN)}
    board.write(options.json)
    return 0
