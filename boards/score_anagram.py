"""``dev.py score anagram``: in how many anagrams the judge names every reading, for each way of combining the views."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import comfy.samplers
import numpy as np
import torch

from ..demo.judge import CLASSES, READER, Judge
from ..demo.sampling import DemoSampler, encode, noise_for
from ..host.anagram.guider import ViewsGuider
from ..host.anagram.request import anagram_request
from ..host.anagram.views import ViewPrompt
from ..host.engine.time_travel import travelling_sampler
from ..host.engine.vae import cell_side
from ..host.text.tokens import encode_with_phrase
from ..methods.anagram.balance import ViewScorer
from ..methods.anagram.combine import AVERAGING, MULTI_TASK_FAST, MULTI_TASK_FULL, Combination
from ..methods.anagram.score import Readings
from .anagram_metrics import AnagramMetrics, AnagramResult
from .anagram_tasks import PAIRS, TRIPLES, TURNED, AnagramTask, caption_of, tasks
from .board import Board, Job, Row, board_parser, parsed_with_rows
from .demo_models import counting_clone

STEPS, CFG = 20, 5.0  # the templates take 30 steps; 20 keep a full board within its time
SEEDS = [11, 12]


@dataclass(frozen=True)
class AnagramMethod:
    """A row of the board: how the views are combined, and how the pictures are made.

    Args:
        repeats: how often the sampler takes each step of its middle.
        use_scorer: the views are weighed by their scores, the paper's balance. No CLIP knows the demo model's pictures:
            a second judge takes its place. So the judge that names the pictures has not steered them.
        candidates: pictures made for each seed. The scorer picks one of them, as a user does from a contact sheet.
    """

    combination: Combination
    repeats: int = 1
    use_scorer: bool = False
    candidates: int = 1


METHODS = {
    "averaging": AnagramMethod(AVERAGING),
    "rectify": AnagramMethod(Combination(rectification="match")),
    "rectify, as the paper": AnagramMethod(Combination(rectification="unit")),
    "balance": AnagramMethod(AVERAGING, use_scorer=True),
    "guidance norm": AnagramMethod(Combination("guidance norm")),
    "contrast": AnagramMethod(Combination(contrast=0.5)),
    "balance and contrast": AnagramMethod(Combination(contrast=0.5), use_scorer=True),
    "anti-segregation": AnagramMethod(Combination(anti_segregation=MULTI_TASK_FULL.anti_segregation)),
    "multi-task": AnagramMethod(MULTI_TASK_FULL, use_scorer=True),
    "multi-task, unread": AnagramMethod(MULTI_TASK_FULL),
    "multi-task, no gradient": AnagramMethod(MULTI_TASK_FAST, use_scorer=True),
    "time travel": AnagramMethod(AVERAGING, repeats=2),
}
METHODS |= {
    f"{name}, best of four": replace(METHODS[name], candidates=4) for name in ("averaging", "balance and contrast")
}
ROWS = {
    "unet": tuple(METHODS),
    "dit": tuple(name for name, method in METHODS.items() if not method.combination.anti_segregation.strength),
}
"""By the kind of demo model: anti-segregation asks for the cross-attention of a UNet."""
TRAVEL = (0.2, 0.8)  # sampling percent
AS_COSINES = (0.2, 0.3)
"""CLIP's cosines of a picture with a caption it does not show, and with its own. The balance is made for such scores.
A classifier's probabilities are a hundredfold apart and would throw the weights from one end to the other."""


class AnagramRunner:
    """Samples anagrams with the demo model and has the judge name them."""

    def __init__(self, seeds: list[int], kind: str = "unet") -> None:
        self.demo, self.seeds = DemoSampler(kind=kind), seeds
        self.judge, self.scorer = Judge.load(), Judge.load(READER)

    def guider(self, task: AnagramTask, method: AnagramMethod, model: Any) -> ViewsGuider:
        settings = method.combination
        if method.use_scorer:
            settings = settings.weighed_by(ViewScorer(partial(self.score, task)))
        negative = encode(self.demo.clip, "")
        prompts = [
            ViewPrompt(
                view, encode_with_phrase(self.demo.clip, caption_of(concept, task.background), concept), negative
            )
            for view, concept in zip(task.views(), task.concepts, strict=True)
        ]
        request = anagram_request(prompts, settings)
        return ViewsGuider(model, request.prompts, request.combine, CFG, request.gradient_step)

    @torch.inference_mode()
    def run(self, task: AnagramTask, method: AnagramMethod, steps: int = STEPS) -> AnagramResult:
        """Samples the pictures of one task and has the judge name them."""
        model, rows = counting_clone(self.demo.model)
        seeds = [seed + 100 * more for seed in self.seeds for more in range(method.candidates)]
        noise, scheduler = noise_for(seeds, kind=self.demo.kind), self.demo.settings.scheduler
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
        sampler = travelling_sampler(comfy.samplers.sampler_object("euler"), *TRAVEL, method.repeats)
        latents = self.guider(task, method, model).sample(
            noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1
        )
        pictures = self.demo.vae.decode(latents).float()
        if method.candidates > 1:
            pictures = self._best_of(method.candidates, task, pictures)
        return self._measured(task, pictures, rows)

    def _best_of(self, candidates: int, task: AnagramTask, pictures: torch.Tensor) -> torch.Tensor:
        """Of every so many pictures the one whose worse view has the best score."""
        best = self.probabilities(self.scorer, task, pictures).amin(1).view(-1, candidates).argmax(1)
        return pictures.unflatten(0, (-1, candidates))[torch.arange(len(best)), best]

    def score(self, task: AnagramTask, clean: torch.Tensor) -> torch.Tensor:
        """The scorer's score of clean latents (batch, …) of the model's own scale in each view, (batch, views)."""
        none, well = AS_COSINES
        pictures = self.demo.vae.decode(self.demo.model.model.process_latent_out(clean)).float()
        return none + (well - none) * self.probabilities(self.scorer, task, pictures)

    def probabilities(self, scorer: Judge, task: AnagramTask, pictures: torch.Tensor) -> torch.Tensor:
        """The probability of each view's concept in pictures (batch, h, w, 3) by a scorer or judge, (batch, views)."""
        each = zip(self._upright(task, pictures), task.concepts, strict=True)
        return torch.stack([scorer.probabilities(shown)[:, CLASSES.index(concept)] for shown, concept in each], 1)

    def _upright(self, task: AnagramTask, pictures: torch.Tensor) -> list[torch.Tensor]:
        views = task.views(cell_side(self.demo.vae))
        return [view.show(pictures.movedim(-1, 1)).movedim(1, -1) for view in views]

    def _measured(self, task: AnagramTask, pictures: torch.Tensor, rows: list[int]) -> AnagramResult:
        upright = self._upright(task, pictures)
        named = [
            [verdict.name == concept for verdict in self.judge.look(shown)]
            for shown, concept in zip(upright, task.concepts, strict=True)
        ]
        columns = [CLASSES.index(c) for c in task.concepts]
        similarity = torch.stack([self.judge.probabilities(shown)[:, columns] for shown in upright], 1)
        scores = Readings(similarity, temperature=0.25)
        return AnagramResult(
            task,
            list(zip(*named, strict=True)),
            scores.alignment.tolist(),
            scores.concealment.tolist(),
            len(rows),
            sum(rows),
            (pictures * 255).round().byte().numpy(),
        )


@cache
def runner(seeds: tuple[int, ...], kind: str = "unet") -> AnagramRunner:
    """The runner of this process for these seeds, with a kind of demo model."""
    return AnagramRunner(list(seeds), kind)


def result_of(job: Job[AnagramTask], kind: str = "unet") -> AnagramResult:
    """The pictures of a job and what was measured in them."""
    return runner(job.seeds, kind).run(job.task, METHODS[job.method], job.steps or STEPS)


def run_job(job: Job[AnagramTask], kind: str = "unet") -> tuple[AnagramMetrics, np.ndarray]:
    """One task by one method."""
    result = result_of(job, kind)
    return AnagramMetrics([result]), result.pictures


def rows(options: argparse.Namespace, seeds: tuple[int, ...]) -> Iterator[Row]:
    """The rows to measure: each method on the same tasks."""
    chosen = PAIRS[options.pairs_of]
    kinds = [kind for kind in chosen if kind in (options.kind or chosen)][: 2 if options.quick else None]
    triples = 0 if options.kind else 2 if options.quick else len(TRIPLES)
    pairs = min(options.pairs, 6) if options.quick else options.pairs
    todo = list(tasks({kind: chosen[kind][:pairs] for kind in kinds}, TRIPLES[:triples]))
    for method in options.method:
        yield Row(method, partial(run_job, kind=options.model), [Job(method, task, seeds) for task in todo])


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    parser = board_parser("anagram", "6 pairs in 2 kinds of view, 2 sets of three, 1 seed", list(METHODS))
    parser.add_argument("--pairs", type=int, default=len(TURNED), help="only the first so many pairs of a view")
    parser.add_argument(
        "--kind", choices=PAIRS["unet"], action="append", help="only this kind of view (again for more)"
    )
    parser.add_argument("--pairs-of", choices=PAIRS, default="unet", help="the pairs that this demo model draws best")
    options = parsed_with_rows(parser, arguments, ROWS)
    if lacking := [kind for kind in options.kind or () if kind not in PAIRS[options.pairs_of]]:
        parser.error(f"no pairs of {options.pairs_of} are known for {lacking[0]}; {', '.join(PAIRS[options.pairs_of])}")
    logging.disable(logging.INFO)
    seeds = tuple(SEEDS[:1] if options.quick else SEEDS)
    Board("anagram", list(seeds)).run(list(rows(options, seeds)), options)
    return 0
