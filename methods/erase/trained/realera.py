"""RealEra-style training: the neighbourhood of the concept's embedding learns to say what the anchor says, what lies beyond
is held (2410.09140, second stage). The paper gives no constants; the sampling is ours, as in the closed form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..train import Terms
from .ground import Encoded, Ground, Keeper, Settings, answers, beside, mean_square, stacked

BEYOND = 2.0  # times the distance of the farthest sentence: held there


def directions(concept: torch.Tensor) -> torch.Tensor:
    """Differences between the concept's sentences and their mean, (sentences, tokens, width), the first token left alone.

    Raises:
        ValueError: there is only one sentence, so that it has no neighbours.
    """
    if len(concept) < 2:
        raise ValueError(
            "RealEra erases the neighbourhood that a concept's sentences span, and there is only one sentence; choose a "
            "template set in Erase Concept."
        )
    apart = concept - concept.mean(0, keepdim=True)
    return torch.cat([torch.zeros_like(apart[:, :1]), apart[:, 1:]], 1)


def neighbours(
    context: torch.Tensor, apart: torch.Tensor, generator: torch.Generator, *, beyond: bool = False
) -> torch.Tensor:
    """Embeddings near ``context`` (rows, tokens, width): e + η with η = Lz for LLᵀ the covariance of the sentences, no
    farther than the farthest sentence; or, ``beyond``, exactly so many times that far."""
    farthest = apart.flatten(1).norm(dim=1).max()
    z = torch.randn(len(context), len(apart), generator=generator).to(apart) * (len(apart) - 1) ** -0.5
    eta = (z @ apart.flatten(1)).view_as(context)
    length = eta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1)
    return context + eta * (BEYOND * farthest / length if beyond else (farthest / length).clamp(max=1.0))


def realera(ground: Ground, settings: Settings) -> Callable[[torch.Generator], Terms]:
    """‖ε_θ(x_t, e + η) − ε*(x_t, a)‖² + μ‖ε_θ(x_t, b) − ε*(x_t, b)‖² with η drawn anew every time; η pushes beyond the anchor
    where the settings say so. Half of the rows are the sentences themselves."""
    assert ground.bank is not None
    bank, keeper = ground.bank, Keeper(ground, settings.kept_batch)
    apart = directions(ground.concept.context)
    said = answers(ground, bank, lambda states: [p.at(states.prompt) for p in (ground.concept, ground.anchor)])
    target = said[1] - settings.eta * (said[0] - said[1])

    def terms(generator: torch.Generator) -> Terms:
        states = bank.draw(settings.batch, generator, ground.device)
        concept, half = ground.concept.at(states.prompt), settings.batch // 2
        near = torch.cat([concept.context[:half], neighbours(concept.context[half:], apart, generator)])
        out = neighbours(concept.context[:1], apart, generator, beyond=True)
        outside, far = states.part(slice(0, 1)), Encoded(out, concept.at(slice(0, 1)).pooled)
        (wanted,) = ground.teacher(outside, [far])
        prompt = stacked([Encoded(near, concept.pooled), far])
        said, drift = keeper.student(beside(states, outside), prompt, generator)
        erase = mean_square(said[:-1], target[states.place].to(said))
        return Terms(erase, drift + mean_square(said[-1:], wanted) / settings.kept_batch)

    return terms
