"""Trajectories of the host's sampler, kept as states to train at."""

from __future__ import annotations

from typing import NamedTuple

import torch


class States(NamedTuple):
    """Noisy latents ``x`` (rows, channels, h, w) at noise levels ``sigma`` (rows,), and where they come from.

    ``prompt`` (rows,) numbers the prompt each was sampled for. ``position`` is the trajectory and the step of each in
    its bank.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    prompt: torch.Tensor
    position: tuple[torch.Tensor, torch.Tensor]

    def part(self, rows: slice) -> States:
        """The states of these rows."""
        trajectory, step = self.position
        return States(self.x[rows], self.sigma[rows], self.prompt[rows], (trajectory[rows], step[rows]))


class TrajectoryBank(NamedTuple):
    """Trajectories sampled once by the host's sampler: the state before every step.

    ``x`` (trajectories, steps, channels, h, w), ``sigma`` (steps,), ``prompt`` (trajectories,): the row of the prompt
    each was sampled for.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    prompt: torch.Tensor

    def at(self, trajectory: torch.Tensor, step: torch.Tensor, device: torch.device) -> States:
        """The states at these positions."""
        picked = self.x[trajectory, step].to(device, torch.float32), self.sigma[step].to(device, torch.float32)
        return States(*picked, self.prompt[trajectory].to(device), (trajectory, step))

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> States:
        """``count`` random states, each of any trajectory and any step."""
        trajectory = torch.randint(len(self.x), (count,), generator=generator)
        step = torch.randint(len(self.sigma), (count,), generator=generator)
        return self.at(trajectory, step, device)


def concat_states(*several: States) -> States:
    """The rows of several sets of states, one set after the other."""
    x, sigma, prompt = (torch.cat(column) for column in list(zip(*several, strict=True))[:3])
    trajectory, step = (torch.cat(column) for column in zip(*(s.position for s in several), strict=True))
    return States(x, sigma, prompt, (trajectory, step))
