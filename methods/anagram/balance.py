"""How much each view counts: the remedies for *domination*, where one reading wins ("Diffusion-based Visual Anagram as
Multi-task Learning", 2412.02693, section 3.3, noise vector balancing). One signature, one registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .prediction import Predictions, Weights


def normalised(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(-1, keepdim=True)


def manual(weights: Sequence[float]) -> Weights:
    """The given weights, all the time.

    Raises:
        ValueError: a negative weight, or all weights zero.
    """
    if not weights or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError("Weights must be 0 or more, and at least one above 0; try 1.0 for every view.")

    def weigh(p: Predictions) -> torch.Tensor:
        given = torch.tensor(list(weights), dtype=torch.float32, device=p.x.device)
        return normalised(given).expand(len(p.x), -1)

    return weigh


def alternate(weights: Sequence[float]) -> Weights:
    """One view a step, in turn, views of weight 0 left out ("Visual Anagrams", 2311.17919, the reduction ``alternate``)."""
    used = [i for i, w in enumerate(weights) if w > 0]
    even = manual(weights)

    def weigh(p: Predictions) -> torch.Tensor:
        chosen = torch.zeros_like(even(p))
        chosen[:, used[p.step % len(used)]] = 1
        return chosen

    return weigh


PRIORITY_FROM = 0.8


def prioritise_first(weights: Sequence[float]) -> Weights:
    """The given weights until 80 % of the sampling, then the first view alone, so that at least one reading is clean
    ("LookingGlass", 2504.08902: 20 % default; 30 to 50 % destroys the other)."""
    even = manual(weights)

    def weigh(p: Predictions) -> torch.Tensor:
        if p.progress < PRIORITY_FROM:
            return even(p)
        first = torch.zeros_like(even(p))
        first[:, 0] = 1
        return first

    return weigh


def guidance_norm(weights: Sequence[float]) -> Weights:
    """More weight to the view whose prompt is less satisfied, told by the length of its guidance ‖c − u‖. Ours, free of
    any other model, and unproven: measure it with the score board. Without a negative it is ``manual``."""
    even = manual(weights)

    def weigh(p: Predictions) -> torch.Tensor:
        if p.negative is None:
            return even(p)
        lengths = torch.stack(
            [(c - u).float().flatten(1).norm(dim=1) for c, u in zip(p.positive, p.negative, strict=True)], 1
        )
        return normalised(even(p) * lengths.clamp(min=1e-8))

    return weigh


LOWEST_SCORE = 0.02


@dataclass(frozen=True)
class Reader:
    """What reads the views in the middle of a sampling, and how it is listened to.

    Attributes:
        score: denoised latents in the canonical frame, (batch, …), to how well each view reads, (batch, views).
        start: the sampling percent, 0 to 1, from which it is asked; before, a denoised picture is mush.
        smoothing: how much of a score are the readings before, 0 to 1. Off: weights that come late miss the moment at
            which a reading is won or lost.
        least: of the whole weight, what no view gets less than, and 1 − least what none gets more than.
    """

    score: Callable[[torch.Tensor], torch.Tensor]
    start: float = 0.15
    smoothing: float = 0.0
    least: float = 0.15


def by_score(weights: Sequence[float], reader: Reader) -> Weights:
    """αᵢ ∝ wᵢ · sᵢ^−(1 + progress): the view that reads worst gets more weight, the more so the later it is
    ("Diffusion-based Visual Anagram as Multi-task Learning", 2412.02693, section 3.3; its code has step/30 for the progress).

    Ours: scored is the denoised picture of this step, not the noisy one, which only a noise-aware CLIP could read; a score can
    be a running mean; scores are bounded from below, since a cosine can be negative; and weights from both sides. The formula
    is made for cosines, of which the best is half as much again as the worst: a classifier's probabilities must be brought to
    their scale.
    """
    even = manual(weights)

    def weigh(p: Predictions) -> torch.Tensor:
        alphas = even(p)
        if p.progress < reader.start or alphas.shape[1] == 1:
            return alphas
        matches = _read(p, alphas, reader).clamp(min=LOWEST_SCORE)
        wanted = normalised(alphas * matches ** -(1 + p.progress))
        return normalised(wanted.clamp(reader.least, 1 - reader.least) * (alphas > 0))

    return weigh


def _read(p: Predictions, alphas: torch.Tensor, reader: Reader) -> torch.Tensor:
    """How well each view reads by now, (batch, views). A level is read once: samplers of second order and patches after
    guidance ask there again, the latter with predictions that are no picture."""
    known = p.memory
    if known.scores is None or known.level != p.noise:
        mixed = sum(x0 * alphas[0, i].to(x0) for i, x0 in enumerate(p.guided()))
        read = reader.score(mixed).to(alphas)  # type: ignore[arg-type]
        before = read if known.scores is None else known.scores
        known.level, known.scores = p.noise, reader.smoothing * before + (1 - reader.smoothing) * read
    return known.scores


BALANCES: dict[str, Callable[[Sequence[float]], Weights]] = {
    "manual": manual,
    "prioritise first": prioritise_first,
    "alternate": alternate,
    "guidance norm": guidance_norm,
}
