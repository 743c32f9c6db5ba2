"""Embeddings like a text encoder's: rows of norm 27 that share most of their direction, and layers that read them."""

import torch
from comfyui_concepts.methods.erase.problem import Problem
from comfyui_concepts.methods.erase.rows import RowPairs

NORM = 27.0


def rows(count: int, d: int, generator: torch.Generator, shared: torch.Tensor) -> torch.Tensor:
    x = 0.9 * shared + (1 - 0.81) ** 0.5 * torch.randn(count, d, generator=generator, dtype=torch.float64)
    return x * NORM / x.norm(dim=1, keepdim=True)


def problem(seed: int, d: int = 64, erased: int = 3, kept: int = 20, layers: int = 14) -> Problem:
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, d, generator=g, dtype=torch.float64)
    C, G, P, empty = (rows(n, d, g, shared) for n in (erased, erased, kept, 8))
    concepts = tuple(RowPairs(C[i : i + 1], G[i : i + 1], torch.ones(1, dtype=torch.float64)) for i in range(erased))
    weights = [0.15 * torch.randn(96, d, generator=g, dtype=torch.float64) for _ in range(layers)]
    Q = sum(W.T @ W for W in weights)
    alike = tuple(
        (torch.cat([c + 4 * torch.randn(5, d, generator=g, dtype=torch.float64)]), torch.zeros(5, dtype=torch.long))
        for c in C
    )
    kept_rows, ones = torch.cat([P, empty]), torch.ones(kept + len(empty), dtype=torch.float64)
    return Problem(concepts, kept_rows, ones, empty, Q, alike)
