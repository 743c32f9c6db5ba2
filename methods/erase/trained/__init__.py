"""Erasure by training: one file per method, one signature, one registry."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Generic

from ...choices import chosen
from ..train import Schedule
from .all_but_one import all_but_one
from .co_erasing import co_erasing
from .context import ContextT, Method, MethodSettings, TextEncoderContext, UNetContext
from .doco import doco
from .esd import esd
from .few_shot import few_shot
from .realera import realera


class Target(Enum):
    """Whose layers are trained."""

    UNET = "UNet"
    TEXT_ENCODER = "text encoder"


@dataclass(frozen=True)
class Recipe(Generic[ContextT]):
    """A method with the settings it starts from, at the standard budget.

    Attributes:
        name: of the method, as saved edits hold it.
        pictures: whether it learns from pictures of the concept.
        anchor_trajectories: whether it works at states of the anchor's trajectories.
        target: whose layers it trains.
    """

    name: str
    method: Method[ContextT]
    schedule: Schedule
    settings: MethodSettings = field(default_factory=MethodSettings)
    pictures: bool = False
    anchor_trajectories: bool = False
    target: Target = Target.UNET


_UNET_RECIPES: tuple[Recipe[UNetContext], ...] = (
    Recipe("ESD", esd, Schedule(150, 3e-3, preserve_weight=3.0)),
    Recipe("All but One", all_but_one, Schedule(150, 3e-3), MethodSettings(eta=0.5)),
    Recipe("Co-Erasing", co_erasing, Schedule(150, 3e-3, preserve_weight=3.0), pictures=True),
    Recipe("RealEra", realera, Schedule(150, 3e-3, preserve_weight=3.0)),
    Recipe("DoCo (heavy)", doco, Schedule(250, 2e-3, surgery=True, newest_is_best=True), anchor_trajectories=True),
)
METHODS: dict[str, Recipe[UNetContext]] = {recipe.name: recipe for recipe in _UNET_RECIPES}
"""Methods that train the model, tuned on the demo model (see the score board), within the papers' ranges where
known."""

FEW_SHOT: Recipe[TextEncoderContext] = Recipe(
    "few-shot",
    few_shot,
    Schedule(60, 2e-3, erased_below=0.02, smoothing=0.8),
    pictures=True,
    target=Target.TEXT_ENCODER,
)
"""The method that trains the text encoder."""

BUDGETS = {"draft": 0.4, "standard": 1.0, "thorough": 4.0}
"""Iterations of a budget, as a multiple of the standard one."""


def scheduled(recipe: Recipe[ContextT], budget: str) -> Schedule:
    """The recipe's schedule at that budget.

    Raises:
        ValueError: there is no such budget.
    """
    factor = chosen(BUDGETS, budget, "budget")
    return replace(recipe.schedule, iterations=max(1, round(recipe.schedule.iterations * factor)))
