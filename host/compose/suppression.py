"""Cross-Token Non-Maximum Suppression as a patch of the model, in any sampler, for prompts that mark their objects.

In a transformer each attention in which the picture looks at the text is changed. Where both are one sequence, the
picture's queries lose weight on the columns of an object's words. Differs from the paper, which has cross-attention
alone: the softmax is over words and picture together; words still look at words and at the picture, and carry what they
have seen to the next block; and the maps of deep blocks are of words that have changed on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from uuid import UUID

import comfy.patcher_extension
import torch

from ...methods.compose.similarity import ObjectPositions
from ...methods.compose.suppression import suppression, suppression_of_columns
from ...methods.token_rows import every_copy
from .. import keys
from ..architecture import Architecture, Size
from ..engine.attention import CROSS, attention_to_columns, find_sites, heads_apart
from ..engine.attention_patches import Attend, override_attention
from ..engine.model_call import ModelCall, RunCall, around_model_call, conditioning_rows
from ..engine.reach import check_reaches_network
from ..engine.sampling import percent_of
from ..registry import architecture_of, has_decoder, unet_of
from ..text.equal_lengths import Attention, TextAttentionCall, TextAttentions, check_text_attentions
from ..text.sequence import check_layout, references_of
from ..types import BaseModel, CondEntry, Conds, Executor, ModelOptions, ModelPatcher, TransformerOptions

WHO = "Keep Objects Apart"
"""The subject of its refusals."""


def with_suppression(
    model: ModelPatcher, strength: float, start: float, end: float, *, renormalise: bool = False
) -> ModelPatcher:
    """A clone of the model in whose attentions to text the objects of a prompt do not share tokens.

    Args:
        start, end: the part of the sampling, in percent (0 to 1), in which it works.

    Raises:
        ValueError: the model's attentions to text are not known.
    """
    patched = model.clone()
    _check_model(patched.model)
    if strength == 0:
        return patched
    wrapper = _EvaluationWrapper(strength, (start, end), renormalise)
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, keys.SUPPRESSION, _with_names)
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, keys.SUPPRESSION, wrapper)
    return patched


def _check_model(model: BaseModel) -> None:
    """Refuses a model in which no column of an attention is of a known word.

    Raises:
        ValueError: what it is, and what to do.
    """
    architecture = architecture_of(model)
    if architecture.text_encoder is not None:
        raise architecture.lacks(
            f"{WHO} with the adapter of Anima, which writes the prompt in another encoder's tokens,", "leave it out"
        )
    if not has_decoder(model):
        check_text_attentions(model, architecture, WHO)


@dataclass(frozen=True, eq=False)
class _EvaluationWrapper:
    """Around the host's batched evaluation: inside the window, a change of the attentions to text.

    Args:
        window: first and last percent (0 to 1).
    """

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
        objects = objects_by_entry(conds, architecture_of(model))
        percent = percent_of(model.model_sampling, float(timestep.max())) if objects else 0.0
        if objects and self.window[0] <= percent <= self.window[1]:
            model_options = self._suppressing(model, objects, model_options)
        return executor(model, conds, x, timestep, model_options, *args, **kwargs)

    def _suppressing(
        self, model: BaseModel, objects: Mapping[UUID, ObjectPositions], model_options: ModelOptions
    ) -> ModelOptions:
        """A copy of the options under which these objects do not share tokens."""
        if has_decoder(model):
            unet = unet_of(model)
            suppressor = Suppressor(objects, self.strength, self.renormalise)
            return override_attention(model_options, unet, find_sites(unet, CROSS), suppressor)

        def suppressed(call: ModelCall, run: RunCall) -> torch.Tensor:
            entries = conditioning_rows(call.transformer_options, len(call.x))
            found = [(entry.rows, objects[entry.uuid]) for entry in entries if entry.uuid in objects]
            if not found:
                return run(call)
            return SuppressedCall(architecture_of(model), call, found, self.strength, self.renormalise).run(call, run)

        return around_model_call(model_options, keys.SUPPRESSION, suppressed)


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
        check_reaches_network(executor.class_obj.model_patcher, WHO)
    return executor(*args, **kwargs)


def objects_by_entry(
    conds: Sequence[Conds | None], architecture: Architecture | None = None
) -> dict[UUID, ObjectPositions]:
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
                found[entry["uuid"]] = _as_sampled(entry, architecture)
    return found


def _as_sampled(entry: CondEntry, architecture: Architecture | None) -> ObjectPositions:
    """The objects of a processed prompt where its tokens are by now, and how many these are."""
    words, moved = entry[keys.OBJECT_POSITIONS], entry.get(keys.WORDS_MOVED, 0)
    encoded, context = entry.get("cross_attn"), entry.get("model_conds", {}).get("c_crossattn")
    if architecture is not None and encoded is not None:
        moved += max(0, architecture.equal_lengths.least - encoded.shape[1])
    objects = tuple(tuple(position + moved for position in positions) for positions in words.objects)
    return words._replace(objects=objects, length=0 if context is None else int(context.cond.shape[1]))


class Suppressor:
    """The override of the cross-attentions during one call: the original output with the suppression added.

    Inside concept regions the base prompt is not used, so there is nothing to suppress. The change is scaled by the
    base prompt's weight per token (``keys.BASE_WEIGHT``), or applied in full if no weight is set.
    """

    def __init__(self, objects: Mapping[UUID, ObjectPositions], strength: float, renormalise: bool) -> None:
        self.objects, self.strength, self.renormalise = objects, strength, renormalise

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        site: object,
        options: TransformerOptions,
        attend: Attend,
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


class _Tokens(NamedTuple):
    """Where an attention has its tokens: how many keys there are, text first, and the image among the queries."""

    keys: int
    image: slice


class SuppressedCall(TextAttentionCall):
    """One model call of a transformer in which the picture's tokens do not share the objects of a prompt.

    Args:
        objects: rows of the call, and the objects of their prompt.

    Raises:
        ValueError: the call's tokens have no known places.
    """

    def __init__(
        self,
        architecture: Architecture,
        call: ModelCall,
        objects: Sequence[tuple[slice, ObjectPositions]],
        strength: float,
        renormalise: bool,
    ) -> None:
        super().__init__(TextAttentions(architecture.network, architecture.equal_lengths), WHO)
        check_layout(architecture, call, WHO)
        text = 0 if call.c_crossattn is None else int(call.c_crossattn.shape[1])
        size: Size = (int(call.x.shape[-2]), int(call.x.shape[-1]))
        self.grid, self.objects = architecture.grid(*size), objects
        self.strength, self.renormalise = strength, renormalise
        self.others = keys.ATTENTION_OVERRIDE in call.transformer_options
        self.tokens = _tokens_by_module(self.network, architecture, text, size, references_of(architecture, call))

    def filled_in(self) -> Iterator[tuple[slice, slice]]:
        yield from ()

    def attention(
        self, attend: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        out = attend(q, k, v, mask)
        tokens = self.tokens.get(self.site or "")
        if tokens is None:  # between words alone
            return out
        if k.shape[-2] != tokens.keys:
            raise ValueError(
                f"Another node adds tokens to the attention that {WHO} works in, so its columns are unknown; bypass it."
            )
        v = v.flatten(2) if v.ndim > q.ndim else v  # SD3's values have their heads apart
        columns = [(rows, [p for o in words.objects for p in o]) for rows, words in self.objects]
        probabilities = attention_to_columns(partial(attend, q, k, mask=mask), v, self.heads, columns, self.others)
        out = out.clone()
        for (rows, own), (_, words) in zip(columns, self.objects, strict=True):
            p = probabilities[rows, :, tokens.image, : len(own)]
            part = heads_apart(out[rows, tokens.image], self.heads)
            values = heads_apart(v[rows], self.heads)[:, :, own]
            counts, more = [len(o) for o in words.objects], (self.grid, self.strength)
            change = suppression_of_columns(p, values, part, counts, *more, renormalise=self.renormalise)
            out[rows, tokens.image] += change.transpose(1, 2).flatten(-2).to(out.dtype)
        return out


def _tokens_by_module(
    network: TextAttentions, architecture: Architecture, text: int, size: Size, references: Sequence[Size]
) -> dict[str, _Tokens]:
    """Where the tokens are in every attention in which the picture looks at the text, by its module in ``network``."""
    found = {}
    for site in architecture.sites():
        module = next((name for name in network.sites if f"{site.keys.layer}.".startswith(f"{name}.")), None)
        words, image = architecture.streams(site.keys.layer, text, size, references)
        if module and site.attention.kind == "joint":
            both = image.after(words)
            found[module] = _Tokens(both.length, both.image)
        elif module and site.attention.kind == "cross":
            found[module] = _Tokens(words.length, image.image)
    return found
