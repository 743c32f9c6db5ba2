"""Cross-Token Non-Maximum Suppression as a patch of the model, in any sampler, for prompts that mark their objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import comfy.patcher_extension
import torch

from ...methods.compose.similarity import ObjectPositions
from ...methods.compose.suppression import suppression
from ...methods.token_rows import every_copy
from .. import keys
from ..engine.attention import CROSS, Site, find_sites
from ..engine.attention_patches import Attend, override_attention
from ..engine.model_call import conditioning_rows
from ..engine.reach import check_reaches_network
from ..engine.sampling import percent_of
from ..registry import unet_of
from ..text.tokens import context_length
from ..types import BaseModel, Conds, Executor, ModelOptions, ModelPatcher, TransformerOptions


def with_suppression(
    model: ModelPatcher, strength: float, start: float, end: float, *, renormalise: bool = False
) -> ModelPatcher:
    """A clone of the model in whose cross-attentions the objects of a prompt do not share tokens.

    Args:
        start, end: the part of the sampling, in percent (0 to 1), in which it works.

    Raises:
        ValueError: the model is not a UNet.
    """
    patched = model.clone()
    sites = find_sites(unet_of(patched.model), CROSS)
    if strength == 0:
        return patched
    wrapper = _EvaluationWrapper(sites, strength, (start, end), renormalise)
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, keys.SUPPRESSION, _with_names)
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, keys.SUPPRESSION, wrapper)
    return patched


@dataclass(frozen=True, eq=False)
class _EvaluationWrapper:
    """Around the host's batched evaluation: inside the window, an override of the cross-attentions.

    Args:
        window: first and last percent (0 to 1).
    """

    sites: Sequence[Site]
    strength: float
    window: tuple[float, float]
    renormalise: bool

    def __call__(
        self,
        executor: Executor,
        model: BaseModel,
        conds: list[Conds | None],
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: ModelOptions,
        *args: object,
        **kwargs: object,
    ) -> object:
        objects = objects_by_entry(conds)
        percent = percent_of(model.model_sampling, float(timestep.max())) if objects else 0.0
        if objects and self.window[0] <= percent <= self.window[1]:
            suppressor = Suppressor(objects, self.strength, self.renormalise)
            model_options = override_attention(model_options, unet_of(model), self.sites, suppressor)
        return executor(model, conds, x, timestep, model_options, *args, **kwargs)


def _with_names(executor: Executor, *args: object, **kwargs: object) -> object:
    """Around a sampling: writes into each conditioning entry, a copy for this sampling, its name in the guider.

    Raises:
        ValueError: the model is compiled, and a prompt marks objects.
    """
    conds = executor.class_obj.conds
    for name, entries in conds.items():
        for entry in entries:
            entry[keys.PROMPT_TYPE] = name
    if objects_by_entry(list(conds.values())):
        check_reaches_network(executor.class_obj.model_patcher, "Keep Objects Apart")
    return executor(*args, **kwargs)


def objects_by_entry(conds: Sequence[Conds | None]) -> dict[UUID, ObjectPositions]:
    """The objects of every prompt that marks several, by the entry's uuid. Negatives are left out.

    Guiders evaluate conditionings in different orders and numbers: two views are two positives, a concept's path has
    both. So the side comes from the host's name for an entry, else from its name in the guider. Without either, the
    second of two is the negative.
    """
    found = {}
    for number, cond in enumerate(conds):
        for entry in cond or ():
            name = entry.get("prompt_type", entry.get(keys.PROMPT_TYPE))
            negative = "negative" in name if name else len(conds) == 2 and number == 1
            if not negative and keys.OBJECT_POSITIONS in entry and len(entry[keys.OBJECT_POSITIONS].objects) > 1:
                found[entry["uuid"]] = entry[keys.OBJECT_POSITIONS]._replace(length=context_length(entry))
    return found


class Suppressor:
    """The override of the cross-attentions during one call: the original output with the suppression added.

    Inside concept regions the base prompt is not used, so there is nothing to suppress. The change is scaled by the
    base prompt's weight per token (``keys.BASE_WEIGHT``), or applied in full if no weight is set.
    """

    def __init__(self, objects: Mapping[UUID, ObjectPositions], strength: float, renormalise: bool) -> None:
        self.objects, self.strength, self.renormalise = objects, strength, renormalise

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site, options: TransformerOptions, attend: Attend
    ) -> torch.Tensor:
        out = attend(q, k, v)
        for uuid, rows in conditioning_rows(options, len(q)):
            if uuid in self.objects:
                out = out.clone() if out.is_inference() and torch.is_grad_enabled() else out
                out[rows] += self._change(q[rows], k[rows], v[rows], self.objects[uuid], options)
        return out

    def _change(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: ObjectPositions, options: TransformerOptions
    ) -> torch.Tensor:
        """(rows, tokens, heads · channels)."""
        height, width = options["activations_shape"][-2:]
        objects = [every_copy(columns, positions.length, k.shape[1]) for columns in positions.objects]
        q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
        grid = height, width
        change = suppression(q, k, v, objects, grid, self.strength, renormalise=self.renormalise)
        change = change.transpose(1, 2).flatten(-2)
        base_weight = options.get(keys.BASE_WEIGHT)
        return change if base_weight is None else change * base_weight(grid)[:, None].to(change)
