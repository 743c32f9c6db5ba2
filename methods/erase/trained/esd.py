"""ESD: the prompt of the concept learns to predict what negative guidance predicts ("Erasing Concepts from Diffusion
Models", 2303.07345, eq. 5)."""

from __future__ import annotations

import torch

from ..train import Losses, LossFunction
from .context import MethodSettings, UNetContext, teacher_predictions
from .preservation import PreservationLoss, mean_square


def negative_guidance(concept: torch.Tensor, anchor: torch.Tensor, eta: float) -> torch.Tensor:
    """ε*(∅) − η (ε*(c) − ε*(∅)), in the paper's η: 0 is the anchor, 1 as far beyond it as the concept is before it.

    The weights sum to one, so noise, velocity and clean latent obey the same formula. The authors' script counts from
    the concept instead, ε*(c) − η' (ε*(c) − ε*(∅)): η' = η + 1.
    """
    return anchor - eta * (concept - anchor)


def esd(context: UNetContext, settings: MethodSettings) -> LossFunction:
    """ESD's loss at states of the concept's own trajectories.

    The anchor's row takes the place of the paper's ∅. For the anchor '' it is the paper's, with the words around the
    concept left in. Differs from the paper: there is a preserve loss.
    """
    bank, prompts = context.trajectories.concept, context.prompts
    preservation = PreservationLoss(context, settings.preserve_batch)
    concept, anchor = teacher_predictions(
        context, bank, lambda states: [p.at(states.prompt) for p in (prompts.concept, prompts.anchor)]
    )
    target = negative_guidance(concept, anchor, settings.eta)

    def losses(generator: torch.Generator) -> Losses:
        states = bank.draw(settings.batch, generator, context.device)
        prediction, drift = preservation.student(states, prompts.concept.at(states.prompt), generator)
        return Losses(mean_square(prediction, target[states.position].to(prediction)), drift)

    return losses
