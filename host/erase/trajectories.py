"""Trajectories of the host's own sampler, drawn once and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import torch

from ...methods.erase.trained.ground import Bank, Encoded
from .predictions import conditioning

SAMPLER, SCHEDULER = "euler", "normal"
ROWS = 8  # pictures sampled at once


def noise_for(model: Any, seeds: list[int], height: int, width: int) -> torch.Tensor:
    """Noise for latents of height × width cells, a seed a row."""
    channels = model.get_model_object("latent_format").latent_channels
    return torch.cat(
        [torch.randn((1, channels, height, width), generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


def paint(
    model: Any, prompt: Encoded, empty: Encoded, noise: torch.Tensor, steps: int, cfg: float,
    callback: Callable[..., None] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Clean latents for the prompts, one a row, by the host's sampler."""
    return comfy.sample.sample(
        model, noise, steps, cfg, SAMPLER, SCHEDULER, conditioning(prompt), conditioning(empty), torch.zeros_like(noise),
        callback=callback, disable_pbar=True, seed=0,
    )  # fmt: skip


def draw_bank(
    model: Any, prompts: Encoded, empty: Encoded, which: list[int], seed: int, size: tuple[int, int], steps: int, cfg: float,
    step_done: Callable[[int], None] = lambda rows: None,
) -> Bank:  # fmt: skip
    """Samples one trajectory for every entry of ``which`` (a row of ``prompts``) and keeps the state before every step.

    Args:
        size: height and width in latent cells.
        step_done: told how many trajectories have made a step, for progress.
    """
    parts: list[torch.Tensor] = []
    for first in range(0, len(which), ROWS):
        rows = which[first : first + ROWS]
        states: list[torch.Tensor] = []

        def keep(step: int, x0: torch.Tensor, x: torch.Tensor, total: int, states=states, rows=rows) -> None:
            states.append(x.detach().to("cpu", torch.float16, copy=True))
            step_done(len(rows))

        noise = noise_for(model, [seed + first + i for i in range(len(rows))], *size)
        paint(model, prompts.at(torch.tensor(rows)), empty, noise, steps, cfg, keep)
        parts.append(torch.stack(states, 1))
    with torch.inference_mode(False):
        return Bank(torch.cat(parts).clone(), _sigmas(model, steps)[:-1].clone(), torch.tensor(which))


def _sigmas(model: Any, steps: int) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), SCHEDULER, steps).float()
