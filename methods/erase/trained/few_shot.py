"""Few-shot unlearning in the text encoder: its words stop explaining a handful of pictures ("Erasing Concepts from
Text-to-Image Diffusion Models with Few-shot Unlearning", 2405.07288).

The paper ascends without a bound for about ten steps. Here the ascent ends where the prompt explains the pictures no better
than '' does, and other prompts are held where they were: longer runs would ruin the encoder otherwise. The paper trains biases
as well; here weights alone, by low-rank factors: a LoRA in diffusers' naming can hold no biases, and with them other prompts moved
further for little.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..train import Terms
from .ground import Encoded, Ground, Settings, States

HELD = 8  # prompts an iteration whose embeddings are held


def bounded(loss: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """What is still to be ascended, (rows,): κ − l where the prompt's loss l is below that of '', 0 from there on."""
    return (bound - loss).clamp_min(0)


def embedding_drift(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """‖τ_θ(p) − τ_0(p)‖² / ‖τ_0(p)‖², the mean over prompts (rows, tokens, width)."""
    return ((now - before).square().sum((1, 2)) / before.square().sum((1, 2))).mean()


def few_shot(ground: Ground, settings: Settings) -> Callable[[torch.Generator], Terms]:
    """At noised pictures of a concept: κ − l(y), with y a random sentence of that concept, and the drift of other prompts'
    embeddings."""
    assert ground.encode is not None
    encode = ground.encode
    held = tuple(dict.fromkeys(("", *ground.anchor_texts, *ground.kept_texts)))
    before = encode(held, adapted=False)

    def terms(generator: torch.Generator) -> Terms:
        which = int(torch.randint(len(ground.texts), (), generator=generator))
        states, target = noised_pictures(ground, settings.batch, generator, which % ground.concepts)
        prompt = encode([ground.texts[which]], adapted=True)
        (empty,) = ground.teacher(states, [ground.empty])
        (said,) = ground.student(states, [prompt])
        loss, bound = ((p - target).square().flatten(1).mean(1) for p in (said, empty))
        chosen = torch.randperm(len(held), generator=generator)[:HELD]
        now = encode([held[i] for i in chosen.tolist()], adapted=True)
        return Terms(bounded(loss, bound).mean(), _drift(now, before.at(chosen)))

    return terms


def _drift(now: Encoded, before: Encoded) -> torch.Tensor:
    drift = embedding_drift(now.context, before.context)
    if now.pooled is None or before.pooled is None:
        return drift
    return drift + embedding_drift(now.pooled[:, None], before.pooled[:, None])


def noised_pictures(
    ground: Ground, count: int, generator: torch.Generator, concept: int | None = None
) -> tuple[States, torch.Tensor]:
    """Random pictures at random noise levels, every other one mirrored, and what an ideal model says there.

    Args:
        concept: only pictures of the concept of this number, where it is known which show it.
    """
    assert ground.images is not None
    assert ground.sigmas is not None
    assert ground.noised is not None
    assert ground.target is not None
    which = torch.randint(len(ground.images), (count,), generator=generator)
    if concept is not None and concept in ground.pictured:
        among = torch.tensor([i for i, shown in enumerate(ground.pictured) if shown == concept])
        which = among[which % len(among)]
    clean = ground.images[which.to(ground.images.device)]
    mirrored = torch.rand(count, generator=generator) < 0.5
    clean = torch.where(mirrored.to(clean.device).view(-1, 1, 1, 1), clean.flip(-1), clean)
    sigma = ground.sigmas[torch.randint(len(ground.sigmas), (count,), generator=generator).to(ground.sigmas.device)]
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    nowhere = torch.zeros(count, dtype=torch.long)
    states = States(ground.noised(clean, noise, sigma), sigma, nowhere, (which, nowhere))
    return states, ground.target(clean, noise, sigma)
