"""Trains the judge, and makes the held-out pictures it is checked on.

It sees its pictures re-coloured, grey, blurred and noisy: it cannot go by colour and silhouette alone. It also sees
blanks, noise, shuffled and mixed pictures, to be honest about them. A mixed one has its true proportions as target.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from .. import vocabulary
from ..judge import CLASSES, NOTHING, SEVERAL, JudgeNetwork
from . import scenes
from .checkpoint import Training

log = logging.getLogger(__name__)

EVERYTHING = vocabulary.CONCEPTS + vocabulary.LORA_CONCEPTS
STYLE_SHARE = {"emoji": 0.5, "flat": 0.2, "sketch": 0.15, "mosaic": 0.15}
BATCH, PEAK_RATE = 32, 2e-3
READER_SEED = 1_000_000  # beyond the steps of any training
HELD_OUT, HELD_OUT_COLUMNS = 264, 12


def _one_hot(name: str) -> np.ndarray:
    return (np.arange(len(CLASSES)) == CLASSES.index(name)).astype(np.float32)


def _garbage(rng: Random, shape: tuple[int, int], source: np.ndarray) -> np.ndarray:
    """A picture with nothing in it: a blank, noise of some coarseness, a blur beyond recognition or a shuffle."""
    generator = np.random.default_rng(rng.getrandbits(32))
    kind = rng.choice(("blank", "noise", "noise", "blur", "shuffle"))
    if kind == "blank":
        return np.broadcast_to(generator.random(3), (*shape, 3)).astype(np.float32)
    if kind == "noise":
        coarse = rng.choice((1, 2, 4, 8, 16, 32))
        noise = generator.normal(rng.random(), rng.choice((0.1, 0.2, 0.4)), (shape[0] // coarse, shape[1] // coarse, 3))
        small = Image.fromarray((noise.clip(0, 1) * 255).astype(np.uint8))
        way = rng.choice((Image.Resampling.NEAREST, Image.Resampling.BICUBIC))
        return np.asarray(small.resize(shape[::-1], way), np.float32) / 255
    if kind == "blur":
        tiny = Image.fromarray((source * 255).astype(np.uint8)).resize((3, 3), Image.Resampling.BOX)
        return np.asarray(tiny.resize(shape[::-1], Image.Resampling.BICUBIC), np.float32) / 255
    tile = 16
    tiles = source.reshape(shape[0] // tile, tile, shape[1] // tile, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    tiles = tiles[generator.permutation(len(tiles))].reshape(shape[0] // tile, shape[1] // tile, tile, tile, 3)
    return tiles.swapaxes(1, 2).reshape(*shape, 3)


def _example(rng: Random, half: bool) -> tuple[np.ndarray, np.ndarray]:
    """A picture (128, 128 or 64, 3) in 0..1 and its target distribution."""
    objects = rng.choice((2, 2, 3)) if half else 1
    if not half and rng.random() < 0.12:
        objects = 2
    drawn = scenes.draw(rng, scenes.random_scene(rng, objects, EVERYTHING, STYLE_SHARE))
    picture, name = drawn.picture.astype(np.float32) / 255, drawn.scene.concepts[0]
    if not half:
        return picture, _one_hot(SEVERAL if objects > 1 else name)
    which = rng.randrange(objects)
    # a box drawn by hand is a little off, so a bit of the neighbour may show
    x = min(max(0, which * 64 + rng.randint(-7, 7)), picture.shape[1] - 64)
    return picture[:, x : x + 64], _one_hot(drawn.scene.concepts[which])


def examples(rng: Random, size: int, half: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (b, 3, 128, 128 or 64) and targets (b, classes)."""
    pictures, targets = [], []
    for _ in range(size):
        picture, target = _example(rng, half)
        draw = rng.random()
        if draw < 0.08:
            picture, target = _garbage(rng, picture.shape[:2], picture), _one_hot(NOTHING)
        elif draw < 0.20:
            other, share = _example(rng, half), rng.uniform(0.3, 0.7)
            picture, target = share * picture + (1 - share) * other[0], share * target + (1 - share) * other[1]
        pictures.append(picture)
        targets.append(target)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(targets))


def disturb(x: torch.Tensor) -> torch.Tensor:
    """Random saturation, tint, contrast, softness and noise, a strength for each picture."""
    b = len(x)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * torch.empty(b, 1, 1, 1).uniform_(0.1, 1.2)
    x = x * torch.empty(b, 3, 1, 1).uniform_(0.8, 1.2) + torch.empty(b, 1, 1, 1).uniform_(-0.1, 0.1)
    swapped = x[:, torch.randperm(3)]
    x = torch.where(torch.rand(b, 1, 1, 1) < 0.15, swapped, x)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear", align_corners=False)
    softer = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bilinear", align_corners=False)
    pick = torch.rand(b, 1, 1, 1)
    x = torch.where(pick < 0.3, soft, torch.where(pick < 0.42, softer, x))
    return (x + torch.randn_like(x) * torch.rand(b, 1, 1, 1) * 0.08).clamp(0, 1)


def held_out(folder: Path, seed: int = 20261) -> None:
    """Draws the held-out compositions in places, sizes and tilts that training never uses: a sheet and its answers."""
    rng = Random(seed)
    pictures, answers = [], []
    for i in range(HELD_OUT):
        scene = scenes.random_scene(rng, 1 + i % 2, EVERYTHING, STYLE_SHARE)
        drawn = scenes.draw(rng, scene, sizes=(50, 54, 58) if i % 2 else (66, 76, 90, 100), tilts=(-5, 5))
        pictures.append(drawn.picture)
        answers.append({"concepts": scene.concepts, "background": scene.background, "style": scene.style})
    rows = [np.concatenate(pictures[i : i + HELD_OUT_COLUMNS], 1) for i in range(0, HELD_OUT, HELD_OUT_COLUMNS)]
    Image.fromarray(np.concatenate(rows)).save(folder / "held_out.webp", quality=90)
    (folder / "held_out.json").write_text(json.dumps({"columns": HELD_OUT_COLUMNS, "scenes": answers}) + "\n")


@torch.no_grad()
def calibrate(network: JudgeNetwork) -> float:
    """Fits the temperature on fresh disturbed pictures by the likelihood; returns it."""
    network.eval()
    rng = Random(99)
    logits, targets = [], []
    for half in (False, True) * 8:
        x, y = examples(rng, 64, half)
        logits.append(network(disturb(x)))
        targets.append(y)
    z, y = torch.cat(logits), torch.cat(targets)
    grid = torch.logspace(math.log10(0.3), math.log10(3), 60)
    losses = torch.stack([F.cross_entropy(z / t, y) for t in grid])
    network.temperature.copy_(grid[losses.argmin()])
    return float(network.temperature)


def fit(network: JudgeNetwork, training: Training, rng: Random) -> None:
    """Trains the network until its time is up, and keeps checkpoints."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=0.02)
    losses = []
    while training.done < 1:
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * training.warm_up(100) * 0.5 * (1 + math.cos(math.pi * training.done))
        x, y = examples(rng, BATCH, half=training.steps % 2 == 1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(disturb(x))
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if training.step():
            training.keep(network.state_dict())
        if training.steps % 100 == 0:
            log.info("%.1f min, step %d, loss %.3f", training.spent, training.steps, np.mean(losses[-100:]))
    training.keep(network.state_dict())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="dev.py train judge")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--minutes", type=float, default=12)
    made.add_argument("--reader", action="store_true", help="the scorer of the anagram board, not the judge")
    return made


def main(arguments: list[str]) -> int:
    """``dev.py train judge``: trains the judge for so many minutes in all and draws its held-out sheet.

    It resumes from what is in the folder. With ``--reader`` it trains the second judge, which scores views for the
    anagram board: other weights, other pictures.
    """
    options = parser().parse_args(arguments)
    logging.basicConfig(force=True, level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    name = "reader" if options.reader else "judge"
    if not options.reader:
        held_out(options.out)
    training = Training(options.out / f"{name}-training.safetensors", options.minutes)
    start = training.steps + (READER_SEED if options.reader else 0)
    torch.manual_seed(start)
    network, rng = JudgeNetwork(), Random(3 + start)
    if training.tensors:
        network.load_state_dict(training.tensors)
    fit(network, training, rng)
    log.info("temperature %.2f", calibrate(network))
    halves = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file(halves, options.out / f"{name}.safetensors")
    return 0
