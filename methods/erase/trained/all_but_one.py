"""All but One: only the guidance of the concept is changed, the unconditional prediction is held ("All but One: Surgical
Concept Erasing with Model Preservation in Text-to-Image Diffusion Models", 2312.12807).

The paper's full text was not at hand and there is no code of it: the loss is rebuilt from its abstract.

Ours, where there is an alternative: the coarse part of the concept's guidance stays, and its detail gives way to the
alternative's in the course of the sampling. Guided towards the alternative alone, the model draws what it would draw when asked
for it, with that picture's layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torchvision.transforms.functional import gaussian_blur

from ..train import Terms
from .ground import Ground, Keeper, Settings, answers, beside, mean_square, stacked

KEPT = 0.5  # γ, what drift of preserved prompts counts against that of the unconditional prediction
COARSE = 1 / 8  # of the shorter side of the latent, the standard deviation of the blur: where and how large things are


def coarse(x: torch.Tensor) -> torch.Tensor:
    """What of latents (…, height, width) is seen from far away."""
    side = min(x.shape[-2:])
    sigma = COARSE * side
    kernel = 2 * min(round(3.5 * sigma), side - 1) + 1  # a reflected border is narrower than the latent
    flat = x.reshape(-1, 1, *x.shape[-2:])
    # one side after the other: as wide a kernel at once is slow
    across = gaussian_blur(flat, [kernel, 1], [sigma, sigma])
    return gaussian_blur(across, [1, kernel], [sigma, sigma]).reshape(x.shape)


def concept_share(steps: int, layout: float, eta: float) -> torch.Tensor:
    """How much of the concept there is in the detail that is guided towards, by step, (steps,): from 1 at the start straight
    through 0, the alternative's, at the share ``layout`` (above 0) of the sampling, down to −η."""
    return (1 - torch.arange(steps) / steps / layout).clamp(min=-eta)


def led_from_the_concept(
    concept: torch.Tensor, anchor: torch.Tensor, empty: torch.Tensor, share: torch.Tensor | float
) -> torch.Tensor:
    """ĝ where there is an alternative concept: its guidance, with the coarse part of the concept's own and a share of its
    detail. Ours; with a share of 1 it is the concept's."""
    way = concept - anchor
    far = coarse(way)
    return (anchor - empty) + far + share * (way - far)


def suppressed(concept: torch.Tensor, rest: torch.Tensor, empty: torch.Tensor, eta: float) -> torch.Tensor:
    """ĝ where there is none: the guidance of the rest of the prompt (∅ where it is the bare concept), and −η times what the
    concept adds to it."""
    return (rest - empty) - eta * (concept - rest)


def all_but_one(ground: Ground, settings: Settings) -> Callable[[torch.Generator], Terms]:
    """‖ε_θ(c) − sg ε_θ(∅) − ĝ‖² + β‖ε_θ(∅) − ε*(∅)‖² + γ‖ε_θ(p) − ε*(p)‖² at states of the concept's own trajectories: the
    alternative is guided towards from where the concept was going. Concepts with an alternative are led to its detail; the others are
    suppressed at once, for a blurred concept is still the concept."""
    assert ground.bank is not None
    bank, keeper = ground.bank, Keeper(ground, settings.kept_batch)
    concept_said, anchor_said = answers(
        ground, bank, lambda states: [p.at(states.prompt) for p in (ground.concept, ground.anchor)]
    )
    share = concept_share(len(bank.sigma), settings.layout, settings.eta).view(-1, *[1] * (concept_said.ndim - 2))
    replaced = torch.tensor(ground.replaced or (True,) * len(ground.concept.context))[bank.prompt.cpu()]
    guidance = suppressed(concept_said, anchor_said, keeper.empty, settings.eta_alone)
    # one trajectory at a time: all of them, blurred, are much memory at SDXL's size
    for at in replaced.nonzero().flatten():
        guidance[at] = led_from_the_concept(concept_said[at], anchor_said[at], keeper.empty[at], share)

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
