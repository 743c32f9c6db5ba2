"""From words and pictures to a trained edit: what the nodes ask for, as a plan for a training on the host's models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import comfy.utils
import torch

from ...methods.choices import check_choice
from ...methods.erase.edit import Edit
from ...methods.erase.fingerprint import clip_fingerprint
from ...methods.erase.records import EditSpec, TrainingResult
from ...methods.erase.spec import Erased, Preserved, check_erased, check_preserved, sentences
from ...methods.erase.train import Factors, Schedule
from ...methods.erase.trained import FEW_SHOT, METHODS, Recipe, scheduled
from ..lora.adapters import PLACES
from ..text.tokens import PromptEncoder
from .predictions import prompts_of
from .session import Pictures, Plan, Trained, check_trainable, train_text_encoder, train_unet
from .trajectories import noise_for, paint
from .weights import base_fingerprint

T = TypeVar("T")

OWN_PICTURES = 4  # of a concept, drawn by the model itself where none are given
STATES = {"draft": (8, 10), "standard": (12, 12), "thorough": (24, 20)}
"""Trajectories of a budget, and their steps."""
KEPT_SHARE = 4  # trajectories of preserved prompts for each of the concept's: there is more to keep than to erase


@dataclass(frozen=True)
class Choices:
    """What the options nodes set; zero and empty are the method's own, and minus one is where zero means something."""

    iterations: int = 0
    rate: float = 0.0
    rank: int = 16
    layers: str = "cross k/v"
    eta: float = -1.0
    keep: float = -1.0
    enough: float = -1.0
    budget: float = 0.0
    trajectories: int = 0
    steps: int = 0
    cfg: float = 3.0
    batch: int = 4
    preview_every: int = 25
    keep_on_cancel: bool = True


@dataclass(frozen=True)
class Request:
    """One training as a user asks for it. ``size``: height and width of the pictures to train at, in latent cells."""

    method: str
    budget: str
    seed: int
    size: tuple[int, int]
    choices: Choices = field(default_factory=Choices)
    start: Edit = field(default_factory=Edit)


def latents_of(vae: Any, pictures: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pictures (n, h, w, 3) in 0..1 as latents of the canvas.

    Raises:
        ValueError: there are none.
    """
    if not len(pictures):
        raise ValueError("The batch of pictures is empty; connect at least one picture of the concept, four work well.")
    scaled = comfy.utils.common_upscale(pictures[..., :3].movedim(-1, 1), width, height, "area", "center")
    return vae.encode(scaled.movedim(1, -1))


def train_erasure(
    model: Any,
    clip: Any,
    concepts: Erased,
    kept: Preserved | None,
    request: Request,
    images: torch.Tensor | None = None,
) -> tuple[Edit, Trained]:
    """An edit of the model's layers that takes every concept of the list to its anchor, and how the training went.

    Args:
        images: clean latents of the concept; where a method needs some and none are given, the model draws its own.

    Raises:
        ValueError: a concept cannot be used, there is no such method, or the model cannot be trained.
    """
    check_choice(METHODS, request.method, "method")
    _check_start(request.start)
    recipe = METHODS[request.method]
    plan = plan_of(recipe, concepts, kept, request, request.start.on_model())
    pictures = _pictures(model, clip, plan, images) if recipe.images else None
    trained = train_unet(model, clip, plan, pictures)
    unused = images is not None and not recipe.images
    note = f"{request.method} learns from words alone; the pictures were not used." if unused else ""
    return _edit(trained, request, plan, concepts, model, clip, note), trained


def unlearn_in_text(
    model: Any,
    clip: Any,
    concepts: Erased,
    kept: Preserved | None,
    request: Request,
    images: torch.Tensor | None = None,
) -> tuple[Edit, Trained]:
    """The same in the layers of the text encoder, from a handful of pictures."""
    _check_start(request.start)
    plan = plan_of(FEW_SHOT, concepts, kept, request, request.start.on_clip())
    trained = train_text_encoder(model, clip, plan, _pictures(model, clip, plan, images))
    return _edit(trained, request, plan, concepts, model, clip), trained


def _check_start(start: Edit) -> None:
    if start.text is not None or start.pooled is not None:
        raise ValueError(
            "The edit to go on from was solved, not trained; apply it to the model with Apply Erasure, train on that, and apply both."
        )


def _pictures(model: Any, clip: Any, plan: Plan, given: torch.Tensor | None) -> Pictures:
    """Those that are given, or the model's own."""
    return Pictures(given) if given is not None else own_pictures(model, clip, plan)


def plan_of(recipe: Recipe, concepts: Erased, kept: Preserved | None, request: Request, start: Factors) -> Plan:
    """The plan of a request.

    Raises:
        ValueError: a concept, a choice of layers or a budget that cannot be used.
    """
    for concept in concepts.in_order():
        check_erased(concept)
    check_preserved(concepts.in_order(), kept.in_order() if kept else [])
    choices = request.choices
    check_choice(PLACES, choices.layers, "choice of layers")
    schedule = _schedule(scheduled(recipe, request.budget), choices)
    several = concepts.in_order()
    pairs = in_turn([sentences(concept) for concept in several])
    trajectories, steps = STATES[request.budget]
    count = choices.trajectories or max(trajectories, len(several) * 4)
    settings = replace(recipe.settings, batch=choices.batch, kept_batch=choices.batch, seed=request.seed)
    if choices.eta >= 0:
        settings = replace(settings, eta=choices.eta, eta_alone=choices.eta)
    kept_texts = _prompts(kept)
    return Plan(
        concept=tuple(s.text for s in pairs),
        anchor=tuple(s.anchored for s in pairs),
        replaced=tuple(bool(several[i % len(several)].anchor.strip()) for i in range(len(pairs))),
        method=recipe.method,
        schedule=schedule,
        settings=settings,
        kept=kept_texts if recipe.text_encoder else _some(kept_texts, KEPT_SHARE * trajectories, request.seed),
        place=choices.layers,
        rank=choices.rank,
        seed=request.seed,
        size=request.size,
        trajectories=0 if recipe.text_encoder else count,
        anchor_states=recipe.anchor_states,
        steps=choices.steps or steps,
        cfg=choices.cfg,
        start=start,
        preview_every=choices.preview_every,
        keep_on_cancel=choices.keep_on_cancel,
        concepts=len(several),
    )


def in_turn(lists: Sequence[Sequence[T]]) -> list[T]:
    """First ones first, then the second ones, …; shorter lists begin again, so that entry i is of list i mod their number."""
    longest = max(map(len, lists))
    return [some[i % len(some)] for i in range(longest) for some in lists]


def _schedule(schedule: Schedule, choices: Choices) -> Schedule:
    return replace(
        schedule,
        iterations=choices.iterations or schedule.iterations,
        rate=choices.rate or schedule.rate,
        preserve_weight=schedule.preserve_weight if choices.keep < 0 else choices.keep,
        enough=schedule.enough if choices.enough < 0 else choices.enough,
        budget=choices.budget or schedule.budget,
    )


def _prompts(kept: Preserved | None) -> tuple[str, ...]:
    return tuple(prompt for entry in (kept.in_order() if kept else []) for prompt in entry.prompts)


def _some(prompts: Sequence[str], most: int, seed: int) -> tuple[str, ...]:
    """At most so many, chosen by the seed: every one costs a trajectory."""
    return tuple(prompts) if len(prompts) <= most else tuple(random.Random(seed).sample(list(prompts), most))


def own_pictures(model: Any, clip: Any, plan: Plan) -> Pictures:
    """Clean latents of every concept as the model draws it, sentence after sentence."""
    check_trainable(model, clip)
    count = OWN_PICTURES * plan.concepts
    prompts = prompts_of(clip, [plan.concept[i % len(plan.concept)] for i in range(count)])
    noise = noise_for(model, [plan.seed + 1000 + i for i in range(count)], *plan.size)
    latents = paint(model, prompts, prompts_of(clip, [""]), noise, plan.steps, plan.cfg)
    return Pictures(latents, tuple(i % plan.concepts for i in range(count)))


def _edit(
    trained: Trained, request: Request, plan: Plan, concepts: Erased, model: Any, clip: Any, note: str = ""
) -> Edit:
    """The outcome as an edit; nothing in it depends on the time it took, so that the same seed is the same file.

    What the edit to go on from has elsewhere, in the text encoder or in the model, stays in it.
    """
    outcome, start = trained.outcome, request.start
    spec: EditSpec = {
        "solver": request.method, "budget": request.budget, "seed": request.seed, "size": list(request.size),
        "iterations": len(outcome.erase), "eta": plan.settings.eta, "eta_alone": plan.settings.eta_alone,
        "rate": plan.schedule.rate, "layers": plan.place,
        "concepts": [{"concept": c.concept, "anchor": c.anchor} for c in concepts.in_order()],
        "kept": list(plan.kept), "clip_skip": clip.layer_idx,
    }  # fmt: skip
    if not start.empty:
        spec["start"] = start.spec
    training: TrainingResult = {
        "reason": outcome.reason, "rank": plan.rank, "erase": _ends(outcome.erase), "preserve": _ends(outcome.preserve),
    }  # fmt: skip
    if note:
        training["note"] = note
    prints = clip_fingerprint(PromptEncoder(clip)), base_fingerprint(model)
    layers = {**start.layers, **outcome.factors}
    return Edit(
        layers=layers, diffs=start.diffs, spec=spec, clip=prints[0], base=prints[1], report={"training": training}
    )


def _ends(losses: list[float]) -> list[float]:
    """The first loss, and the mean of the last ones."""
    last = losses[-10:]
    return [round(losses[0], 6), round(sum(last) / len(last), 6)] if losses else []
