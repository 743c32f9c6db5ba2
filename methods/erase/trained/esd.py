"""ESD: the prompt of the concept learns to say what negative guidance says ("Erasing Concepts from Diffusion Models",
2303.07345, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..train import Terms
from .ground import Ground, Keeper, Settings, answers, mean_square


def negative_guidance(concept: torch.Tensor, anchor: torch.Tensor, eta: float) -> torch.Tensor:
    """ε*(∅) − η (ε*(c) − ε*(∅)), in the paper's η: 0 is the anchor itself, 1 as far beyond it as the concept is before it.

    The weights sum to one, so noise, velocity and clean latent obey the same formula. The authors' script counts from the
    concept instead, ε*(c) − η' (ε*(c) − ε*(∅)): η' = η + 1.
    """
    return anchor - eta * (concept - anchor)


def esd(ground: Ground, settings: Settings) -> Callable[[torch.Generator], Terms]:
    """States are the concept's own trajectories; the anchor's row stands where the paper has ∅ (for '' it is the paper's,
    with the words around the concept left in). A preserve term is ours: the paper has none."""
    assert ground.bank is not None
    bank, keeper = ground.bank, Keeper(ground, settings.kept_batch)
    said = answers(ground, bank, lambda states: [p.at(states.prompt) for p in (ground.concept, ground.anchor)])
    target = negative_guidance(said[0], said[1], settings.eta)

    def terms(generator: torch.Generator) -> Terms:
        states = bank.draw(settings.batch, generator, ground.device)
        student, drift = keeper.student(states, ground.concept.at(states.prompt), generator)
        return Terms(mean_square(student, target[states.place].to(student)), drift)

    return terms
