"""Embeddings that bring an erased concept back, in terms of T = I + M and Q = Σ WᵀW alone (RECE, 2407.12383)."""

from __future__ import annotations

import torch

from .lowrank import LowRank

MARGIN_SHARE = 0.05
"""A concept counts as brought back if no more than this share of the energy of its keys and values is missing."""
_LARGEST_NORM = 1e4


def map_of(M: LowRank | None, width: int) -> torch.Tensor:
    """T = I + M, (d, d), in float64."""
    one = torch.eye(width, dtype=torch.float64)
    return one if M is None else one + M.matrix().double()


def regenerated_rows(T: torch.Tensor, Q: torch.Tensor, rows: torch.Tensor, ridge: float) -> torch.Tensor:
    """For every concept row c (n, d) the c' whose edited keys and values come closest to the unedited ones of c.

    c' = argmin Σ‖W T c' − W c‖² + λ‖c'‖² = (TᵀQT + λI)⁻¹TᵀQ c (RECE, eq. 7, with ΣWᵀW written as Q). One solve covers
    all layers.
    """
    TQ = T.T @ Q
    A = TQ @ T + ridge * torch.eye(len(Q), dtype=Q.dtype)
    return torch.linalg.solve(A, TQ @ rows.double().T).T


def shortfall(T: torch.Tensor, Q: torch.Tensor, rows: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Distance between the edited keys and values of ``found`` and the unedited ones of ``rows``, relative, (n,)."""
    return row_energy(found @ T.T - rows, Q).sqrt() / row_energy(rows, Q).clamp_min(1e-30).sqrt()


def row_energy(rows: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """Σ‖W r‖² over all layers for rows (n, d), (n,)."""
    return ((rows @ Q) * rows).sum(1).clamp_min(0)


def margin(T: torch.Tensor, Q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """How much longer than the concept's own embedding one must be to bring the concept back, (n,).

    The smallest ‖c'‖ / ‖c‖ with Σ‖W T c' − W c‖² ≤ 0.05 Σ‖W c‖². An unedited model gives about 0.78 (√0.95 shrunk).
    Infinite: no embedding of up to 10 000 times the norm brings it back.
    """
    values, vectors = torch.linalg.eigh(T.T @ Q @ T)
    values = values.clamp_min(0)
    target = (rows.double() @ Q @ T) @ vectors  # TᵀQc in the basis of TᵀQT, (n, d)
    whole = row_energy(rows.double(), Q)
    margins = [
        _margin(values, b, float(e), float(r.norm())) for b, e, r in zip(target, whole, rows.double(), strict=True)
    ]
    return torch.stack(margins)


def _margin(values: torch.Tensor, b: torch.Tensor, whole: float, norm: float) -> torch.Tensor:
    """Bisection over the logarithm of the ridge: a larger one gives a shorter embedding that fits worse."""
    scale = float(values.mean())
    low, high = scale * 1e-14, scale * 1e6

    def at(ridge: float) -> tuple[float, float]:
        x = b / (values + ridge)
        return whole - 2 * float(x @ b) + float(x.square() @ values), float(x.norm())

    if at(low)[0] > MARGIN_SHARE * whole:
        return torch.tensor(float("inf"), dtype=torch.float64)
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if at(middle)[0] <= MARGIN_SHARE * whole else (low, middle)
    found = at(low)[1] / max(norm, 1e-30)
    return torch.tensor(found if found < _LARGEST_NORM else float("inf"), dtype=torch.float64)
