"""``dev.py score conduct``: how often several concepts are right in one picture, with Concept Conductor or without."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

import numpy as np

from .board import Board, Figures, Job, Row, board_parser, parsed_with_rows
from .concept_guiders import CONDUCTOR, ConceptRunner, ConductVariant, GuiderFactory
from .concept_tasks import SEEDS, ConceptMetrics, ConceptTask, tasks, tasks_of_one, tasks_of_three

OFF = {"refine_start": 0.0, "refine_end": 0.0}
VARIANTS = {
    "conductor": ConductVariant(),
    "attentions only": ConductVariant(replace(CONDUCTOR, whole_transformers=False)),
    "no alignment": ConductVariant(replace(CONDUCTOR, guidance_weight=0.0)),
    "no refinement": ConductVariant(replace(CONDUCTOR, **OFF)),
    "regions alone": ConductVariant(replace(CONDUCTOR, guidance_weight=0.0, **OFF), layout=False),
    "no injection": ConductVariant(replace(CONDUCTOR, injection_start=1.0, injection_end=0.0)),
}
ALONE = "single concept"
"""Each concept by itself with its LoRA by the host's loader: the most that several in one picture can reach."""
HOST = (ALONE, "stacked LoRAs", "host hooks", "area composition")
ROWS = {kind: (*HOST, *VARIANTS) for kind in ("unet", "dit")}
"""By the kind of demo model."""
ROWS_OF_THREE = (
    "stacked LoRAs",
    "host hooks",
    "conductor",
    "regions alone",
)  # rows that are also measured with three concepts


@cache
def _runner(kind: str = "unet") -> ConceptRunner:
    return ConceptRunner(kind)


def methods(runner: ConceptRunner) -> dict[str, GuiderFactory]:
    """Every row of the board."""
    host: dict[str, GuiderFactory] = {
        ALONE: runner.stacked_loras_guider,
        "stacked LoRAs": runner.stacked_loras_guider,
        "host hooks": runner.hooks_guider,
        "area composition": runner.area_guider,
    }
    return host | {name: partial(runner.conductor_guider, variant=variant) for name, variant in VARIANTS.items()}


def run_job(job: Job[ConceptTask], kind: str = "unet") -> tuple[ConceptMetrics, np.ndarray]:
    """One task by one method, on a kind of demo model."""
    runner = _runner(kind)
    return runner.run(methods(runner)[job.method], job.task)


def figures_of_one(metrics: ConceptMetrics) -> Figures:
    """Figures of single concepts. Two independent ones are both right as often as ``squared`` says."""
    found = metrics.figures()
    found |= {"squared": found["all_right"] ** 2}
    del found["layout_iou"], found["leak"]
    return found


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """The rows to measure: each method with pairs (or single concepts), then some with three concepts."""
    two = list(tasks(6, 1, 1) if options.quick else tasks(options.pairs))
    three = list(tasks_of_three(1, 1) if options.quick else tasks_of_three())
    one = list(tasks_of_one(1, 1) if options.quick else tasks_of_one())
    run = partial(run_job, kind=options.model)
    for name in options.method:
        if name == ALONE:
            yield Row(name, run, [Job(name, task) for task in one], figures_of_one)
        else:
            yield Row(name, run, [Job(name, task) for task in two])
    for name in (name for name in ROWS_OF_THREE if name in options.method):
        yield Row(f"{name}, three", run, [Job(name, task) for task in three])


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    quick = "6 pairs in one layout with one seed, each concept and one set of three once"
    parser = board_parser("conduct", quick, ROWS["unet"])
    parser.add_argument("--pairs", type=int, default=20, help="how many of the 28 pairs")
    options = parsed_with_rows(parser, arguments, ROWS)
    logging.disable(logging.INFO)
    Board("conduct", list(SEEDS[:1] if options.quick else SEEDS)).run(list(rows(options)), options)
    return 0
