"""All but One: only the guidance of the concept is changed, the unconditional prediction is held ("All but One: Surgical
Concept Erasing with Model Preservation in Text-to-Image Diffusion Models", 2312.12807).

The paper's full text was not at hand and there is no code of it: the loss is rebuilt from its abstract.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..train import Terms
from .ground import Ground, Keeper, Settings, answers, beside, mean_square, stacked

KEPT = 0.5  # γ, what drift of preserved prompts counts against that of the unconditional prediction


def wanted_guidance(concept: torch.Tensor, anchor: torch.Tensor, empty: torch.Tensor, eta: float) -> torch.Tensor:
    """ĝ: the guidance of the alternative concept; without one (anchor ∅) it is −η times the concept's own, 0 for η = 0."""
    return (anchor - empty) - eta * (concept - anchor)


def all_but_one(ground: Ground, settings: Settings) -> Callable[[torch.Generator], Terms]:
    """‖ε_θ(c) − sg ε_θ(∅) − ĝ‖² + β‖ε_θ(∅) − ε*(∅)‖² + γ‖ε_θ(p) − ε*(p)‖² at states of the concept's own trajectories: the
    alternative is guided towards from where the concept was going, which is what keeps the layout."""
    assert ground.bank is not None
    bank, keeper = ground.bank, Keeper(ground, settings.kept_batch)
    said = answers(ground, bank, lambda states: [p.at(states.prompt) for p in (ground.concept, ground.anchor)])
    guidance = wanted_guidance(said[0], said[1], keeper.empty, settings.eta)

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
