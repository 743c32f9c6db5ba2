"""Erasure by training: one file a method, one signature, one registry."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...choices import check_choice
from ..train import Schedule
from .all_but_one import all_but_one
from .co_erasing import co_erasing
from .doco import doco
from .esd import esd
from .few_shot import few_shot
from .ground import Method, Settings
from .realera import realera


@dataclass(frozen=True)
class Recipe:
    """A method with the settings it starts from, at the standard budget.

    ``images``: it learns from pictures of the concept. ``anchor_states``: it works at states of the anchor's trajectories.
    ``text_encoder``: it trains the text encoder instead of the model.
    """

    method: Method
    schedule: Schedule
    settings: Settings = field(default_factory=Settings)
    images: bool = False
    anchor_states: bool = False
    text_encoder: bool = False


METHODS: dict[str, Recipe] = {
    "ESD": Recipe(esd, Schedule(150, 3e-3, preserve_weight=3.0)),
    "All but One": Recipe(all_but_one, Schedule(150, 3e-3), Settings(eta=0.5)),
    "Co-Erasing": Recipe(co_erasing, Schedule(150, 3e-3, preserve_weight=3.0), images=True),
    "RealEra": Recipe(realera, Schedule(150, 3e-3, preserve_weight=3.0)),
    "DoCo (heavy)": Recipe(doco, Schedule(250, 2e-3, surgery=True, newest=True), anchor_states=True),
}
"""Methods that train the model; tuned on the demo model (see the score board), in the papers' ranges where those are known."""

FEW_SHOT = Recipe(few_shot, Schedule(60, 2e-3, enough=0.02, smoothing=0.8), images=True, text_encoder=True)

BUDGETS = {"draft": 0.4, "standard": 1.0, "thorough": 4.0}
"""How many iterations a budget takes, as a multiple of the standard one."""


def scheduled(recipe: Recipe, budget: str) -> Schedule:
    """The recipe's schedule at that budget.

    Raises:
        ValueError: there is no such budget.
    """
    check_choice(BUDGETS, budget, "budget")
    return replace(recipe.schedule, iterations=max(1, round(recipe.schedule.iterations * BUDGETS[budget])))
