"""Few-shot unlearning in the text encoder: its words stop explaining a handful of pictures ("Erasing Concepts from
Text-to-Image Diffusion Models with Few-shot Unlearning", 2405.07288).

Differs from the paper, which ascends without a bound for about ten steps. Here the ascent ends as soon as the prompt
explains the pictures no better than '' does, and other prompts are preserved. Longer runs would ruin the encoder
otherwise.

Differs from the paper: it trains biases as well. Here only weights are trained, by low-rank factors. A LoRA in
diffusers' naming cannot hold biases, and with them other prompts moved further for little.
"""

from __future__ import annotations

import torch

from ..train import Losses, LossFunction
from .context import MethodSettings, TextEncoderContext
from .noised_pictures import noised_pictures
from .prompts import EncodedPrompts

PRESERVED_TEXTS = 8  # per iteration


def bounded(loss: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """What is left to ascend, (rows,): κ − l while the prompt's loss l is below that of '', then 0."""
    return (bound - loss).clamp_min(0)


def embedding_drift(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """‖τ_θ(p) − τ_0(p)‖² / ‖τ_0(p)‖², the mean over prompts (rows, tokens, width)."""
    return ((now - before).square().sum((1, 2)) / before.square().sum((1, 2))).mean()


def few_shot(context: TextEncoderContext, settings: MethodSettings) -> LossFunction:
    """At noised pictures of a concept: κ − l(y), with y a random sentence of that concept, and the drift of the
    embeddings of other prompts."""
    texts, encode = context.texts, context.encode
    preserved = tuple(dict.fromkeys(("", *texts.anchor, *texts.preserved)))
    before = encode(preserved, adapted=False)

    def losses(generator: torch.Generator) -> Losses:
        which = int(torch.randint(len(texts.concept), (), generator=generator))
        states, target = noised_pictures(context, settings.batch, generator, which % texts.concepts)
        prompt = encode([texts.concept[which]], adapted=True)
        (empty,) = context.teacher(states, [context.prompts.empty])
        (prediction,) = context.student(states, [prompt])
        loss, bound = ((p - target).square().flatten(1).mean(1) for p in (prediction, empty))
        chosen = torch.randperm(len(preserved), generator=generator)[:PRESERVED_TEXTS]
        now = encode([preserved[i] for i in chosen.tolist()], adapted=True)
        return Losses(bounded(loss, bound).mean(), _drift(now, before.at(chosen)))

    return losses


def _drift(now: EncodedPrompts, before: EncodedPrompts) -> torch.Tensor:
    drift = embedding_drift(now.context, before.context)
    if now.pooled is None or before.pooled is None:
        return drift
    return drift + embedding_drift(now.pooled[:, None], before.pooled[:, None])
