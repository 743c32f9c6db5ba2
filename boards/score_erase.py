"""``dev.py score erase``: whether erased concepts are gone and the others still there, by the judge's eye.

Every row erases 1, 3, 5 or 10 concepts, each into a neighbour that stays. Preserved concepts are listed in 200 prompts
for Preserve Concepts; four concepts are left out of them on purpose and measured apart (``kept_unlisted``).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from ..demo import vocabulary
from ..demo.judge import background_of
from . import erase_attacks, erase_trained
from .board import Board, Figures, Job, Row, board_parser
from .erase_methods import METHODS, TRAINED, EditedModel, EraseRunner
from .erase_metrics import RELATIVE, EraseMetrics, low_pass_correlation, silhouette
from .erase_prompts import GROUPS, ErasePrompt, Pairs, prompts_of_group

ATTACKED = {1: 6, 3: 2, 5: 2, 10: 1}  # groups of a row at most: an attack learns for half a minute
LEAST_PRESERVED = 36  # pictures of preserved concepts in a row at least: fewer say little about a share of 90 %
FIRST_SEED, ATTACK_SEEDS = 100, [700, 701]


@dataclass(frozen=True)
class EraseTask:
    """One group of a row: what it erases, how many preserved concepts are drawn, and whether it is attacked."""

    pairs: Pairs
    preserved: int
    attacked: bool


@cache
def _runner() -> EraseRunner:
    return EraseRunner()


@torch.inference_mode()
def run_job(job: Job[EraseTask]) -> tuple[EraseMetrics, np.ndarray]:
    """Erases, draws and counts; with the first pictures, (n, h, w, 3) of bytes."""
    runner, metrics, task = _runner(), EraseMetrics(), job.task
    edited = (METHODS | TRAINED)[job.method](runner, task.pairs)
    metrics.minutes.append(edited.minutes)
    prompts = list(prompts_of_group(task.pairs, task.preserved))
    conds = runner.encoded_texts(edited.clip, [p.text for p in prompts])
    latents = runner.sample(edited, conds, list(range(FIRST_SEED, FIRST_SEED + len(prompts))))
    _compare(runner, prompts, latents, metrics)
    pictures = runner.decoded(latents)
    _judge(runner, prompts, pictures, dict(task.pairs), metrics)
    if task.attacked:
        _attack(runner, edited, task.pairs[0][0], metrics)
    return metrics, (pictures[:12] * 255).round().byte().numpy()


def _judge(
    runner: EraseRunner,
    prompts: list[ErasePrompt],
    pictures: torch.Tensor,
    anchors: dict[str, str],
    metrics: EraseMetrics,
) -> None:
    """What the judge names in each picture."""
    for prompt, picture in zip(prompts, pictures, strict=True):
        (verdict,) = runner.judge.look(picture[None], prompt.box)
        metrics.named.setdefault(prompt.role, []).append(verdict.name == prompt.concept)
        if prompt.role == "erased":  # whether a whole thing is still there: blobs keep a layout too
            metrics.anchored.append(verdict.name == anchors[prompt.concept])
        if prompt.role != "paraphrase":
            metrics.background.append(background_of(picture) == prompt.background)


def _compare(runner: EraseRunner, prompts: list[ErasePrompt], latents: torch.Tensor, metrics: EraseMetrics) -> None:
    """How alike, coarsely, the pictures of erased concepts are to the plain model's from the same noise.

    Once in all their channels, and once in where something is.
    """
    erased = [number for number, prompt in enumerate(prompts) if prompt.role == "erased"]
    texts, seeds = (prompts[number].text for number in erased), (FIRST_SEED + number for number in erased)
    plain = runner.plain_latents(tuple(texts), tuple(seeds))
    metrics.layout += low_pass_correlation(latents[erased], plain).tolist()
    metrics.silhouette += low_pass_correlation(silhouette(latents[erased]), silhouette(plain)).tolist()


def _attack(runner: EraseRunner, edited: EditedModel, concept: str, metrics: EraseMetrics) -> None:
    """Learned tokens, and a start from a picture of the concept; two pictures each."""
    latent = runner.latent_of(concept)
    caption = vocabulary.scene_of((concept,), "white").caption()
    clips = runner.clip, edited.clip
    for kind in erase_attacks.KINDS:
        learned = erase_attacks.learn(kind, runner.model, edited.model, clips, latent, concept, "white")
        cond = edited.clip.encode_from_tokens(learned.tokens)
        _count(runner, runner.sample(edited, cond.expand(2, -1, -1), ATTACK_SEEDS), concept, kind, metrics)
    cond = runner.encoded_texts(edited.clip, [caption, caption])
    latents = runner.sample(edited, cond, ATTACK_SEEDS, latent.expand(2, -1, -1, -1))
    _count(runner, latents, concept, "img2img", metrics)


def _count(runner: EraseRunner, latents: torch.Tensor, concept: str, kind: str, metrics: EraseMetrics) -> None:
    verdicts = runner.judge.look(runner.decoded(latents))
    metrics.named.setdefault(kind, []).extend(v.name == concept for v in verdicts)


def plan(options: argparse.Namespace) -> Iterator[tuple[int, tuple[Pairs, ...], list[str]]]:
    """The parts of the board: how many concepts, their groups, and the rows (``none`` comes first by itself)."""
    chosen = options.method or [*METHODS, *(TRAINED if options.trained else ())]
    for count in options.concepts or ([1, 5] if options.quick else list(GROUPS)):
        groups = GROUPS[count][: 2 if count == 1 else 1] if options.quick else GROUPS[count][: options.groups]
        if solved := [name for name in chosen if name in METHODS]:
            yield count, groups, solved
        if count == 1 and (slow := [name for name in chosen if name in TRAINED]):
            yield count, groups[: erase_trained.GROUPS], slow


def part_rows(groups: tuple[Pairs, ...], methods: list[str], options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one part. The first one, of the unedited model, is what the others are relative to."""
    count, plain = len(groups[0]), dict[str, float]()

    def figures(metrics: EraseMetrics) -> Figures:
        found = {"concepts": count} | metrics.figures(plain)
        if not plain:
            plain.update({k: v for k, v in found.items() if k.startswith(RELATIVE)})
        return found

    for method in dict.fromkeys(["none", *methods]):
        yield Row(method, run_job, jobs(method, groups, options), figures, f"{method}-{count}")


def jobs(method: str, groups: tuple[Pairs, ...], options: argparse.Namespace) -> list[Job[EraseTask]]:
    """A job per group of a row."""
    count = len(groups[0])
    few, many = (4 if count == 1 else 8), max(6 if count == 1 else 12, LEAST_PRESERVED // len(groups))
    attacked = 0 if method == "none" or options.no_attacks else ATTACKED[count]
    if options.quick:  # attacks are most of its time
        attacked = min(attacked, 1 if count == 1 else 0)
    preserved = few if options.quick else many
    return [Job(method, EraseTask(pairs, preserved, number < attacked)) for number, pairs in enumerate(groups)]


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    parser = board_parser("erase", "1 and 5 concepts, few pictures, attacks on one group of one", [*METHODS, *TRAINED])
    many = "only this many concepts (again for more)"
    parser.add_argument("--concepts", type=int, choices=list(GROUPS), action="append", help=many)
    parser.add_argument("--trained", action="store_true", help="also methods that train, on the first groups of one")
    parser.add_argument("--groups", type=int, help="only the first so many groups; trained rows take 2")
    parser.add_argument("--no-attacks", action="store_true", help="only prompts")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    rows = [row for _, groups, methods in plan(options) for row in part_rows(groups, methods, options)]
    Board("erase", [100, 500, 700]).run(rows, options)
    return 0
