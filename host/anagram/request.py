"""An anagram assembled from plain data: what a node or a board hands over, as guider and model patch take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...methods.anagram.combine import AVERAGING, Combination, combiner
from ...methods.anagram.overlap import GradientStep, gradient_step_of
from ...methods.anagram.prediction import Combine
from .contrast import contrasted_prompts
from .views import ViewPrompt


@dataclass(frozen=True)
class AnagramRequest:
    """The prompts with their contrast, the function that combines their predictions, and the gradient step if any."""

    prompts: list[ViewPrompt]
    combine: Combine
    gradient_step: GradientStep | None


def anagram_request(views: Sequence[ViewPrompt], settings: Combination = AVERAGING) -> AnagramRequest:
    """The views with the settings carried out on them.

    Raises:
        ValueError: an unknown balance or rectification, weights that cannot be normalised, or incomplete components.
    """
    combine = combiner(settings, [v.weight for v in views], [v.view for v in views], [v.cfg for v in views])
    prompts = contrasted_prompts(views, settings.contrast)
    return AnagramRequest(prompts, combine, gradient_step_of(settings.anti_segregation))
