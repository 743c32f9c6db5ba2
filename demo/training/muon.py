"""Muon (Jordan et al. 2024): momentum, made orthogonal, as the step of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration x ← a·x + b·x³ + c·x⁵, which drives every singular value towards 1."""


def orthogonal(matrices: torch.Tensor, iterations: int = 4) -> torch.Tensor:
    """Matrices (n, rows, columns) with their singular values brought near 1 (Newton–Schulz), rows ≤ columns."""
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return x


def _shared(matrices: torch.Tensor) -> torch.Tensor:
    """``orthogonal``; several processes with the same matrices (n, rows, columns) each do some, where n can be cut."""
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes == 1 or len(matrices) % processes:
        return orthogonal(matrices)
    own = orthogonal(matrices.chunk(processes)[torch.distributed.get_rank()]).contiguous()
    parts = [torch.empty_like(own) for _ in range(processes)]
    torch.distributed.all_gather(parts, own)
    return torch.cat(parts)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for matrices only.

    ``torch.optim.Muon`` multiplies in bfloat16, one matrix after the other. On a CPU without bfloat16 that halves the
    speed of the whole training; here it is float32, with all matrices of a shape together.
    """

    def __init__(
        self, matrices: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._move(matrices, group)

    def _move(self, matrices: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        """One step of matrices of one shape. The size 0.2·√(longer side) is that of an AdamW step (2502.16982)."""
        rows, columns = matrices[0].shape
        steps = torch.stack([self._with_momentum(matrix, group["momentum"]) for matrix in matrices])
        steps = _shared(steps.mT).mT if rows > columns else _shared(steps)
        for matrix, step in zip(matrices, steps, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(step, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)

    def _with_momentum(self, matrix: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)
