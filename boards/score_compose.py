"""``dev.py score compose``: LoRA-Composer with each ingredient off, against what users have today; and T2I-Zero."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from ..demo.sampling import CFG, encode
from ..host.compose.guider import ComposeGuider
from ..host.engine.base_prompts import BasePrompts
from ..methods.compose.settings import Compose, LossWeights
from . import object_prompts
from .board import Board, Job, Row, board_parser
from .concept_guiders import ConceptRunner, ConductVariant, GuiderFactory
from .concept_tasks import SEEDS, STAND_INS, ConceptMetrics, ConceptTask, tasks, tasks_of_three

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
    "composer, losses summed over words": dataclasses.replace(WHOLE_LORA, weights=LossWeights(words="sum")),
    "composer, reference stop": dataclasses.replace(WHOLE_LORA, stop="rise"),
}
AUTOMATIC = "composer automatic"
ROWS = ("stacked LoRAs", "host hooks", *COMPOSERS, AUTOMATIC, "conductor")


@cache
def _runner() -> ConceptRunner:
    return ConceptRunner()


def composer_guider(
    runner: ConceptRunner, settings: Compose, automatic: bool, task: ConceptTask, model: Any
) -> ComposeGuider:
    """LoRA-Composer; ``automatic``: it finds the regions itself."""
    clip = runner.demo.clip
    concepts = [runner.concept(name, scene_with(task, n)) for n, name in enumerate(task.concepts)]
    coverage = None if automatic else partial(runner.coverage_at, task)
    base = BasePrompts(encode(clip, task.base_prompt()), encode(clip, ""), CFG)
    return ComposeGuider(model, base, concepts, coverage, settings)


def scene_with(task: ConceptTask, number: int) -> str:
    """The scene with one of its concepts at its place, and nouns the base model knows at the others."""
    return task.scene(tuple(c if n == number else STAND_INS[c] for n, c in enumerate(task.concepts)))


def methods(runner: ConceptRunner) -> dict[str, GuiderFactory]:
    """Every row with LoRAs, by name."""
    found: dict[str, GuiderFactory] = {
        "stacked LoRAs": runner.stacked_loras_guider,
        "host hooks": runner.hooks_guider,
    }
    found |= {name: partial(composer_guider, runner, settings, False) for name, settings in COMPOSERS.items()}
    return found | {
        AUTOMATIC: partial(composer_guider, runner, WHOLE_LORA, True),
        "conductor": partial(runner.conductor_guider, variant=ConductVariant()),
    }


def run_job(job: Job[ConceptTask]) -> tuple[ConceptMetrics, np.ndarray]:
    """One task by one method."""
    return _runner().run(methods(_runner())[job.method], job.task)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """The rows to measure: each method with two and with three concepts, then those without LoRAs."""
    quick, chosen = options.quick, options.method or [*ROWS, *object_prompts.ROWS]
    two = list(tasks(options.pairs or 4, 1, 1) if quick else tasks(options.pairs or 20))
    three = list(tasks_of_three(2, 1) if quick else tasks_of_three())
    for name in (name for name in ROWS if name in chosen):
        for title, some in ((name, two), (f"{name}, three", three)):
            yield Row(title, run_job, [Job(name, task) for task in some])
    for name in (name for name in object_prompts.ROWS if name in chosen):
        prompts = object_prompts.prompts(4 if quick else 20)
        yield Row(name, object_prompts.run_job, [Job(name, prompt) for prompt in prompts])


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    quick = "4 pairs in 1 layout, 1 seed, 2 triples, few prompts without LoRA"
    parser = board_parser("compose", quick, [*ROWS, *object_prompts.ROWS])
    parser.add_argument("--pairs", type=int, help="how many pairs instead")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    Board("compose", list(SEEDS)).run(list(rows(options)), options)
    return 0
