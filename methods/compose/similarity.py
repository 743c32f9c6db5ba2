"""Correction by Similarities: every object's tokens gather the features of similar tokens.

Multi-Concept T2I-Zero, 2310.07419, section 3.2. A dominant object of a prompt spreads into its neighbours; this
gives the weak ones their own features back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

_ENCODERS = {2048: (768, 1280)}  # channels of a context to those of its encoders, joined: SDXL has L, then G


class ObjectPositions(NamedTuple):
    """The objects of a prompt in token positions.

    ``objects`` holds the positions of each object's tokens. ``sections`` holds first and last + 1 of the words of every
    section that the prompt was encoded in (77 tokens each for CLIP), without start, end and padding. ``length`` is the
    number of the prompt's tokens while it is sampled; 0 before.
    """

    objects: tuple[tuple[int, ...], ...]
    sections: tuple[tuple[int, int], ...]
    length: int = 0


def correct(
    context: torch.Tensor, words: ObjectPositions, alpha: float = 0.2, window: int = 3, threshold: float = 0.6
) -> torch.Tensor:
    """``f ← (1 − α) f + α f̂ · ‖f‖ / ‖f̂‖``, with ``f̂`` the mean of similar tokens, weighted by their cosine.

    Args:
        context: (batch, tokens, channels); each encoder's channels are corrected separately.
        alpha: how much is corrected; at 0 the context comes back as it is.
        window: how many tokens to either side are compared, never beyond the words of the section.
        threshold: tokens whose cosine is not above it, or not above 0, are left out, except the token itself.
    """
    if alpha == 0:
        return context
    parts = context.split(_ENCODERS.get(context.shape[-1], (context.shape[-1],)), -1)
    return torch.cat([_corrected(part, words, alpha, window, threshold) for part in parts], -1)


def _corrected(
    features: torch.Tensor, words: ObjectPositions, alpha: float, window: int, threshold: float
) -> torch.Tensor:
    out = features.clone()
    for position in {p for tokens in words.objects for p in tokens}:
        for first, end in words.sections:
            if first <= position < end:
                near = slice(max(first, position - window), min(end, position + window + 1))
                f = features[:, position]
                gathered = _gathered(features[:, near], position - near.start, threshold)
                scale = f.norm(dim=-1, keepdim=True) / gathered.norm(dim=-1, keepdim=True).clamp(min=1e-12)
                out[:, position] = (1 - alpha) * f + alpha * scale * gathered
    return out


def _gathered(near: torch.Tensor, own: int, threshold: float) -> torch.Tensor:
    """The mean of the tokens of (batch, near, channels) that are similar to the one at ``own``, (batch, channels)."""
    cosine = torch.cosine_similarity(near[:, own, None], near, dim=-1)
    # Negative weights could cancel the others, and a sum of zero cannot be scaled. The token's own cosine is 1 up to
    # rounding, which the highest threshold would leave out.
    weights = torch.where(cosine > threshold, cosine, 0).clamp(min=0)
    weights[:, own] = 1
    return (weights[..., None] * near).sum(1) / weights.sum(1, keepdim=True)


def check_objects(objects: Sequence[Sequence[int]]) -> None:
    """Refuses objects that share tokens.

    Raises:
        ValueError: no object, or a token in two of them.
    """
    flat = [p for tokens in objects for p in tokens]
    if not flat:
        raise ValueError("No object is named; write the prompt's objects, one per line, such as 'cat' and 'dog'.")
    if len(set(flat)) < len(flat):
        raise ValueError("Two objects share a word of the prompt; name each object by different words.")
