"""All but One changes only the guidance of the concept and preserves the unconditional prediction ("All but One:
Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion Models", 2312.12807).

The paper's full text was not available and its code is not public: the loss is rebuilt from the abstract.

Differs from the paper, if there is an alternative: the coarse part of the concept's guidance stays. Its detail gives
way to the alternative's in the course of the sampling. Guided towards the alternative alone, the model draws the
alternative's own picture, with that picture's layout.
"""

from __future__ import annotations

import torch
from torchvision.transforms.functional import gaussian_blur

from ..train import Losses, LossFunction
from .context import MethodSettings, UNetContext, teacher_predictions
from .preservation import PreservationLoss, mean_square
from .prompts import stacked
from .trajectories import concat_states

PRESERVED_WEIGHT = 0.5  # γ: weight of the drift of preserved prompts, where that of the unconditional prediction is 1
COARSE = 1 / 8  # standard deviation of the blur per shorter side of the latent: where and how large things are


def coarse(x: torch.Tensor) -> torch.Tensor:
    """Latents (…, height, width), blurred: what is seen of them from far away."""
    side = min(x.shape[-2:])
    sigma = COARSE * side
    kernel = 2 * min(round(3.5 * sigma), side - 1) + 1  # a reflected border is narrower than the latent
    flat = x.reshape(-1, 1, *x.shape[-2:])
    # one side after the other: a kernel as wide in both at once is slow
    across = gaussian_blur(flat, [kernel, 1], [sigma, sigma])
    return gaussian_blur(across, [1, kernel], [sigma, sigma]).reshape(x.shape)


def concept_share(steps: int, layout: float, eta: float) -> torch.Tensor:
    """The concept's share of the detail that is guided towards, by step, (steps,).

    It falls straight from 1 at the start through 0, the alternative's, to −η. It reaches 0 at the share ``layout``
    (above 0) of the sampling.
    """
    return (1 - torch.arange(steps) / steps / layout).clamp(min=-eta)


def led_from_the_concept(
    concept: torch.Tensor, anchor: torch.Tensor, empty: torch.Tensor, share: torch.Tensor | float
) -> torch.Tensor:
    """ĝ with an alternative: its guidance, with the coarse part of the concept's and a share of the concept's detail.

    With a share of 1 it is the concept's guidance. Differs from the paper: all of this.
    """
    difference = concept - anchor
    far = coarse(difference)
    return (anchor - empty) + far + share * (difference - far)


def suppressed(concept: torch.Tensor, rest: torch.Tensor, empty: torch.Tensor, eta: float) -> torch.Tensor:
    """ĝ without an alternative: the guidance of the rest of the prompt, and −η times what the concept adds to it.

    The rest of the bare concept is ∅.
    """
    return (rest - empty) - eta * (concept - rest)


def all_but_one(context: UNetContext, settings: MethodSettings) -> LossFunction:
    """‖ε_θ(c) − sg ε_θ(∅) − ĝ‖² + β‖ε_θ(∅) − ε*(∅)‖² + γ‖ε_θ(p) − ε*(p)‖² at states of the concept's own trajectories.

    Those states guide towards the alternative from where the concept was going. Concepts with an alternative are led
    to its detail. The others are suppressed at once, because a blurred concept is still the concept.
    """
    bank, prompts = context.trajectories.concept, context.prompts
    preservation = PreservationLoss(context, settings.preserve_batch)
    guidance = _target_guidance(context, settings, preservation.empty)

    def losses(generator: torch.Generator) -> Losses:
        states = bank.draw(settings.batch, generator, context.device)
        rows = len(states.x)
        others = preservation.draw(states, generator)
        batch = stacked([prompts.concept.at(states.prompt), prompts.empty.repeated(rows), others.prompts])
        (student,) = context.student(concat_states(states, states, others.states), [batch])
        concept, empty, preserved = student.split([rows, rows, len(others.states.x)])
        empty_drift = mean_square(empty, preservation.empty[states.position].to(empty))
        drift = mean_square(preserved, others.target.to(preserved))
        preserve = settings.unconditional_weight * empty_drift + PRESERVED_WEIGHT * drift
        return Losses(mean_square(concept - empty.detach(), guidance[states.position].to(concept)), preserve)

    return losses


def _target_guidance(context: UNetContext, settings: MethodSettings, empty: torch.Tensor) -> torch.Tensor:
    """ĝ at every state of the concept's bank, (trajectories, steps, channels, h, w). ``empty``: the teacher's ε*(∅)."""
    bank, prompts = context.trajectories.concept, context.prompts
    concept, anchor = teacher_predictions(
        context, bank, lambda states: [p.at(states.prompt) for p in (prompts.concept, prompts.anchor)]
    )
    share = concept_share(len(bank.sigma), settings.layout, settings.eta).view(-1, *[1] * (concept.ndim - 2))
    replaced = torch.tensor(prompts.replaced or (True,) * len(prompts.concept.context))[bank.prompt.cpu()]
    guidance = suppressed(concept, anchor, empty, settings.eta_alone)
    # one trajectory at a time: all of them, blurred, take much memory at SDXL's size
    for row in replaced.nonzero().flatten():
        guidance[row] = led_from_the_concept(concept[row], anchor[row], empty[row], share)
    return guidance
