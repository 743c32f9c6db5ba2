"""Masks that follow the shapes: clusters of self-attention rows, chosen by their overlap with the masks so far.

Rows of a self-attention are alike for tokens of one object. For every path the clusters of several k-means runs form a
pool; the cluster that overlaps most with the old mask is the new one (2408.03632).
"""

from __future__ import annotations

import torch

RESTARTS, MAX_ROUNDS = 5, 50
MAP_SIDE = 32
"""Tokens per side of the maps that masks are refined on, in the paper for every model."""


def k_means(rows: torch.Tensor, k: int, seed: int = 0, restarts: int = RESTARTS) -> torch.Tensor:
    """Labels (n,): the best of several runs of Lloyd's algorithm with k-means++ starts (Arthur & Vassilvitskii 2007).

    Equal rows and seed give equal labels.

    Args:
        rows: (n, features).
    """
    generator = torch.Generator().manual_seed(seed)
    best, lowest = torch.zeros(len(rows), dtype=torch.long, device=rows.device), float("inf")
    for _ in range(restarts):
        labels, cost = _lloyd(rows, _starting_centres(rows, k, generator))
        if cost < lowest - 1e-9:
            best, lowest = labels, cost
    return best


def _starting_centres(rows: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """Starting centres: rows, each chosen with a chance in proportion to its squared distance to those before."""
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    distance = (rows - rows[chosen[0]]).square().sum(-1)
    for _ in range(k - 1):
        weights = distance.cpu().double().clamp(min=0)
        if weights.sum() <= 0:
            break
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, (rows - rows[chosen[-1]]).square().sum(-1))
    return rows[chosen]


def _lloyd(rows: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, float]:
    labels = torch.full((len(rows),), -1, device=rows.device)
    distances = torch.cdist(rows, centres)
    for _ in range(MAX_ROUNDS):
        nearest = distances.argmin(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        members = torch.nn.functional.one_hot(labels, len(centres)).to(rows.dtype)  # (n, k)
        sizes = members.sum(0)
        means = (members.T @ rows) / sizes.clamp(min=1)[:, None]
        centres = torch.where(sizes[:, None] > 0, means, centres)
        distances = torch.cdist(rows, centres)
    return labels, float(distances.min(1).values.square().sum())


def pooled_attention(
    queries: torch.Tensor, keys: torch.Tensor, grid: tuple[int, int], side: int = MAP_SIDE
) -> tuple[torch.Tensor, tuple[int, int]]:
    """The attention of squares of tokens to squares of tokens, mean over heads, in float32 or better, and its grid.

    Args:
        queries, keys: (rows, heads, tokens, channels), row by row of the grid.
        grid: rows and columns of tokens.
        side: about as many squares are on the shorter side, if there are more tokens.

    Returns:
        (rows, squares, squares), rows as probabilities; rows and columns of squares.
    """
    size = max(1, round(min(grid) / side))
    squares = (-(-grid[0] // size), -(-grid[1] // size))
    down, across = (torch.arange(count, device=keys.device) // size for count in grid)
    members = torch.nn.functional.one_hot((down[:, None] * squares[1] + across).flatten())  # (tokens, squares)
    out: torch.Tensor | float = 0.0
    for q, k in zip(queries.unbind(1), keys.unbind(1), strict=True):  # one head at a time: a map is large
        precise = torch.promote_types(q.dtype, torch.float32)
        seen = (q.to(precise) @ k.to(precise).transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        out = out + (members.to(precise) / members.sum(0)).T @ seen @ members.to(precise)
    assert isinstance(out, torch.Tensor)
    return out / queries.shape[1], squares


def clusters(attention: torch.Tensor, counts: range | list[int], seed: int = 0) -> torch.Tensor:
    """A pool: every cluster of k-means runs with each of these numbers of clusters, (pool, tokens) of bool.

    Args:
        attention: (tokens, tokens), rows as probabilities.
    """
    pool = []
    for k in counts:
        labels = k_means(attention, min(k, len(attention)), seed)
        pool += [labels == label for label in labels.unique()]
    return torch.stack(pool)


def overlaps(pool: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Intersection over union of every mask of the pool (pool, tokens) with one (tokens,)."""
    common, either = (pool & mask).sum(-1), (pool | mask).sum(-1)
    return common / either.clamp(min=1)


def rectangle(mask: torch.Tensor) -> torch.Tensor:
    """The bounding rectangle of a mask (height, width); of an empty one, nothing."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    out = torch.zeros_like(mask)
    if len(rows):
        out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return out


def followed_mask(
    pool: torch.Tensor, mask: torch.Tensor, least_overlap: float, rectangles: bool = False
) -> torch.Tensor:
    """The mask (height, width) after one refinement: the cluster that overlaps most with it, or else its rectangle."""
    overlap = overlaps(pool, mask.flatten())
    if rectangles or not mask.any() or overlap.max() <= 0 or overlap.max() < least_overlap:
        return rectangle(mask)
    return pool[int(overlap.argmax())].view_as(mask)


def refined_masks(fused: torch.Tensor, own: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The new masks of all concepts: U = own ∪ base, and where two of these meet, the mask before (2408.03632).

    Args:
        fused: the masks so far, (concepts, height, width) of bool.
        own, base: the new masks of the concepts' paths and of the base, shaped alike.

    Returns:
        (concepts, height, width) of bool. Disjoint if ``fused`` was.
    """
    union = own | base
    conflict = union.sum(0) > 1
    return torch.where(conflict, fused, union)


def attention_of_masks(attention: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The mean attention of each mask's cells, (concepts, height, width); zeros for an empty mask.

    Args:
        attention: each concept's self-attention, (concepts, tokens, tokens), rows as probabilities.
        masks: (concepts, height, width) in 0..1, height · width tokens.
    """
    weights = masks.flatten(1).to(attention)  # (concepts, tokens)
    mean = (weights[:, None] @ attention)[:, 0] / weights.sum(-1, keepdim=True).clamp_min(1e-8)
    return mean.view(masks.shape)


def masks_at_points(
    attention: torch.Tensor, grid: tuple[int, int], points: list[tuple[float, float]], seed: int = 0
) -> torch.Tensor:
    """First masks from clicks: of six clusters of the reference's self-attention, those that hold the points.

    Args:
        attention: (tokens, tokens); ``points``: (x, y) in fractions of the canvas, one per concept.

    Returns:
        (points, height, width) of bool.
    """
    labels = k_means(attention, 6, seed).view(grid)
    height, width = grid
    cells = [(min(int(y * height), height - 1), min(int(x * width), width - 1)) for x, y in points]
    return torch.stack([labels == labels[cell] for cell in cells])
