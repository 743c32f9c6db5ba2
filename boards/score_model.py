"""``dev.py score model``: how well the demo model draws what it is asked for, by the judge's eye."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..demo import vocabulary
from ..demo.files import FOLDER, LORAS
from ..demo.judge import LEFT, RIGHT, SEVERAL, THIRDS, UNSURE, WHOLE, Judge, Verdict, background_of
from ..demo.sampling import Painter
from .board import Board, counted
from .workers import spread

SEEDS = list(range(100, 108))
QUICK_SEEDS = SEEDS[:4]
TILE, SIDE = 128, 128  # px of a held-out picture
_NOT_OBJECTS = ("nothing", SEVERAL, UNSURE)


def prompts_of_pairs(count: int) -> list[vocabulary.Scene]:
    """Two-object scenes in which every concept stands on each side equally often; fixed."""
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


@dataclass(frozen=True)
class Order:
    """Pictures to paint: a scene, its seeds, and the concept whose LoRA is loaded (None: the plain model)."""

    scene: vocabulary.Scene
    seeds: tuple[int, ...]
    lora: str | None = None


class Finding(NamedTuple):
    """What the judge sees: a verdict for each object of each picture, the backgrounds, the pictures (n, h, w, 3) of bytes."""

    verdicts: list[tuple[Verdict, ...]]
    backgrounds: list[str]
    pictures: np.ndarray

    def names(self) -> list[list[str]]:
        return [[v.name for v in row] for row in self.verdicts]


@cache
def the_judge() -> Judge:
    """The judge of this process."""
    return Judge.load()


@lru_cache(maxsize=2)
def painter_with(lora: str | None) -> Painter:
    """The painter of this process, with the LoRA of a concept."""
    return Painter(None if lora is None else LORAS / f"concepts-demo-{lora}.safetensors")


def carry_out(order: Order) -> Finding:
    """Paints the pictures of an order and looks at them."""
    pictures = painter_with(order.lora).paint(order.scene.caption(), list(order.seeds))
    boxes = {1: (WHOLE,), 2: (LEFT, RIGHT)}.get(len(order.scene.concepts), THIRDS)
    seen = list(zip(*(the_judge().look(pictures, box) for box in boxes), strict=True))
    return Finding(seen, [background_of(p) for p in pictures], (pictures * 255).round().byte().numpy())


def find(orders: list[Order], sheet: Path | None = None) -> list[Finding]:
    """Carries all orders out, printing what is not as asked."""
    findings = []
    looked = counted(spread(carry_out, orders), len(orders), "prompts", every=12)
    for order, found in zip(orders, looked, strict=True):
        findings.append(found)
        for row in found.verdicts:
            if [v.name for v in row] != list(order.scene.concepts):
                print(f"    not as asked: {order.scene.caption()}: {', '.join(map(str, row))}", flush=True)
    if sheet is not None:
        save_sheet([torch.from_numpy(found.pictures) / 255 for found in findings], sheet)
    return findings


def rates(orders: list[Order], findings: list[Finding]) -> dict:
    """The shares of pictures in which the objects are named right, stand where they should, and lie on the right colour."""
    pairs = list(zip(orders, findings, strict=True))
    named = [sorted(row) == sorted(order.scene.concepts) for order, found in pairs for row in found.names()]
    placed = [row == list(order.scene.concepts) for order, found in pairs for row in found.names()]
    background = [colour == order.scene.background for order, found in pairs for colour in found.backgrounds]
    return {
        "right": statistics.mean(named), "placed": statistics.mean(placed), "background": statistics.mean(background),
        "n": len(named),
    }  # fmt: skip


def save_sheet(rows: list[torch.Tensor], path: Path) -> None:
    """All pictures on one sheet, a prompt a row, three prompts side by side."""
    widest = max(len(r) * r.shape[2] for r in rows)
    strips = [F.pad(torch.cat(list(r), 1), (0, 0, 0, widest - len(r) * r.shape[2]), value=1.0) for r in rows]
    strips += [torch.ones_like(strips[0])] * (-len(strips) % 3)
    sheet = torch.cat([torch.cat(strips[i : i + 3], 1) for i in range(0, len(strips), 3)])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet * 255).round().byte().numpy()).save(path)


def score_loras(seeds: list[int], sheet: Path | None) -> dict:
    """Each unseen concept with its LoRA; the same prompt without it; and what the LoRA leaves of concepts the base knows."""
    scenes = singles(vocabulary.LORA_CONCEPTS)
    few = tuple(seeds[:2])
    with_lora = [Order(scene, tuple(seeds), scene.concepts[0]) for scene in scenes]
    without = [Order(scene, few) for scene in scenes]
    kept = [
        Order(vocabulary.scene_of((concept,), scene.background), few, scene.concepts[0])
        for scene in scenes
        for concept in ("cat", "panda", "car", "apple")
    ]
    orders = sorted(with_lora + kept, key=lambda order: order.lora or "")  # a LoRA is loaded once
    found = dict(zip(orders + without, find(orders + without, sheet), strict=True))

    def right(some: list[Order]) -> float:
        return rates(some, [found[order] for order in some])["right"]

    return {
        "right": right(with_lora), "n": len(scenes) * len(seeds), "concepts": len(scenes),
        "without_lora": right(without), "base_concepts_right": right(kept),
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    parser = argparse.ArgumentParser(prog="dev.py score model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="4 seeds a prompt instead of 8, and half the pairs")
    parser.add_argument("--sheets", type=Path, help="a folder for sheets of all pictures")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    seeds = QUICK_SEEDS if options.quick else SEEDS
    board = Board("model", seeds)

    def sheet(name: str) -> Path | None:
        return options.sheets / f"{name}.png" if options.sheets else None

    background, pictures = 0.0, 0
    parts = {"one object": singles(vocabulary.CONCEPTS), "two objects": prompts_of_pairs(18 if options.quick else 36)}
    for name, scenes in parts.items():
        with board.row(name) as metrics:
            orders = [Order(scene, tuple(seeds)) for scene in scenes]
            metrics |= rates(orders, find(orders, sheet(name.replace(" ", "-"))))
            background += metrics.pop("background") * metrics["n"]
            pictures += metrics["n"]
            if name == "one object":
                del metrics["placed"]
    with board.row("background") as metrics:
        metrics |= {"right": background / pictures, "n": pictures}
    with board.row("lora concept") as metrics:
        metrics |= score_loras(seeds[:4], sheet("lora-concept"))
    with board.row("judge") as metrics:
        score_judge(the_judge(), metrics)
    painter_with(None).paint("a cat", [1])
    with board.row("20 steps") as metrics:
        started = time.monotonic()
        painter_with(None).paint("a cat, blue background", [1])
        metrics["picture_seconds"] = time.monotonic() - started
    board.write(options.json)
    return 0
