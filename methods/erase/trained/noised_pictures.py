"""Pictures of a concept as states to train at."""

from __future__ import annotations

import torch

from .context import Pictures, TrainingContext
from .trajectories import States


def noised_pictures(
    context: TrainingContext, count: int, generator: torch.Generator, concept: int | None = None
) -> tuple[States, torch.Tensor]:
    """Random pictures at random noise levels, every other one mirrored, and the output of an ideal model there.

    Args:
        concept: only pictures of the concept of this number, if it is known which show it.
    """
    pictures, noise = context.pictures.latents, context.noise
    which = _drawn_pictures(context.pictures, count, generator, concept)
    clean = pictures[which.to(pictures.device)]
    mirrored = torch.rand(count, generator=generator) < 0.5
    clean = torch.where(mirrored.to(clean.device).view(-1, 1, 1, 1), clean.flip(-1), clean)
    sigma = noise.sigmas[torch.randint(len(noise.sigmas), (count,), generator=generator).to(noise.sigmas.device)]
    drawn = torch.randn(clean.shape, generator=generator).to(clean)
    nowhere = torch.zeros(count, dtype=torch.long)
    states = States(noise.noised(clean, drawn, sigma), sigma, nowhere, (which, nowhere))
    return states, noise.target(clean, drawn, sigma)


def _drawn_pictures(pictures: Pictures, count: int, generator: torch.Generator, concept: int | None) -> torch.Tensor:
    """Numbers of ``count`` random pictures, (count,)."""
    which = torch.randint(len(pictures.latents), (count,), generator=generator)
    if concept is None or concept not in pictures.concept_of:
        return which
    among = torch.tensor([i for i, shown in enumerate(pictures.concept_of) if shown == concept])
    return among[which % len(among)]
