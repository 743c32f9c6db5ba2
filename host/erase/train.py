"""From words and pictures to a trained edit: a plan carried out on the host's models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.utils
import torch

from ...methods.choices import check_choice
from ...methods.colours import colours_of
from ...methods.erase.edit import Edit
from ...methods.erase.fingerprint import clip_fingerprint
from ...methods.erase.records import EditSpec, TrainingResult
from ...methods.erase.trained import Target
from ...methods.erase.trained.context import ContextT, Pictures, TextEncoderContext, UNetContext
from ...methods.erase.trained.plan import Plan
from ..engine.gradients import check_differentiable, check_patcher
from ..lora.adapters import TARGET_MODULES
from ..text.schedules import check_one_encoding
from ..text.tokens import PromptEncoder
from ..types import CLIP, VAE, ModelPatcher
from .session import TextEncoderSession, Trained, UNetSession
from .trajectories import own_pictures
from .weights import base_fingerprint, check_clip_width

LAST_LOSSES = 10  # whose mean is reported as the loss at the end


def latents_of(vae: VAE, pictures: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pictures (n, h, w, channels) in 0..1 as latents of the canvas.

    Raises:
        ValueError: there are none.
    """
    scaled = comfy.utils.common_upscale(colours_of(pictures).movedim(-1, 1), width, height, "area", "center")
    return vae.encode(scaled.movedim(1, -1))


def train_erasure(
    model: ModelPatcher, clip: CLIP, plan: Plan[Any], images: torch.Tensor | None = None
) -> tuple[Edit, Trained]:
    """An edit that takes every concept of the plan to its anchor, and how the training went.

    The recipe's target says whether the edit is of the model's layers or of the text encoder's.

    Args:
        images: clean latents of the concepts. If the recipe needs some and none are given, the model draws its own.

    Raises:
        ValueError: the model cannot be trained, or it has no such layers.
    """
    check_choice(TARGET_MODULES, plan.options.target_modules, "choice of layers")
    recipe, pictures = plan.recipe, None
    if recipe.pictures and images is not None:
        pictures = Pictures(images)
    elif recipe.pictures:
        check_trainable(model, clip)
        pictures = own_pictures(model, clip, plan)
    train_target = train_text_encoder if recipe.target is Target.TEXT_ENCODER else train_unet
    trained = train_target(model, clip, plan, pictures)
    unused = images is not None and not recipe.pictures
    note = f"{recipe.name} learns from words alone; the pictures were not used." if unused else ""
    return _edit(trained, plan, model, clip, note), trained


def train_unet(model: ModelPatcher, clip: CLIP, plan: Plan[UNetContext], pictures: Pictures | None = None) -> Trained:
    """Trains factors for the UNet's layers.

    Args:
        pictures: of the concepts, for the methods that use some.

    Raises:
        ValueError: the model cannot be trained (compiled, quantised, not a UNet, too large to load as a whole), or the
            CLIP does not belong to it.
    """
    check_trainable(model, clip)
    return UNetSession(model, clip, plan).run(pictures)


def train_text_encoder(
    model: ModelPatcher, clip: CLIP, plan: Plan[TextEncoderContext], pictures: Pictures | None = None
) -> Trained:
    """Trains factors for the layers of the text encoder, through the model.

    Raises:
        ValueError: as ``train_unet``; the text encoder is of another kind.
    """
    check_trainable(model, clip)
    return TextEncoderSession(model, clip, plan).run(pictures)


def check_trainable(model: ModelPatcher, clip: CLIP) -> None:
    """Refuses what cannot be trained, before any work is done.

    Raises:
        ValueError: what is in the way.
    """
    check_patcher(model)
    check_differentiable(model.model)
    check_one_encoding(clip)
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    check_clip_width(model, empty[0][0].shape[-1])


def _edit(trained: Trained, plan: Plan[ContextT], model: ModelPatcher, clip: CLIP, note: str = "") -> Edit:
    """The outcome as an edit. Nothing in it depends on the time it took, so one seed gives one file.

    Whatever the edit to continue from has elsewhere, in the text encoder or in the model, stays in it.
    """
    outcome, start = trained.outcome, plan.options.start
    training: TrainingResult = {
        "reason": outcome.reason,
        "rank": plan.options.rank,
        "erase": _first_and_last(outcome.erase),
        "preserve": _first_and_last(outcome.preserve),
    }
    if note:
        training["note"] = note
    return Edit(
        layers={**start.layers, **outcome.factors},
        diffs=start.diffs,
        spec=_spec(trained, plan, clip),
        clip=clip_fingerprint(PromptEncoder(clip)),
        base=base_fingerprint(model),
        report={"training": training},
    )


def _spec(trained: Trained, plan: Plan[ContextT], clip: CLIP) -> EditSpec:
    """How the edit is made, in values JSON knows."""
    options = plan.options
    spec: EditSpec = {
        "solver": plan.recipe.name,
        "budget": plan.budget,
        "seed": options.seed,
        "size": list(options.size),
        "iterations": len(trained.outcome.erase),
        "eta": plan.settings.eta,
        "eta_alone": plan.settings.eta_alone,
        "rate": plan.schedule.rate,
        "layers": options.target_modules,
        "concepts": [{"concept": c.concept, "anchor": c.anchor} for c in plan.concepts],
        "kept": list(plan.texts.preserved),
        "clip_skip": clip.layer_idx,
    }
    if not options.start.empty:
        spec["start"] = options.start.spec
    return spec


def _first_and_last(losses: Sequence[float]) -> list[float]:
    """The first loss, and the mean of the last ones."""
    last = losses[-LAST_LOSSES:]
    return [round(losses[0], 6), round(sum(last) / len(last), 6)] if losses else []
