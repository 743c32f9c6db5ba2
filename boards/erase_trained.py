"""Rows of ``dev.py score erase`` that train: every method at its standard budget, against one concept at a time.

Training takes minutes, so these rows take the first groups of one concept only. Prompts and attacks are the solvers' on
those groups. ``minutes`` is the time of the training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import comfy.patcher_extension
import torch

from ..host.erase.apply import TEXT, apply_edit, apply_to_clip
from ..host.erase.solve import SolveRequest, solve_erasure
from ..host.erase.train import train_erasure
from ..host.lora.adapters import attached, layers_named
from ..methods.erase.lowrank import LowRank
from ..methods.erase.spec import Erased, Preserved
from ..methods.erase.trained import FEW_SHOT as FEW_SHOT_RECIPE
from ..methods.erase.trained import METHODS as RECIPES
from ..methods.erase.trained import Recipe
from ..methods.erase.trained.plan import TrainOptions, plan_of

SIZE = (16, 16)
BUDGET = "standard"
GROUPS = 2  # groups of one concept that a training row measures
METHODS = {
    "esd": "ESD",
    "all-but-one": "All but One",
    "co-erasing": "Co-Erasing",
    "realera-b": "RealEra",
    "doco": "DoCo (heavy)",
}
"""Row name to the method of Train Erasure."""
FEW_SHOT = "few-shot"
COMBINED = "rece + co-erasing"
ROWS = (*METHODS, FEW_SHOT, COMBINED)

Trained = tuple[Any, Any, float]
"""The edited model, the encoder to go with it, and the minutes the training took."""


def train_row(name: str, model: Any, clip: Any, concepts: Erased | None, preserved: Preserved) -> Trained:
    """What a row's method leaves. The combined row applies a solved and a trained edit, both made on the plain one."""
    assert concepts is not None
    started = time.monotonic()
    recipe: Recipe[Any] = FEW_SHOT_RECIPE if name == FEW_SHOT else RECIPES[METHODS.get(name, "Co-Erasing")]
    plan = plan_of(recipe, BUDGET, concepts, preserved, TrainOptions(preview_every=0, seed=0, size=SIZE))
    edit, _ = train_erasure(model, clip, plan)
    if name == FEW_SHOT:
        return model, apply_to_clip(clip, edit), (time.monotonic() - started) / 60
    if name == COMBINED:
        model = apply_edit(model, solve_erasure(model, clip, concepts, preserved, SolveRequest("rece")), 1.0, TEXT)
    return with_adapter(model, edit.layers), clip, (time.monotonic() - started) / 60


def with_adapter(model: Any, factors: Mapping[str, LowRank]) -> Any:
    """A clone that runs with the factors on the activation side.

    The pictures are the same as with Apply Erasure's patches. The weights that all clones share stay the plain model's,
    because an attack evaluates both in turn.
    """
    edited = model.clone()
    layers = layers_named(edited.model, factors)

    def run(executor: Callable[..., torch.Tensor], *arguments: Any, **named: Any) -> torch.Tensor:
        with attached(layers, dict(factors)):
            return executor(*arguments, **named)

    comfy.patcher_extension.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL,
        "concepts.trained",
        run,
        edited.model_options,
        is_model_options=True,
    )
    return edited
