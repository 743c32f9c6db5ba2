"""Cross-Token Non-Maximum Suppression: where one object's token looks most, the others' tokens look less.

Multi-Concept T2I-Zero, 2310.07419, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

_SIGMA = 1.0  # of the 3 × 3 blur, in tokens
MOST_NUMBERS = 1 << 24
"""How many probabilities are held at once: heads are taken in turn beyond it."""


def winners(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Which object's map is highest at each token after a small blur, (batch, tokens), from (batch, objects, tokens)."""
    offsets = torch.arange(-1, 2, device=maps.device, dtype=maps.dtype)
    line = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    line = line / line.sum()
    padded = F.pad(maps.unflatten(-1, grid), (1, 1, 1, 1), mode="replicate")
    rows = sum(weight * padded[..., n : n + grid[0], :] for n, weight in enumerate(line))
    blurred = sum(weight * rows[..., :, n : n + grid[1]] for n, weight in enumerate(line))  # type: ignore[index]
    return blurred.flatten(-2).argmax(1)  # type: ignore[union-attr]


def suppression(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    objects: Sequence[Sequence[int]],
    grid: tuple[int, int],
    alpha: float,
    *,
    renormalise: bool = False,
) -> torch.Tensor:
    """What the suppression changes in the answer of an attention, (P' − P) v, in ``q``'s dtype.

    ``P'`` is ``P`` with the columns of every object but the winner multiplied by 1 − alpha. The change alone is returned,
    so that it can be added to whatever kernel or other patch has answered.

    Args:
        q, k, v: (batch, heads, tokens, channels); probabilities are taken in float32 at least, some heads at a time.
        objects: the columns of each object.
        grid: height and width of the image tokens.
        alpha: 0 changes nothing; 1 leaves every token to its winner.
        renormalise: rows of ``P'`` add up to one again.
    """
    batch, heads, tokens, channels = q.shape
    precise = torch.promote_types(q.dtype, torch.float32)
    step = max(1, min(heads, MOST_NUMBERS // max(1, batch * tokens * k.shape[2])))

    def probabilities(some: slice) -> torch.Tensor:
        logits = q[:, some].to(precise) @ k[:, some].to(precise).transpose(-1, -2)
        return (logits * channels**-0.5).softmax(-1)

    chunks = [slice(n, n + step) for n in range(0, heads, step)]
    kept = probabilities(chunks[0]) if len(chunks) == 1 else None
    maps = torch.zeros(batch, len(objects), tokens, device=q.device, dtype=precise)
    for some in chunks:
        p = probabilities(some) if kept is None else kept
        maps += torch.stack([p[..., list(columns)].mean(-1).sum(1) for columns in objects], 1) / heads
    loses = (
        torch.arange(len(objects), device=q.device)[:, None] != winners(maps, grid)[:, None]
    )  # (batch, objects, tokens)
    columns = [c for tokens_of in objects for c in tokens_of]
    owner = torch.tensor([n for n, tokens_of in enumerate(objects) for _ in tokens_of], device=q.device)
    taken = -alpha * loses[:, owner].to(precise).transpose(1, 2)[:, None]  # (batch, 1, tokens, columns)
    out = torch.empty_like(q[..., : v.shape[-1]])
    for some in chunks:
        p = probabilities(some) if kept is None else kept
        change = p[..., columns] * taken
        values = v[:, some].to(precise)
        delta = change @ values[:, :, columns]
        if renormalise:
            mass = 1 + change.sum(-1, keepdim=True)
            delta = (p @ values + delta) / mass.clamp(min=1e-12) - p @ values
        out[:, some] = delta.to(out.dtype)
    return out
