"""All but One: only the guidance of the concept is changed, the unconditional prediction is held ("All but One: Surgical
Concept Erasing with Model Preservation in Text-to-Image Diffusion Models", 2312.12807).

The paper's full text was not at hand and there is no code of it: the loss is rebuilt from its abstract.

Ours: what is guided towards leads from the concept to its alternative in the course of the sampling. Guided towards the
alternative from the first step on, the model draws what it would draw when asked for it, with that picture's layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..train import Terms
from .ground import Ground, Keeper, Settings, answers, beside, mean_square, stacked

KEPT = 0.5  # γ, what drift of preserved prompts counts against that of the unconditional prediction


def concept_share(steps: int, layout: float, eta: float) -> torch.Tensor:
    """How much of the concept there is in what is guided towards, by step, (steps,): from 1 at the start straight through 0, the
    alternative itself, at the share ``layout`` of the sampling, down to −η. With ``layout`` 0 it is −η all the time."""
    if layout <= 0:
        return torch.full((steps,), -eta)
    return (1 - torch.arange(steps) / steps / layout).clamp(min=-eta)


def wanted_guidance(
    concept: torch.Tensor, anchor: torch.Tensor, empty: torch.Tensor, share: torch.Tensor | float
) -> torch.Tensor:
    """ĝ: the guidance of the alternative concept, plus a share of the way from there to the concept's own. Without an alternative
    (anchor ∅) and with a share of −η it is −η times the concept's own."""
    return (anchor - empty) + share * (concept - anchor)


def all_but_one(ground: Ground, settings: Settings) -> Callable[[torch.Generator], Terms]:
    """‖ε_θ(c) − sg ε_θ(∅) − ĝ‖² + β‖ε_θ(∅) − ε*(∅)‖² + γ‖ε_θ(p) − ε*(p)‖² at states of the concept's own trajectories: the
    alternative is guided towards from where the concept was going, which is what keeps the layout."""
    assert ground.bank is not None
    bank, keeper = ground.bank, Keeper(ground, settings.kept_batch)
    said = answers(ground, bank, lambda states: [p.at(states.prompt) for p in (ground.concept, ground.anchor)])
    share = concept_share(len(bank.sigma), settings.layout, settings.eta).view(-1, *[1] * (said[0].ndim - 2))
    guidance = wanted_guidance(said[0], said[1], keeper.empty, share)

    def terms(generator: torch.Generator) -> Terms:
        states = bank.draw(settings.batch, generator, ground.device)
        rows = len(states.x)
        kept, words, wanted = keeper.rows(states, generator)
        prompt = stacked([ground.concept.at(states.prompt), ground.empty.repeated(rows), words])
        (student,) = ground.student(beside(states, states, kept), [prompt])
        concept, empty, others = student.split([rows, rows, len(kept.x)])
        drift = mean_square(empty, keeper.empty[states.place].to(empty))
        held = settings.unconditional_weight * drift + KEPT * mean_square(others, wanted.to(others))
        return Terms(mean_square(concept - empty.detach(), guidance[states.place].to(concept)), held)

    return terms
