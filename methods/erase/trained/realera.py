"""RealEra-style training: the neighbourhood of the concept's embedding learns to predict what the anchor predicts, and
what lies beyond must not move (2410.09140, second stage).

The paper gives no constants. Differs from the paper: the sampling, as in the closed form.
"""

from __future__ import annotations

import torch

from ..train import Losses, LossFunction
from .context import MethodSettings, UNetContext, teacher_predictions
from .esd import negative_guidance
from .preservation import PreservationLoss, coin_flip, mean_square
from .prompts import EncodedPrompts, stacked
from .trajectories import States, concat_states


def directions(concept: torch.Tensor, concepts: int = 1) -> torch.Tensor:
    """Differences between every sentence and the mean of its own concept's, (sentences, tokens, width).

    The first token does not move. Row i of the sentences belongs to concept i mod ``concepts``.

    Raises:
        ValueError: a concept has only one sentence, so it has no neighbours.
    """
    if len(concept) < 2 * concepts:
        raise ValueError(
            "RealEra erases the neighbourhood that a concept's sentences span, and there is only one sentence; choose "
            "a template set in Erase Concept."
        )
    by_concept = concept.unflatten(0, (-1, concepts))
    apart = (by_concept - by_concept.mean(0, keepdim=True)).flatten(0, 1)
    return torch.cat([torch.zeros_like(apart[:, :1]), apart[:, 1:]], 1)


def neighbours(context: torch.Tensor, apart: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Embeddings near ``context`` (rows, tokens, width), no farther than the farthest sentence.

    They are e + η with η = Lz for LLᵀ the covariance of a concept's sentences (pooled over the concepts).
    """
    farthest = apart.flatten(1).norm(dim=1).max()
    z = torch.randn(len(context), len(apart), generator=generator).to(apart) * (len(apart) - 1) ** -0.5
    eta = (z @ apart.flatten(1)).view_as(context)
    length = eta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1)
    return context + eta * (farthest / length).clamp(max=1.0)


def realera(context: UNetContext, settings: MethodSettings) -> LossFunction:
    """‖ε_θ(x_t, e + η) − ε*(x_t, a)‖² + μ‖ε_θ(x_t, b) − ε*(x_t, b)‖² with a new η every time.

    Half of the rows are the sentences themselves. The settings' eta pushes beyond the anchor. b, what lies beyond the
    concept, are embeddings as far from preserved prompts as e + η from the concept's. Drawn from the concept outwards
    they would still show it, and preserving them kept it alive (62 % named after 100 iterations on the demo model).
    """
    bank, prompts = context.trajectories.concept, context.prompts
    preservation = PreservationLoss(context, settings.preserve_batch)
    apart = directions(prompts.concept.context, prompts.concepts)
    concept, anchor = teacher_predictions(
        context, bank, lambda states: [p.at(states.prompt) for p in (prompts.concept, prompts.anchor)]
    )
    target = negative_guidance(concept, anchor, settings.eta)

    def losses(generator: torch.Generator) -> Losses:
        states = bank.draw(settings.batch, generator, context.device)
        near = _half_moved(prompts.concept.at(states.prompt), apart, generator)
        outside, far = _beyond(context, states, apart, generator)
        (far_target,) = context.teacher(outside, [far])
        prediction, drift = preservation.student(concat_states(states, outside), stacked([near, far]), generator)
        erase = mean_square(prediction[:-1], target[states.position].to(prediction))
        return Losses(erase, drift + mean_square(prediction[-1:], far_target) / settings.preserve_batch)

    return losses


def _half_moved(concept: EncodedPrompts, apart: torch.Tensor, generator: torch.Generator) -> EncodedPrompts:
    """The first half of the sentences as they are, and neighbours of the others. A single row is either, at random."""
    rows = len(concept.context)
    half = rows // 2 if rows > 1 else int(coin_flip(generator))
    moved = neighbours(concept.context[half:], apart, generator)
    return EncodedPrompts(torch.cat([concept.context[:half], moved]), concept.pooled)


def _beyond(
    context: UNetContext, near: States, apart: torch.Tensor, generator: torch.Generator
) -> tuple[States, EncodedPrompts]:
    """A state of a preserved prompt and an embedding near that prompt; of the concept and near '' if none is
    preserved."""
    preserved = context.trajectories.preserved
    if preserved is None:
        states, prompt = near.part(slice(0, 1)), context.prompts.empty
    else:
        states = preserved.bank.draw(1, generator, context.device)
        prompt = preserved.prompts.at(states.prompt)
    return states, EncodedPrompts(neighbours(prompt.context, apart, generator), prompt.pooled)
