"""``dev.py score compose``: LoRA-Composer, with each ingredient off, against what users have today; and T2I-Zero without LoRAs."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..demo.sampling import CFG, encode
from ..host.compose.guider import ComposeGuider
from ..methods.compose.settings import Compose, LossWeights
from . import object_prompts as objects_present
from .board import Board
from .concept_guiders import Maker, Variant, Way, score_row
from .concept_tasks import SEEDS, STAND_INS, Tally, Task, tasks, tasks_of_three

FULL = Compose(token_lora=False)
WHOLE_LORA = Compose()
COMPOSERS: dict[str, Compose] = {
    "composer": FULL,
    "composer + token LoRA": WHOLE_LORA,
    "composer, no isolation": dataclasses.replace(WHOLE_LORA, isolation=False),
    "composer, no first noise": dataclasses.replace(WHOLE_LORA, reinit="off"),
    "composer, copied noise": dataclasses.replace(WHOLE_LORA, reinit="copy"),
    "composer, no gradient": dataclasses.replace(WHOLE_LORA, enhancement=0.0),
    "composer, no fill loss": dataclasses.replace(WHOLE_LORA, weights=LossWeights(fill=0.0)),
    "composer, no region loss": dataclasses.replace(WHOLE_LORA, weights=LossWeights(region=0.0)),
    "composer, reference stop": dataclasses.replace(WHOLE_LORA, stop="rise"),
}
AUTOMATIC = "composer automatic"
ROWS = ("stacked LoRAs", "host hooks", *COMPOSERS, AUTOMATIC, "conductor")


@cache
def _maker() -> Maker:
    return Maker()


def composed(maker: Maker, settings: Compose, automatic: bool, task: Task, model: Any) -> ComposeGuider:
    """LoRA-Composer; ``automatic``: it finds the regions itself."""
    clip = maker.painter.clip
    concepts = [maker.concept(name, scene_with(task, n)) for n, name in enumerate(task.concepts)]
    covered = None if automatic else partial(maker.covered, task)
    return ComposeGuider(model, encode(clip, task.base_prompt()), encode(clip, ""), CFG, concepts, covered, settings)


def scene_with(task: Task, number: int) -> str:
    """The scene with one of its concepts at its place, and nouns the base model knows at the others."""
    return task.scene(tuple(c if n == number else STAND_INS[c] for n, c in enumerate(task.concepts)))


def ways(maker: Maker) -> dict[str, Way]:
    """Every row with LoRAs, by name."""
    found: dict[str, Way] = {"stacked LoRAs": maker.stacked, "host hooks": maker.hooked}
    found |= {name: partial(composed, maker, settings, False) for name, settings in COMPOSERS.items()}
    return found | {
        AUTOMATIC: partial(composed, maker, WHOLE_LORA, True),
        "conductor": partial(maker.conducted, variant=Variant()),
    }


def carry_out(order: tuple[str, Task]) -> tuple[Tally, np.ndarray]:
    """One task in one way."""
    name, task = order
    return _maker().make(ways(_maker())[name], task)


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    parser = argparse.ArgumentParser(prog="dev.py score compose")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="4 pairs in 1 layout, 1 seed, 2 triples, few prompts without LoRA"
    )
    parser.add_argument("--pairs", type=int, help="how many pairs instead")
    parser.add_argument("--sheets", type=Path, help="a folder for sheets of all pictures")
    parser.add_argument(
        "--method", choices=[*ROWS, *objects_present.ROWS], action="append", help="only this row (again for more)"
    )
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    board, pairs = Board("compose", list(SEEDS)), options.pairs or (4 if options.quick else 20)
    two = list(tasks(pairs, 1, 1) if options.quick else tasks(pairs))
    three = list(tasks_of_three(2, 1) if options.quick else tasks_of_three())
    for name in ROWS:
        for title, some in ((name, two), (f"{name}, three", three)):
            if options.method and name not in options.method:
                continue
            with board.row(title) as metrics:
                metrics |= score_row(carry_out, name, some, options.sheets and options.sheets / f"{title}.png")
            board.write(options.json)
    for name in objects_present.ROWS:
        if not options.method or name in options.method:
            with board.row(name) as metrics:
                metrics |= objects_present.score_row(name, 4 if options.quick else 20)
            board.write(options.json)
    return 0
