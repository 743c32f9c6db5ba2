"""``dev.py score conduct``: how often several concepts stand right in one picture, by Concept Conductor and by what the host has."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from .board import Board
from .concept_guiders import CONDUCTOR, Maker, Variant, Way, score_row
from .concept_tasks import SEEDS, Tally, Task, tasks, tasks_of_one, tasks_of_three

OFF = {"refine_start": 0.0, "refine_end": 0.0}
VARIANTS = {
    "conductor": Variant(),
    "attentions only": Variant(replace(CONDUCTOR, whole_transformers=False)),
    "no alignment": Variant(replace(CONDUCTOR, guidance_weight=0.0)),
    "no refinement": Variant(replace(CONDUCTOR, **OFF)),
    "regions alone": Variant(replace(CONDUCTOR, guidance_weight=0.0, **OFF), layout=False),
    "no injection": Variant(replace(CONDUCTOR, injection_start=1.0, injection_end=0.0)),
}
ALONE = "single concept"
"""Each concept by itself with its LoRA by the host's loader: what there is to lose when several stand in one picture."""
ROWS = (ALONE, "stacked LoRAs", "host hooks", "area composition", *VARIANTS)
THREE = ("stacked LoRAs", "host hooks", "conductor", "regions alone")  # rows that are also measured with three concepts


@cache
def _maker() -> Maker:
    return Maker()


def ways(maker: Maker) -> dict[str, Way]:
    """Every row of the board."""
    host = {
        ALONE: maker.stacked,
        "stacked LoRAs": maker.stacked,
        "host hooks": maker.hooked,
        "area composition": maker.areas,
    }
    return host | {name: partial(maker.conducted, variant=variant) for name, variant in VARIANTS.items()}


def carry_out(order: tuple[str, Task]) -> tuple[Tally, np.ndarray]:
    """One task in one way."""
    name, task = order
    return _maker().make(ways(_maker())[name], task)


def scored(name: str, todo: Sequence[Task], sheet: Path | None) -> dict:
    """The metrics of one row. A pair of two independent single concepts is right as often as one, ``squared``."""
    found = score_row(carry_out, name, todo, sheet)
    if name == ALONE:
        found |= {"squared": found["all_right"] ** 2}
        del found["layout_iou"], found["leak"]
    return found


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    parser = argparse.ArgumentParser(prog="dev.py score conduct")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="6 pairs in one layout with one seed, each concept and one set of three once",
    )
    parser.add_argument("--pairs", type=int, default=20, help="how many of the 28 pairs")
    parser.add_argument("--sheets", type=Path, help="a folder for sheets of all pictures")
    parser.add_argument("--method", choices=ROWS, action="append", help="only this row (again for more)")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    todo = list(tasks(6, 1, 1) if options.quick else tasks(options.pairs))
    three = list(tasks_of_three(1, 1) if options.quick else tasks_of_three())
    one = list(tasks_of_one(1, 1) if options.quick else tasks_of_one())
    board = Board("conduct", list(SEEDS[:1] if options.quick else SEEDS))
    plan = [(name, name, one if name == ALONE else todo) for name in options.method or ROWS]
    plan += [(f"{name}, three", name, three) for name in THREE if name in (options.method or THREE)]
    for title, name, some in plan:
        with board.row(title) as metrics:
            metrics |= scored(name, some, options.sheets and options.sheets / f"{title}.png")
        board.write(options.json)
    return 0
