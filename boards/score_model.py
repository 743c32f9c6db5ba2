"""``dev.py score model``: how well the demo model draws its prompts, by the judge's eye."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..demo import vocabulary
from ..demo.files import FOLDER, lora_file
from ..demo.judge import LEFT, RIGHT, SEVERAL, THIRDS, UNSURE, WHOLE, Judge, Verdict, background_of
from ..demo.sampling import SETTINGS
from .board import Board, Figures, Job, Row, add_model_option, board_parser
from .demo_models import sampler_with, the_judge

SEEDS = list(range(100, 108))
QUICK_SEEDS = SEEDS[:4]
TILE, SIDE = 128, 128  # px of a held-out picture
_NOT_OBJECTS = ("nothing", SEVERAL, UNSURE)


def prompts_of_pairs(count: int) -> list[vocabulary.Scene]:
    """Two-object scenes in which every concept is on each side equally often; fixed."""
    rng = Random(5)
    left = list(vocabulary.CONCEPTS)
    right = left[7:] + left[:7]  # never the same concept twice
    pairs = list(zip(left, right, strict=True))
    rng.shuffle(pairs)
    backgrounds = list(vocabulary.BACKGROUNDS)
    return [vocabulary.scene_of(pair, backgrounds[i % len(backgrounds)]) for i, pair in enumerate(pairs[:count])]


def singles(concepts: tuple[str, ...]) -> list[vocabulary.Scene]:
    """A scene for each concept, on backgrounds in turn."""
    backgrounds = list(vocabulary.BACKGROUNDS)
    return [vocabulary.scene_of((c,), backgrounds[(3 * i) % len(backgrounds)]) for i, c in enumerate(concepts)]


def held_out() -> tuple[torch.Tensor, list[dict]]:
    """The bundled held-out compositions, (n, 128, 128, 3) in 0..1, and what they show."""
    answers = json.loads((FOLDER / "held_out.json").read_text())
    sheet = np.asarray(Image.open(FOLDER / "held_out.webp").convert("RGB"), np.float32) / 255
    columns = answers["columns"]
    tiles = [sheet[i // columns * TILE :][:TILE, i % columns * SIDE :][:, :SIDE] for i in range(len(answers["scenes"]))]
    return torch.from_numpy(np.stack(tiles)), answers["scenes"]


def expected_calibration_error(verdicts: list[Verdict], truths: list[str], bins: int = 10) -> float:
    """Mean gap between confidence and accuracy over equal bins of confidence (Guo et al. 1706.04599, eq. 3)."""
    confidence = np.array([v.confidence for v in verdicts])
    right = np.array([v.best == t for v, t in zip(verdicts, truths, strict=True)], float)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[which == b].mean() - right[which == b].mean()) * (which == b).mean() for b in set(which)]
    return float(sum(gaps))


def looked_at(judge: Judge, pictures: torch.Tensor, scenes: list[dict]) -> tuple[list[Verdict], list[str]]:
    """The judge's verdict on every object of held-out scenes, and the truth."""
    verdicts, truths = [], []
    for picture, scene in zip(pictures, scenes, strict=True):
        boxes = (WHOLE,) if len(scene["concepts"]) == 1 else (LEFT, RIGHT)
        for box, concept in zip(boxes, scene["concepts"], strict=True):
            verdicts += judge.look(picture.unsqueeze(0), box)
            truths.append(concept)
    return verdicts, truths


def garbage(count: int = 120) -> torch.Tensor:
    """Blanks and noise of several grains, (n, 128, 128, 3)."""
    generator = torch.Generator().manual_seed(17)
    pictures = []
    for i in range(count):
        grain = (0, 1, 2, 4, 8, 16)[i % 6]
        if grain == 0:
            pictures.append(torch.rand(3, generator=generator).expand(SIDE, SIDE, 3))
            continue
        noise = torch.rand(1, 3, SIDE // grain, SIDE // grain, generator=generator)
        pictures.append(torch.nn.functional.interpolate(noise, size=SIDE, mode="bilinear")[0].permute(1, 2, 0))
    return torch.stack(pictures)


def score_judge(judge: Judge, metrics: dict) -> None:
    """Right on real compositions it never saw; honest on blanks, noise and half-and-half pictures."""
    pictures, scenes = held_out()
    verdicts, truths = looked_at(judge, pictures, scenes)
    metrics["right"] = statistics.mean(v.name == t for v, t in zip(verdicts, truths, strict=True))
    metrics["n"] = len(truths)
    metrics["background_right"] = statistics.mean(
        background_of(p) == s["background"] for p, s in zip(pictures, scenes, strict=True)
    )
    metrics["garbage_named"] = statistics.mean(v.name not in _NOT_OBJECTS for v in judge.look(garbage()))
    singles_only = [i for i, s in enumerate(scenes) if len(s["concepts"]) == 1]
    first, second = pictures[singles_only[::2]], pictures[singles_only[1::2]]
    mixed = [v for p, q in zip(first, second, strict=False) for v in judge.look(((p + q) / 2).unsqueeze(0))]
    metrics["mixed_unsure"] = statistics.mean(v.name in _NOT_OBJECTS for v in mixed)
    hard = (pictures + torch.randn(pictures.shape, generator=torch.Generator().manual_seed(3)) * 0.15).clamp(0, 1)
    metrics["calibration_error"] = expected_calibration_error(*looked_at(judge, hard, scenes))


@torch.inference_mode()
def score_decoder(kind: str, metrics: Figures) -> None:
    """How near a kind's decoder comes to the held-out compositions: the PSNR of them all together, in dB."""
    pictures, vae = held_out()[0], sampler_with(None, kind).vae
    restored = torch.cat([vae.decode(vae.encode(some)).float() for some in pictures.split(32)])
    metrics |= {"psnr_db": -10 * math.log10((restored - pictures).square().mean().item()), "n": len(pictures)}


class JudgedPictures(NamedTuple):
    """What the judge names in the pictures of a job: a verdict for each object of each picture, and the backgrounds."""

    job: Job[vocabulary.Scene]
    verdicts: list[tuple[Verdict, ...]]
    backgrounds: list[str]


@dataclass
class ModelMetrics:
    """What was judged in the pictures of some jobs."""

    judged: list[JudgedPictures] = field(default_factory=list)

    def add(self, other: ModelMetrics) -> None:
        """Takes in other jobs."""
        self.judged += other.judged

    def only(self, jobs: Iterable[Job]) -> ModelMetrics:
        """Only these jobs."""
        by_job = {judged.job: judged for judged in self.judged}
        return ModelMetrics([by_job[job] for job in jobs])

    def figures(self) -> Figures:
        """Shares of pictures with the right objects (``right``), also in the right places, on the right background."""
        rows = [(j.job.task, [v.name for v in row]) for j in self.judged for row in j.verdicts]
        colours = [(j.job.task, colour) for j in self.judged for colour in j.backgrounds]
        return {
            "right": statistics.mean(sorted(names) == sorted(scene.concepts) for scene, names in rows),
            "placed": statistics.mean(names == list(scene.concepts) for scene, names in rows),
            "background": statistics.mean(colour == scene.background for scene, colour in colours),
            "n": len(rows),
        }

    def remarks(self) -> list[str]:
        return [
            f"not as prompted: {judged.job.task.caption()}: {', '.join(map(str, row))}"
            for judged in self.judged
            for row in judged.verdicts
            if [v.name for v in row] != list(judged.job.task.concepts)
        ]


def run_job(job: Job[vocabulary.Scene], kind: str = "unet") -> tuple[ModelMetrics, np.ndarray]:
    """Samples the pictures of a scene and has the judge look. The method is the concept whose LoRA is loaded, or ''."""
    pictures = sampler_with(job.method or None, kind).sample(job.task.caption(), list(job.seeds))
    boxes = {1: (WHOLE,), 2: (LEFT, RIGHT)}.get(len(job.task.concepts), THIRDS)
    verdicts = list(zip(*(the_judge().look(pictures, box) for box in boxes), strict=True))
    judged = JudgedPictures(job, verdicts, [background_of(p) for p in pictures])
    return ModelMetrics([judged]), (pictures * 255).round().byte().numpy()


def object_rows(seeds: Sequence[int], pairs: int, shares: list[tuple[float, int]], kind: str) -> list[Row]:
    """One and two objects by a kind of model. Their shares of right backgrounds, with numbers, go to ``shares``."""

    def without_background(metrics: ModelMetrics) -> Figures:
        figures = metrics.figures()
        shares.append((figures.pop("background"), figures["n"]))
        return figures

    def without_place(metrics: ModelMetrics) -> Figures:
        figures = without_background(metrics)
        del figures["placed"]
        return figures

    one = [Job("", scene, tuple(seeds)) for scene in singles(vocabulary.CONCEPTS)]
    two = [Job("", scene, tuple(seeds)) for scene in prompts_of_pairs(pairs)]
    return [
        Row("one object", partial(run_job, kind=kind), one, without_place, "one-object"),
        Row("two objects", partial(run_job, kind=kind), two, without_background, "two-objects"),
    ]


def lora_row(seeds: list[int], kind: str = "unet") -> Row:
    """Each unseen concept with its LoRA; the same prompt without it; concepts that the base knows, with the LoRA."""
    scenes, few = singles(vocabulary.LORA_CONCEPTS), tuple(seeds[:2])
    with_lora = [Job(scene.concepts[0], scene, tuple(seeds)) for scene in scenes]
    without = [Job("", scene, few) for scene in scenes]
    known = [
        Job(scene.concepts[0], vocabulary.scene_of((concept,), scene.background), few)
        for scene in scenes
        for concept in ("cat", "panda", "car", "apple")
    ]

    def figures(metrics: ModelMetrics) -> Figures:
        right = [metrics.only(jobs).figures()["right"] for jobs in (with_lora, without, known)]
        return {
            "right": right[0],
            "n": len(scenes) * len(seeds),
            "concepts": len(scenes),
            "without_lora": right[1],
            "base_concepts_right": right[2],
        }

    jobs = sorted(with_lora + known, key=lambda job: job.method)  # a LoRA is loaded once
    return Row("lora concept", partial(run_job, kind=kind), jobs + without, figures, "lora-concept")


def time_pictures(metrics: Figures, kind: str) -> None:
    """Seconds of one picture, and of four in a batch, by a model that is already loaded."""
    demo = sampler_with(None, kind)
    demo.sample("a cat", [1])
    for name, seeds in (("picture_seconds", [1]), ("four_pictures_seconds", [1, 2, 3, 4])):
        started = time.monotonic()
        demo.sample("a cat, blue background", seeds)
        metrics[name] = time.monotonic() - started


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    parser = board_parser("model", "4 seeds per prompt instead of 8, and half the pairs")
    add_model_option(parser, SETTINGS)
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    seeds = QUICK_SEEDS if options.quick else SEEDS
    board, shares = Board("model", seeds), list[tuple[float, int]]()
    board.run(object_rows(seeds, 18 if options.quick else 36, shares, options.model), options)
    with board.row("background") as metrics:
        background, pictures = 0.0, 0
        for share, n in shares:
            background += share * n
            pictures += n
        metrics |= {"right": background / pictures, "n": pictures}
    # a model that is still being trained has none
    if lora_file(vocabulary.LORA_CONCEPTS[0], options.model).exists():
        board.run([lora_row(seeds[:4], options.model)], options)
    with board.row("judge") as metrics:
        score_judge(the_judge(), metrics)
    with board.row("decoder") as metrics:
        score_decoder(options.model, metrics)
    with board.row(f"{SETTINGS[options.model].steps} steps") as metrics:
        time_pictures(metrics, options.model)
    board.write(options.json)
    return 0
