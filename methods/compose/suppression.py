"""Cross-Token Non-Maximum Suppression: where one object's words are attended to most, the others' words lose.

Multi-Concept T2I-Zero, 2310.07419, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F

_SIGMA = 1.0  # of the 3 × 3 blur, in tokens
MOST_NUMBERS = 1 << 24
"""Limit of the probabilities in memory at once; beyond it, heads are processed in chunks."""


def winners(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The object with the highest blurred map at each token, (batch, tokens), from (batch, objects, tokens)."""
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
    """The change that the suppression makes to an attention's output, (P' − P) v, in ``q``'s dtype.

    ``P'`` is ``P`` with the columns of every object but the winner multiplied by 1 − alpha. The change can be added to
    the output of any kernel or other patch.

    Args:
        q, k, v: (batch, heads, tokens, channels); probabilities are taken in float32 at least.
        objects: the columns of each object.
        grid: height and width of the image tokens.
        alpha: 0 changes nothing; 1 leaves every token to its winner.
        renormalise: whether rows of ``P'`` add up to one again.
    """
    probabilities = _Probabilities(q, k)
    taken = _taken(winners(_object_maps(probabilities, objects), grid), objects, alpha, probabilities.dtype)
    columns = [column for positions in objects for column in positions]
    out = torch.empty_like(q[..., : v.shape[-1]])
    for heads, p in probabilities.chunks():
        values = v[:, heads].to(probabilities.dtype)
        out[:, heads] = _change(p, values, columns, taken, renormalise).to(out.dtype)
    return out


def suppression_of_columns(
    p: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    counts: Sequence[int],
    grid: tuple[int, int],
    alpha: float,
    *,
    renormalise: bool = False,
) -> torch.Tensor:
    """The same change where nothing but the probabilities of the objects' columns is known, in the dtype of ``p``.

    Args:
        p: (batch, heads, tokens, columns) of ``P``, one object after the other.
        values: the rows of v at these columns, (batch, heads, columns, channels).
        output: the attention's own output P v, (batch, heads, tokens, channels).
        counts: how many columns each object has.
    """
    objects = [range(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]
    maps = torch.stack([p[..., list(columns)].mean((1, -1)) for columns in objects], 1)
    change = p * _taken(winners(maps, grid), objects, alpha, p.dtype)
    delta = change @ values.to(p.dtype)
    return _renormalised(delta, change, output.to(p.dtype)) if renormalise else delta


def _change(
    p: torch.Tensor, values: torch.Tensor, columns: list[int], taken: torch.Tensor, renormalise: bool
) -> torch.Tensor:
    """(P' − P) v of some heads, (batch, heads, tokens, channels)."""
    change = p[..., columns] * taken
    delta = change @ values[:, :, columns]
    return _renormalised(delta, change, p @ values) if renormalise else delta


def _renormalised(delta: torch.Tensor, change: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The change of an output P v by ``delta`` = (P' − P) v, when the rows of P' are brought back to one.

    Args:
        change: of the columns that change, (batch, heads, tokens, columns).
    """
    mass = 1 + change.sum(-1, keepdim=True)
    return (output + delta) / mass.clamp(min=1e-12) - output


class _Probabilities:
    """The probabilities of an attention, (batch, heads, tokens, words), in chunks of heads, or once if all fit."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor) -> None:
        self.q, self.k = q, k
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        batch, heads, tokens, _ = q.shape
        step = max(1, min(heads, MOST_NUMBERS // max(1, batch * tokens * k.shape[2])))
        self.slices = [slice(n, n + step) for n in range(0, heads, step)]
        self.whole = self._of(self.slices[0]) if len(self.slices) == 1 else None

    def _of(self, heads: slice) -> torch.Tensor:
        logits = self.q[:, heads].to(self.dtype) @ self.k[:, heads].to(self.dtype).transpose(-1, -2)
        return (logits * self.q.shape[-1] ** -0.5).softmax(-1)

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The heads and their probabilities, in turn."""
        for heads in self.slices:
            yield heads, self._of(heads) if self.whole is None else self.whole


def _object_maps(probabilities: _Probabilities, objects: Sequence[Sequence[int]]) -> torch.Tensor:
    """Each object's map, (batch, objects, tokens), mean over heads and words."""
    batch, heads, tokens, _ = probabilities.q.shape
    maps = torch.zeros(batch, len(objects), tokens, device=probabilities.q.device, dtype=probabilities.dtype)
    for _, p in probabilities.chunks():
        maps += torch.stack([p[..., list(columns)].mean(-1).sum(1) for columns in objects], 1) / heads
    return maps


def _taken(winning: torch.Tensor, objects: Sequence[Sequence[int]], alpha: float, dtype: torch.dtype) -> torch.Tensor:
    """The factor that changes each column of an object at each token: −alpha, or 0 for the winner.

    Returns:
        (batch, 1, tokens, columns).
    """
    device = winning.device
    loses = torch.arange(len(objects), device=device)[:, None] != winning[:, None]  # (batch, objects, tokens)
    owner = torch.tensor([n for n, positions in enumerate(objects) for _ in positions], device=device)
    return -alpha * loses[:, owner].to(dtype).transpose(1, 2)[:, None]
