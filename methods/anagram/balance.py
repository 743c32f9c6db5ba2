"""How much each view counts: remedies for *domination*, where one reading wins. One signature, one registry.

"Diffusion-based Visual Anagram as Multi-task Learning", 2412.02693, section 3.3 (noise vector balancing).
"""

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
    """One view per step, in turn. Views of weight 0 are left out ("Visual Anagrams", 2311.17919, ``alternate``)."""
    used = [i for i, w in enumerate(weights) if w > 0]
    base_weights = manual(weights)

    def weigh(p: Predictions) -> torch.Tensor:
        chosen = torch.zeros_like(base_weights(p))
        chosen[:, used[p.step % len(used)]] = 1
        return chosen

    return weigh


PRIORITY_FROM = 0.8


def prioritise_first(weights: Sequence[float]) -> Weights:
    """The given weights until 80 % of the sampling, then the first view alone: at least one reading is clean.

    "LookingGlass", 2504.08902: 20 % is the default there; 30 to 50 % destroys the other reading.
    """
    base_weights = manual(weights)

    def weigh(p: Predictions) -> torch.Tensor:
        if p.percent < PRIORITY_FROM:
            return base_weights(p)
        first = torch.zeros_like(base_weights(p))
        first[:, 0] = 1
        return first

    return weigh


def guidance_norm(weights: Sequence[float]) -> Weights:
    """More weight for the view whose prompt is less satisfied, measured by the length of its guidance ‖c − u‖.

    Not from a paper. It needs no other model, and is unproven: measure it with the score board. Without a negative it
    is ``manual``.
    """
    base_weights = manual(weights)

    def weigh(p: Predictions) -> torch.Tensor:
        if p.negative is None:
            return base_weights(p)
        lengths = torch.stack(
            [(c - u).float().flatten(1).norm(dim=1) for c, u in zip(p.positive, p.negative, strict=True)], 1
        )
        return normalised(base_weights(p) * lengths.clamp(min=1e-8))

    return weigh


LOWEST_SCORE = 0.02


@dataclass(frozen=True)
class ViewScorer:
    """Scores the views during a sampling, to weigh them by how well each reads.

    Attributes:
        score: denoised latents in the canonical frame, (batch, …), to how well each view reads, (batch, views).
        start: the percent, 0 to 1, from which it scores. Earlier predictions are too blurred to read.
        smoothing: the share of earlier scores in a score, 0 to 1. The default is 0: weights that come late miss the
            moment at which a reading is won or lost.
        min_weight: the smallest share of the total weight a view can get. The largest is 1 − min_weight.
    """

    score: Callable[[torch.Tensor], torch.Tensor]
    start: float = 0.15
    smoothing: float = 0.0
    min_weight: float = 0.15


def by_score(weights: Sequence[float], scorer: ViewScorer) -> Weights:
    """αᵢ ∝ wᵢ · sᵢ^−(1 + percent): the view that reads worst gets more weight, and more the later it is.

    "Diffusion-based Visual Anagram as Multi-task Learning", 2412.02693, section 3.3; its code has step/30 for the
    percent.

    Differs from the paper: the denoised picture of this step is scored, not the noisy one, which needs a noise-aware
    CLIP. A score can be a running mean. Scores are bounded from below, since a cosine can be negative, and weights on
    both sides. The formula is made for cosines, where the best is half as much again as the worst. A classifier's
    probabilities must be brought to their scale.
    """
    base_weights = manual(weights)

    def weigh(p: Predictions) -> torch.Tensor:
        alphas = base_weights(p)
        if p.percent < scorer.start or alphas.shape[1] == 1:
            return alphas
        scores = _scores_so_far(p, alphas, scorer).clamp(min=LOWEST_SCORE)
        target = normalised(alphas * scores ** -(1 + p.percent))
        return normalised(target.clamp(scorer.min_weight, 1 - scorer.min_weight) * (alphas > 0))

    return weigh


def _scores_so_far(p: Predictions, alphas: torch.Tensor, scorer: ViewScorer) -> torch.Tensor:
    """How well each view reads so far, (batch, views).

    A sigma is scored once. Samplers of second order and patches after guidance come back to it, the latter with
    predictions that are not pictures.
    """
    memory = p.memory
    if memory.scores is None or memory.sigma != p.sigma:
        mixed = sum(x0 * alphas[0, i].to(x0) for i, x0 in enumerate(p.guided()))
        scores = scorer.score(mixed).to(alphas)  # type: ignore[arg-type]
        before = scores if memory.scores is None else memory.scores
        memory.sigma, memory.scores = p.sigma, scorer.smoothing * before + (1 - scorer.smoothing) * scores
    return memory.scores


BALANCES: dict[str, Callable[[Sequence[float]], Weights]] = {
    "manual": manual,
    "prioritise first": prioritise_first,
    "alternate": alternate,
    "guidance norm": guidance_norm,
}
