"""``dev.py score compose``: LoRA-Composer with each ingredient off, against what users have today; and T2I-Zero."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from ..demo.sampling import encode
from ..host.compose.guider import ComposeGuider
from ..host.compose.joint import JointGuider
from ..host.engine.base_prompts import BasePrompts
from ..host.registry import attends_jointly
from ..methods.compose.settings import Compose, LossWeights
from . import object_prompts
from .board import Board, Job, Row, board_parser, parsed_with_rows
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
JOINT_COMPOSERS: dict[str, Compose] = {
    "composer": FULL,
    "composer + token LoRA": WHOLE_LORA,
    "composer, no isolation": dataclasses.replace(WHOLE_LORA, isolation=False),
    "composer, base in regions": dataclasses.replace(WHOLE_LORA, base_in_regions=True),
}
"""Where text and picture attend together; the other ingredients do nothing there."""
HOST = ("stacked LoRAs", "host hooks")
BARE = ", background as base"
"""Ends the name of a row whose base prompt names no object: where a region is not, none is drawn."""
BARE_ROWS = ("host hooks", "composer", "composer + token LoRA", "composer, no isolation", "conductor")
CONCEPT_ROWS = {
    "unet": (*HOST, *COMPOSERS, AUTOMATIC, "conductor"),
    "dit": (
        *HOST,
        *JOINT_COMPOSERS,
        AUTOMATIC,
        "conductor",
        *(f"{name}{BARE}" for name in BARE_ROWS),
    ),
}
"""The rows with LoRAs, by the kind of demo model."""
ROWS = {kind: (*names, *object_prompts.ROWS) for kind, names in CONCEPT_ROWS.items()}


@cache
def _runner(kind: str = "unet") -> ConceptRunner:
    return ConceptRunner(kind)


def composer_guider(
    runner: ConceptRunner, settings: Compose, automatic: bool, task: ConceptTask, model: Any
) -> ComposeGuider | JointGuider:
    """LoRA-Composer; ``automatic``: it finds the regions itself."""
    clip = runner.demo.clip
    concepts = [runner.concept(name, scene_with(task, n)) for n, name in enumerate(task.concepts)]
    coverage = None if automatic else partial(runner.coverage_at, task)
    base = BasePrompts(encode(clip, task.base_prompt()), encode(clip, ""), runner.demo.settings.cfg)
    guider = JointGuider if attends_jointly(model) else ComposeGuider
    return guider(model, base, concepts, coverage, settings)


def scene_with(task: ConceptTask, number: int) -> str:
    """The scene with one of its concepts at its place, and nouns the base model knows at the others."""
    return task.scene(tuple(c if n == number else STAND_INS[c] for n, c in enumerate(task.concepts)))


def methods(runner: ConceptRunner) -> dict[str, GuiderFactory]:
    """Every row with LoRAs of the runner's demo model, by name."""
    found: dict[str, GuiderFactory] = {
        "stacked LoRAs": runner.stacked_loras_guider,
        "host hooks": runner.hooks_guider,
    }
    composers = COMPOSERS if runner.demo.kind == "unet" else JOINT_COMPOSERS
    found |= {name: partial(composer_guider, runner, settings, False) for name, settings in composers.items()}
    return found | {
        AUTOMATIC: partial(composer_guider, runner, WHOLE_LORA, True),
        "conductor": partial(runner.conductor_guider, variant=ConductVariant()),
    }


def run_job(job: Job[ConceptTask], kind: str = "unet") -> tuple[ConceptMetrics, np.ndarray]:
    """One task by one method, on a kind of demo model."""
    runner = _runner(kind)
    return runner.run(methods(runner)[job.method], job.task)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """The rows to measure: each method with two and with three concepts, then those without LoRAs."""
    quick, chosen, run = options.quick, options.method, partial(run_job, kind=options.model)
    two = list(tasks(options.pairs or 4, 1, 1) if quick else tasks(options.pairs or 20))
    three = list(tasks_of_three(2, 1) if quick else tasks_of_three())
    for name in (name for name in chosen if name in CONCEPT_ROWS[options.model]):
        method, bare = name.removesuffix(BARE), name.endswith(BARE)
        for title, some in ((name, two), (f"{name}, three", three)):
            yield Row(title, run, [Job(method, dataclasses.replace(task, bare=bare)) for task in some])
    for name in (name for name in chosen if name in object_prompts.ROWS):
        prompts = object_prompts.prompts(4 if quick else 20)
        run_objects = partial(object_prompts.run_job, kind=options.model)
        yield Row(name, run_objects, [Job(name, prompt) for prompt in prompts])


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    quick = "4 pairs in 1 layout, 1 seed, 2 triples, few prompts without LoRA"
    parser = board_parser("compose", quick, list(dict.fromkeys(name for names in ROWS.values() for name in names)))
    parser.add_argument("--pairs", type=int, help="how many pairs instead")
    options = parsed_with_rows(parser, arguments, ROWS)
    logging.disable(logging.INFO)
    Board("compose", list(SEEDS)).run(list(rows(options)), options)
    return 0
