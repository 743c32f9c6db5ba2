"""Trains the autoencoder's decoder (the encoder is analytic) on crops of scenes, in every orientation of the square."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F

from .. import vocabulary
from ..autoencoder import Autoencoder
from ..loader import KINDS
from . import scenes
from .checkpoint import Training

log = logging.getLogger(__name__)

CROP, BATCH, PEAK_RATE, EMA_DECAY = 64, 12, 1e-3, 0.998
LATENT_NOISE = 0.12
STYLE_SHARE = {"emoji": 0.5, "flat": 0.2, "sketch": 0.15, "mosaic": 0.15}


def crops(rng: Random, size: int, side: int = CROP) -> torch.Tensor:
    """Crops (b, 3, side, side) in [-1, 1], each turned and mirrored at random. Like a real autoencoder's data, they
    hold more than the text model learns: the concepts of the LoRAs are among them."""
    everything = vocabulary.CONCEPTS + vocabulary.LORA_CONCEPTS
    out = []
    for _ in range(size):
        picture = scenes.draw(rng, scenes.random_scene(rng, rng.choice((1, 2)), everything, STYLE_SHARE)).picture
        # any offset, not only whole cells: the decoder must not learn where the grid lies
        y, x = rng.randint(0, picture.shape[0] - side), rng.randint(0, picture.shape[1] - side)
        crop = np.rot90(picture[y : y + side, x : x + side], rng.randint(0, 3))
        out.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(restored: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """L1 + MSE, and L1 on the differences between neighbours, which keeps strokes crisp."""
    edges = sum(F.l1_loss(restored.diff(dim=d), picture.diff(dim=d)) for d in (-1, -2))
    return F.l1_loss(restored, picture) + F.mse_loss(restored, picture) + 0.5 * edges


def main(arguments: list[str]) -> int:
    """``dev.py train decoder``: trains for so many minutes in all; resumes from what is in the folder."""
    parser = argparse.ArgumentParser(prog="dev.py train decoder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--model", choices=KINDS, default="unet", help="the demo model whose latents are decoded")
    options = parser.parse_args(arguments)
    logging.basicConfig(force=True, level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    training = Training(options.out / f"{KINDS[options.model].decoder}.safetensors", options.minutes)
    torch.manual_seed(training.steps)
    model, ema, rng = Autoencoder(options.model), Autoencoder(options.model), Random(training.steps)
    if training.tensors:
        model.decoder.load_state_dict(training.tensors)
    ema.load_state_dict(model.state_dict())
    losses = fit(model, ema, training, rng)
    training.keep(ema.decoder.state_dict())
    report(training, losses, ema)
    return 0


def fit(model: Autoencoder, ema: Autoencoder, training: Training, rng: Random) -> list[float]:
    """Trains the decoder, and its moving average, until the time is up; returns the losses."""
    optimiser = torch.optim.AdamW(model.decoder.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    losses: list[float] = []
    while training.done < 1:
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * training.warm_up(100) * 0.5 * (1 + math.cos(math.pi * training.done))
        loss = restoration_loss(model, crops(rng, BATCH))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        if torch.isfinite(norm):
            optimiser.step()
            losses.append(loss.item())
        optimiser.zero_grad(set_to_none=True)
        for slow, fast in zip(ema.decoder.parameters(), model.decoder.parameters(), strict=True):
            slow.data.lerp_(fast.data, 1 - EMA_DECAY if training.steps > 500 else 0.05)
        if training.step():
            training.keep(ema.decoder.state_dict())
            report(training, losses, ema)
    return losses


def restoration_loss(model: Autoencoder, picture: torch.Tensor) -> torch.Tensor:
    """The loss of pictures (b, 3, side, side) from latents with some noise."""
    z = model.encode(picture)
    z = z + torch.randn_like(z) * torch.rand(len(z), 1, 1, 1) * LATENT_NOISE
    return reconstruction_loss(model.decode(z), picture)


def report(training: Training, losses: list[float], model: Autoencoder) -> None:
    """Logs a line of the learning curve."""
    loss = float(np.mean(losses[-200:])) if losses else math.nan
    log.info("%.1f min, step %d, loss %.4f, PSNR %.2f dB", training.spent, training.steps, loss, psnr(model))


@torch.no_grad()
def psnr(model: Autoencoder, count: int = 64) -> float:
    """PSNR in dB over fixed crops."""
    picture = crops(Random(7), count)
    error = ((model.decode(model.encode(picture)).clamp(-1, 1) - picture) / 2).square().mean().item()
    return -10 * math.log10(error)
