"""RealEra-style training: the neighbourhood of the concept's embedding learns to say what the anchor says, what lies beyond
is held (2410.09140, second stage). The paper gives no constants; the sampling is ours, as in the closed form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..train import Terms
from .esd import negative_guidance
from .ground import Encoded, Ground, Keeper, Settings, States, answers, beside, heads, mean_square, stacked


def directions(concept: torch.Tensor, concepts: int = 1) -> torch.Tensor:
    """Differences between every sentence and the mean of its own concept's, (sentences, tokens, width), the first token left
    alone. Row i of the sentences is of concept i mod ``concepts``.

    Raises:
        ValueError: a concept has only one sentence, so that it has no neighbours.
    """
    if len(concept) < 2 * concepts:
        raise ValueError(
            "RealEra erases the neighbourhood that a concept's sentences span, and there is only one sentence; choose a "
            "template set in Erase Concept."
        )
    by_concept = concept.unflatten(0, (-1, concepts))
    apart = (by_concept - by_concept.mean(0, keepdim=True)).flatten(0, 1)
    return torch.cat([torch.zeros_like(apart[:, :1]), apart[:, 1:]], 1)


def neighbours(context: torch.Tensor, apart: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Embeddings near ``context`` (rows, tokens, width): e + η with η = Lz for LLᵀ the covariance of a concept's sentences
    (pooled over the concepts), no farther than the farthest sentence."""
    farthest = apart.flatten(1).norm(dim=1).max()
    z = torch.randn(len(context), len(apart), generator=generator).to(apart) * (len(apart) - 1) ** -0.5
    eta = (z @ apart.flatten(1)).view_as(context)
    length = eta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1)
    return context + eta * (farthest / length).clamp(max=1.0)


def realera(ground: Ground, settings: Settings) -> Callable[[torch.Generator], Terms]:
    """‖ε_θ(x_t, e + η) − ε*(x_t, a)‖² + μ‖ε_θ(x_t, b) − ε*(x_t, b)‖² with η drawn anew every time; the settings' eta pushes
    beyond the anchor. Half of the rows are the sentences themselves.

    b, what lies beyond the concept, are embeddings as far from preserved prompts as e + η from the concept's. Drawn from the
    concept outwards they would still show it: holding them kept it alive (62 % named after 100 iterations on the demo model).
    """
    assert ground.bank is not None
    bank, keeper = ground.bank, Keeper(ground, settings.kept_batch)
    apart = directions(ground.concept.context, ground.concepts)
    said = answers(ground, bank, lambda states: [p.at(states.prompt) for p in (ground.concept, ground.anchor)])
    target = negative_guidance(said[0], said[1], settings.eta)

    def terms(generator: torch.Generator) -> Terms:
        states = bank.draw(settings.batch, generator, ground.device)
        concept, rows = ground.concept.at(states.prompt), settings.batch
        half = rows // 2 if rows > 1 else int(heads(generator))
        near = torch.cat([concept.context[:half], neighbours(concept.context[half:], apart, generator)])
        outside, far = _beyond(ground, states, apart, generator)
        (wanted,) = ground.teacher(outside, [far])
        prompt = stacked([Encoded(near, concept.pooled), far])
        said, drift = keeper.student(beside(states, outside), prompt, generator)
        erase = mean_square(said[:-1], target[states.place].to(said))
        return Terms(erase, drift + mean_square(said[-1:], wanted) / settings.kept_batch)

    return terms


def _beyond(ground: Ground, near: States, apart: torch.Tensor, generator: torch.Generator) -> tuple[States, Encoded]:
    """A state of a preserved prompt (of the concept, where none are given) and an embedding near that prompt (near '')."""
    if ground.kept is None or ground.preserved is None:
        states, prompt = near.part(slice(0, 1)), ground.empty
    else:
        states = ground.kept.draw(1, generator, ground.device)
        prompt = ground.preserved.at(states.prompt)
    return states, Encoded(neighbours(prompt.context, apart, generator), prompt.pooled)
