"""``dev.py score model``: how well the demo model draws what it is asked for, by the judge's eye."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from . import vocabulary
from .board import Board
from .files import FOLDER, LORAS
from .judge import LEFT, RIGHT, SEVERAL, THIRDS, UNSURE, WHOLE, Judge, Verdict, background_of
from .sampling import Painter

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


def score_objects(
    painter: Painter, judge: Judge, scenes: list[vocabulary.Scene], seeds: list[int], sheet: Path | None
) -> dict:
    """The shares of pictures in which the objects are named right, stand where they should, and lie on the right colour."""
    named, placed, background, rows, wrong = [], [], [], [], []
    for index, scene in enumerate(scenes):
        pictures = painter.paint(scene.caption(), seeds)
        rows.append(pictures)
        boxes = (WHOLE,) if len(scene.concepts) == 1 else (LEFT, RIGHT) if len(scene.concepts) == 2 else THIRDS
        seen = list(zip(*(judge.look(pictures, box) for box in boxes), strict=True))
        names = [[v.name for v in row] for row in seen]
        named += [sorted(row) == sorted(scene.concepts) for row in names]
        placed += [row == list(scene.concepts) for row in names]
        background += [background_of(p) == scene.background for p in pictures]
        wrong += [
            f"{scene.caption()}: {', '.join(map(str, row))}"
            for row, ok in zip(seen, placed[-len(seeds) :], strict=True)
            if not ok
        ]
        if index % 12 == 11:
            print(f"    {index + 1} of {len(scenes)} prompts", flush=True)
    for line in wrong:
        print(f"    not as asked: {line}", flush=True)
    if sheet is not None:
        save_sheet(rows, sheet)
    return {
        "right": statistics.mean(named), "placed": statistics.mean(placed), "background": statistics.mean(background),
        "n": len(named),
    }  # fmt: skip


def save_sheet(rows: list[torch.Tensor], path: Path) -> None:
    """All pictures on one sheet, a prompt a row, three prompts side by side."""
    strips = [torch.cat(list(r), 1) for r in rows]
    strips += [torch.ones_like(strips[0])] * (-len(strips) % 3)
    sheet = torch.cat([torch.cat(strips[i : i + 3], 1) for i in range(0, len(strips), 3)])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet * 255).round().byte().numpy()).save(path)


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    parser = argparse.ArgumentParser(prog="dev.py score model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="4 seeds a prompt instead of 8, and half the pairs")
    parser.add_argument("--sheets", type=Path, help="a folder for sheets of all pictures")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    seeds = QUICK_SEEDS if options.quick else SEEDS
    board, judge, painter = Board("model", seeds), Judge.load(), Painter()

    def sheet(name: str) -> Path | None:
        return options.sheets / f"{name}.png" if options.sheets else None

    with board.row("judge") as metrics:
        score_judge(judge, metrics)
    painter.paint("a cat", [1])
    with board.row("20 steps") as metrics:
        started = time.monotonic()
        painter.paint("a cat, blue background", [1])
        metrics["picture_seconds"] = time.monotonic() - started
    backgrounds: list[tuple[float, int]] = []
    with board.row("one object") as metrics:
        metrics |= score_objects(painter, judge, singles(vocabulary.CONCEPTS), seeds, sheet("one"))
        del metrics["placed"]
        backgrounds.append((metrics.pop("background"), metrics["n"]))
    with board.row("two objects") as metrics:
        metrics |= score_objects(painter, judge, prompts_of_pairs(18 if options.quick else 36), seeds, sheet("two"))
        backgrounds.append((metrics.pop("background"), metrics["n"]))
    with board.row("background") as metrics:
        metrics["n"] = sum(n for _, n in backgrounds)
        metrics["right"] = sum(share * n for share, n in backgrounds) / metrics["n"]
    with board.row("lora concept") as metrics:
        metrics |= score_loras(judge, seeds[:4], sheet)
    board.write(options.json)
    return 0


def score_loras(judge: Judge, seeds: list[int], sheet) -> dict:
    """Each unseen concept with its LoRA; the same prompt without it; and what the LoRA leaves of a concept the base knows."""
    with_lora, without, kept, names = [], [], [], []
    plain = Painter()
    for scene in singles(vocabulary.LORA_CONCEPTS):
        (concept,) = scene.concepts
        path = LORAS / f"concepts-demo-{concept}.safetensors"
        if not path.exists():
            continue
        names.append(concept)
        painter = Painter(path)
        with_lora.append(score_objects(painter, judge, [scene], seeds, sheet(f"lora-{concept}"))["right"])
        without.append(score_objects(plain, judge, [scene], seeds[:2], None)["right"])
        others = [vocabulary.scene_of((c,), scene.background) for c in ("cat", "panda", "car", "apple")]
        kept.append(score_objects(painter, judge, others, seeds[:2], None)["right"])
    if not names:
        return {"right": 0.0, "n": 0}
    return {
        "right": statistics.mean(with_lora), "n": len(names) * len(seeds), "concepts": len(names),
        "without_lora": statistics.mean(without), "base_concepts_right": statistics.mean(kept),
    }  # fmt: skip
