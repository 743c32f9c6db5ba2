"""Cross-Token Non-Maximum Suppression as a patch of the model: works in any sampler, on prompts that know their objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.patcher_extension
import torch

from ...methods.compose.similarity import ObjectPositions
from ...methods.compose.suppression import suppression
from .. import keys
from ..engine.attention import CROSS, Site, find_sites, unet_of
from ..engine.attention_patches import Attend, override_attention
from ..engine.sampling import percent_of


def with_suppression(model: Any, strength: float, start: float, end: float, *, renormalise: bool = False) -> Any:
    """A clone of the model in whose cross-attentions the objects of a prompt keep out of each other's places.

    Args:
        start, end: the part of the sampling, in percent (0 to 1), in which it works.

    Raises:
        ValueError: the model is no UNet.
    """
    patched = model.clone()
    sites = find_sites(unet_of(patched.model), CROSS)
    if strength == 0:
        return patched

    def wrapper(executor, model, conds, x, timestep, model_options, *args, **kwargs):
        known = words_of(conds)
        progress = percent_of(model.model_sampling, float(timestep.max())) if known else 0.0
        if known and start <= progress <= end:
            suppressor = Suppressor(known, strength, renormalise)
            model_options = override_attention(model_options, unet_of(model), sites, suppressor)
        return executor(model, conds, x, timestep, model_options, *args, **kwargs)

    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, keys.SUPPRESSION, _named)
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, keys.SUPPRESSION, wrapper)
    return patched


def _named(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a sampling: writes into its conditionings, which the host has copied for it, what the guider calls them."""
    for name, entries in executor.class_obj.conds.items():
        for entry in entries:
            entry[keys.PROMPT_TYPE] = name
    return executor(*args, **kwargs)


def words_of(conds: Sequence[Any]) -> dict[Any, ObjectPositions]:
    """The objects of every prompt that names some, by the host's id of the conditioning; those of negatives are left out.

    Guiders ask in orders and numbers of their own (two views are two positives, a concept's path has both sides), so that
    neither tells. What tells is the host's word for an entry's side, else the name its guider holds it by; where nobody has
    said anything, the second of two is the negative.
    """
    found = {}
    for number, cond in enumerate(conds):
        for entry in cond or ():
            told = entry.get("prompt_type", entry.get(keys.PROMPT_TYPE))
            negative = "negative" in told if told else len(conds) == 2 and number == 1
            if not negative and keys.OBJECT_POSITIONS in entry and len(entry[keys.OBJECT_POSITIONS].objects) > 1:
                found[entry["uuid"]] = entry[keys.OBJECT_POSITIONS]
    return found


class Suppressor:
    """What answers at the cross-attentions during one call: the attention as it was, and the suppression on top.

    Where concepts have taken the prompt's place, its objects are not looked at, so that there is nothing to keep apart: the
    change has the share that the prompt has (``keys.BASE_WEIGHT``), all of it if nobody has told one.
    """

    def __init__(self, words: dict[Any, ObjectPositions], strength: float, renormalise: bool) -> None:
        self.words, self.strength, self.renormalise = words, strength, renormalise

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site, extra: dict[str, Any], attend: Attend
    ) -> torch.Tensor:
        out = attend(q, k, v)
        uuids = extra.get("uuids") or ()
        count = q.shape[0] // max(1, len(uuids))
        for number, uuid in enumerate(uuids):
            if uuid in self.words:
                rows = slice(number * count, (number + 1) * count)
                out = out.clone() if out.is_inference() and torch.is_grad_enabled() else out
                out[rows] += self._change(q[rows], k[rows], v[rows], self.words[uuid], extra)
        return out

    def _change(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, words: ObjectPositions, extra: dict[str, Any]
    ) -> torch.Tensor:
        height, width = extra["activations_shape"][-2:]
        split = (t.unflatten(-1, (extra["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
        change = suppression(*split, words.objects, (height, width), self.strength, renormalise=self.renormalise)
        change = change.transpose(1, 2).flatten(-2)  # (rows, tokens, heads · channels)
        share = extra.get(keys.BASE_WEIGHT)
        return change if share is None else change * share((height, width))[:, None].to(change)
