"""From what a user asks for to the plan of one training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from ...choices import chosen
from ...linked_list import in_order
from ..edit import Edit
from ..spec import Erased, Preserved, check_erased, check_preserved, sentences
from ..train import Schedule
from . import Recipe, Target, scheduled
from .context import ContextT, MethodSettings, TrainingTexts

Item = TypeVar("Item")

TRAJECTORIES = {"draft": (8, 10), "standard": (12, 12), "thorough": (24, 20)}
"""Trajectories of a budget, and their steps."""
PER_CONCEPT = 4  # trajectories at least, if several concepts are erased
PRESERVED_SHARE = 4  # preserved prompts per trajectory of the concepts: there is more to preserve than to erase


@dataclass(frozen=True)
class TrainOptions:
    """What a user sets for one training; None: the recipe's or the budget's own number.

    Attributes:
        iterations, rate, preserve_weight, erased_below, max_drift: as in ``Schedule``.
        rank, target_modules: of the change, and the name of the layers of the UNet that learn.
        eta: how far to push beyond the anchor, for concepts with and without an anchor.
        trajectories, steps, cfg: how many pictures of the concepts are sampled for states to train at, and how.
        batch: rows of the concept per iteration, and as many that must not move.
        preview_every: iterations per preview picture; 0: none.
        keep_on_cancel: whether a cancel keeps what has been learned, or stops the run.
        seed: of everything random.
        size: height and width of the training's latents in cells.
        start: a trained edit to continue from.
    """

    iterations: int | None = None
    rate: float | None = None
    rank: int = 16
    target_modules: str = "cross k/v"
    eta: float | None = None
    preserve_weight: float | None = None
    erased_below: float | None = None
    max_drift: float | None = None
    trajectories: int | None = None
    steps: int | None = None
    cfg: float = 3.0
    batch: int = 4
    preview_every: int = 25
    keep_on_cancel: bool = True
    seed: int = 0
    size: tuple[int, int] = (64, 64)
    start: Edit = field(default_factory=Edit)


@dataclass(frozen=True)
class TrajectoryPlan:
    """How trajectories are sampled: how many of the concepts, their steps and cfg, and whether also of the anchors."""

    count: int
    steps: int
    cfg: float
    of_anchor: bool = False


@dataclass(frozen=True)
class Plan(Generic[ContextT]):
    """One training.

    Attributes:
        concepts: what is erased, and what it becomes.
        schedule, settings: the recipe's, with what the options set.
    """

    recipe: Recipe[ContextT]
    budget: str
    concepts: tuple[Erased, ...]
    texts: TrainingTexts
    schedule: Schedule
    settings: MethodSettings
    trajectories: TrajectoryPlan
    options: TrainOptions

    @property
    def sampled_steps(self) -> int:
        """How many steps of trajectories a training of the UNet samples first."""
        banks = 2 if self.trajectories.of_anchor else 1
        return (self.trajectories.count * banks + len(self.texts.preserved)) * self.trajectories.steps


def plan_of(
    recipe: Recipe[ContextT], budget: str, concepts: Erased, preserved: Preserved | None, options: TrainOptions
) -> Plan[ContextT]:
    """The plan of a training.

    Raises:
        ValueError: a concept, a preserved prompt, a budget or an edit to continue from that cannot be used.
    """
    erased = tuple(concepts.in_order())
    _check(erased, preserved, options.start)
    trajectories, most = _trajectories(recipe, budget, len(erased), options)
    return Plan(
        recipe,
        budget,
        erased,
        _texts(erased, _preserved_texts(preserved, most, options.seed)),
        _schedule(scheduled(recipe, budget), options),
        _settings(recipe.settings, options),
        trajectories,
        options,
    )


def in_turn(lists: Sequence[Sequence[Item]]) -> list[Item]:
    """The first items of all lists, then the second ones, …

    Shorter lists begin again, so entry i belongs to list i mod their number.
    """
    longest = max(map(len, lists))
    return [items[i % len(items)] for i in range(longest) for items in lists]


def _given(value: Item | None, default: Item) -> Item:
    return default if value is None else value


def _check(erased: Sequence[Erased], preserved: Preserved | None, start: Edit) -> None:
    if start.text is not None or start.pooled is not None:
        raise ValueError(
            "The edit to continue from was solved, not trained; apply it to the model with Apply Erasure, train on "
            "that, and apply both."
        )
    for concept in erased:
        check_erased(concept)
    check_preserved(erased, in_order(preserved))


def _trajectories(
    recipe: Recipe[ContextT], budget: str, concepts: int, options: TrainOptions
) -> tuple[TrajectoryPlan, int | None]:
    """How trajectories are sampled, and the most preserved prompts there may be (None: any number)."""
    count, steps = chosen(TRAJECTORIES, budget, "budget")
    sampling = TrajectoryPlan(
        _given(options.trajectories, max(count, concepts * PER_CONCEPT)),
        _given(options.steps, steps),
        options.cfg,
        recipe.anchor_trajectories,
    )
    if recipe.target is Target.UNET:
        return sampling, PRESERVED_SHARE * count
    return replace(sampling, count=0), None


def _schedule(schedule: Schedule, options: TrainOptions) -> Schedule:
    return replace(
        schedule,
        iterations=_given(options.iterations, schedule.iterations),
        rate=_given(options.rate, schedule.rate),
        preserve_weight=_given(options.preserve_weight, schedule.preserve_weight),
        erased_below=_given(options.erased_below, schedule.erased_below),
        max_drift=_given(options.max_drift, schedule.max_drift),
    )


def _settings(settings: MethodSettings, options: TrainOptions) -> MethodSettings:
    return replace(
        settings,
        batch=options.batch,
        preserve_batch=options.batch,
        seed=options.seed,
        eta=_given(options.eta, settings.eta),
        eta_alone=_given(options.eta, settings.eta_alone),
    )


def _texts(erased: Sequence[Erased], preserved: tuple[str, ...]) -> TrainingTexts:
    """The sentences of all concepts, in turn."""
    pairs = in_turn([sentences(concept) for concept in erased])
    count = len(erased)
    return TrainingTexts(
        concept=tuple(s.text for s in pairs),
        anchor=tuple(s.anchored for s in pairs),
        preserved=preserved,
        concepts=count,
        replaced=tuple(bool(erased[i % count].anchor.strip()) for i in range(len(pairs))),
    )


def _preserved_texts(preserved: Preserved | None, most: int | None, seed: int) -> tuple[str, ...]:
    """All preserved prompts, or at most so many, chosen by the seed: each costs a trajectory.

    Captions that are preserved on average are left out: they would crowd out what was listed.
    """
    prompts = [prompt for entry in in_order(preserved) if not entry.averaged for prompt in entry.prompts]
    if most is None or len(prompts) <= most:
        return tuple(prompts)
    return tuple(random.Random(seed).sample(prompts, most))
