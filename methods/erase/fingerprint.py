"""Fingerprints of text encoders: an edit works only with the embeddings it was made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .edit import Edit
from .rows import PromptTokens

_SENTENCE = "a quick brown fox jumps over the lazy dog"


def clip_fingerprint(encode: Callable[[str], PromptTokens]) -> tuple[float, ...]:
    """Three fixed projections of a fixed sentence. Another encoder or another CLIP skip gives other values."""
    tokens = encode(_SENTENCE).tokens[1:16].flatten()
    directions = torch.randn(3, len(tokens), generator=torch.Generator().manual_seed(12))
    return tuple(round(float(value), 4) for value in directions @ tokens)


def fingerprints_differ(first: Sequence[float], second: Sequence[float], tolerance: float = 0.02) -> bool:
    """Whether two fingerprints belong to different things. An empty one is unknown and differs from none."""
    if not first or not second:
        return False
    return len(first) != len(second) or any(
        abs(a - b) > tolerance * max(abs(a), abs(b), 1e-6) for a, b in zip(first, second, strict=True)
    )


def check_same_clip(edit: Edit, encode: Callable[[str], PromptTokens]) -> None:
    """Refuses a text encoder that the edit was not made with.

    Raises:
        ValueError: the embeddings differ; the message names the CLIP skip of the edit.
    """
    if not edit.clip or not fingerprints_differ(edit.clip, clip_fingerprint(encode)):
        return
    made = edit.specs()[0]
    skip = f" ({made['clip_skip'] or 'none'})" if "clip_skip" in made else ""
    raise ValueError(
        "The edit was made with another text encoder or another CLIP skip and works only with that one; "
        f"set the same CLIP skip{skip}, or make the edit again with this CLIP."
    )
