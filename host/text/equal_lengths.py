"""Prompts of unequal length in one model call, on networks whose prompts are as long as their text.

The host batches conditionings of one shape only. Here shorter prompts are filled up, and no attention of the network
sees what was filled in, so every row is what it would be in a call of its own. Where a network cannot do that, its
prompts stay as they are, and the host makes several calls.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple
from uuid import UUID

import comfy.conds
import comfy.model_base
import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from .. import keys
from ..architecture import Architecture, EqualLengths
from ..engine.model_call import ModelCall, RunCall, active_entries, around_model_call, conditioning_rows
from ..engine.reach import check_answered, is_compiled
from ..registry import known_architecture
from ..types import BaseModel, CondEntry, Conds, HookInputs, ModelOptions

_WHO = "A prompt that shares its model call with longer ones"
Attention = Callable[..., torch.Tensor]
"""The host's attention, or a function around it that takes it first."""

_TEXT, _MASK = "c_crossattn", "attention_mask"
"""The host's names for a processed prompt, and for which of its tokens count."""
_STAY = ("area", "control", "hooks", "gligen")
"""What an entry has where more than the network reads its prompt, or where it gets a call of its own anyway."""


class _Place(NamedTuple):
    """Where a prompt is among its ``total`` tokens, and which of them the network sees: between the two is its own
    filling."""

    text: slice
    seen: slice
    total: int


def with_equal_lengths(
    model: BaseModel, conds: Sequence[Conds | None], x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions
) -> tuple[list[Conds | None], ModelOptions]:
    """Conditionings of one length, and the options under which their predictions are what they were.

    Where nothing is to be made equal, or the network cannot do it, both are returned unchanged.

    Args:
        x: the latent, (batch, channels, …, height, width).
    """
    architecture = known_architecture(model)
    if architecture is None or architecture.equal_lengths.by == "host":
        return list(conds), options
    padding = architecture.equal_lengths
    active = [entry for cond in conds for entry in active_entries(cond or [], sigma)]
    lengths = {entry["uuid"]: _length(entry) for entry in active if _may_grow(entry, padding)}
    if len(set(lengths.values())) < 2 or is_compiled(model) or has_own_call(model):
        return list(conds), options
    network = TextAttentions(model.diffusion_model, padding)
    if not network.sites:
        return list(conds), options
    places = _places(lengths, padding, architecture.image_tokens((x.shape[-2], x.shape[-1]))[0])
    grown = [
        cond and [_grown(e, places[e["uuid"]], padding) if e["uuid"] in places else e for e in cond] for cond in conds
    ]

    def masked(call: ModelCall, run: RunCall) -> torch.Tensor:
        entries = conditioning_rows(call.transformer_options, len(call.x))
        found = [(entry.rows, places[entry.uuid]) for entry in entries if entry.uuid in places]
        return _Masking(network, found, len(call.x), call.x.device).run(call, run) if found else run(call)

    return grown, around_model_call(options, keys.EQUAL_LENGTHS, masked)


def has_own_call(model: BaseModel) -> bool:
    """Whether its class does something of its own with the prompt first: 0.33.0's LongCat-Image asks for its length."""
    return type(model)._apply_model is not comfy.model_base.BaseModel._apply_model


class TextAttentions:
    """The modules of a network whose attention reads the text; none if another pack has its own in their place, whose
    attention may not pass through the host's."""

    def __init__(self, network: torch.nn.Module, padding: EqualLengths) -> None:
        self.network, self.padding = network, padding
        modules = network.named_modules()
        found = {name: module for name, module in modules if re.search(padding.attentions, name)}
        ours = bool(padding.attentions) and all(
            type(module).__module__.startswith("comfy.") for module in found.values()
        )
        self.sites = found if ours else {}


def check_text_attentions(model: BaseModel, architecture: Architecture, who: str) -> None:
    """Refuses a model whose text is not read by attentions of the host.

    Raises:
        ValueError: what ``who`` cannot do, and what to do.
    """
    if has_own_call(model) or not TextAttentions(architecture.network, architecture.equal_lengths).sites:
        raise architecture.lacks(
            f"{who} with attentions or prompts that are not the host's own", "load the model with the host's loader"
        )


def _may_grow(entry: CondEntry, padding: EqualLengths) -> bool:
    """Whether nothing but the network reads the entry's prompt, and all of its tokens count."""
    given = entry["model_conds"]
    text, mask = given.get(_TEXT), given.get(_MASK)
    if type(text) is not comfy.conds.CONDRegular or any(entry.get(key) is not None for key in _STAY):
        return False
    if any(key in given for key in padding.not_with):
        return False
    return mask is None or bool((mask.cond == 1).all())


def _length(entry: CondEntry) -> int:
    return int(entry["model_conds"][_TEXT].cond.shape[1])


def _places(lengths: Mapping[UUID, int], padding: EqualLengths, image_tokens: int) -> dict[UUID, _Place]:
    """Where each prompt is: all become as long as the longest, unless the network fills the image up as well.

    It does that at a place of its own, and then only prompts that it makes equally long anyway can share a call.
    """
    multiple = padding.multiple
    filled = {uuid: -(-length // multiple) * multiple for uuid, length in lengths.items()}
    totals = filled if image_tokens % multiple else dict.fromkeys(filled, max(filled.values()))
    return {uuid: _place(lengths[uuid], filled[uuid], totals[uuid], padding.shifts) for uuid in lengths}


def _place(length: int, filled: int, total: int, in_front: bool) -> _Place:
    start = total - filled if in_front else 0
    return _Place(slice(start, start + length), slice(start, start + filled), total)


def _grown(entry: CondEntry, place: _Place, padding: EqualLengths) -> CondEntry:
    """The entry with its prompt filled up with zeros, and how far that has moved its words.

    The mask goes: all of its tokens count.
    """
    given = {key: value for key, value in entry["model_conds"].items() if key != _MASK}
    around = (0, 0, place.text.start, place.total - place.text.stop)
    given[_TEXT] = comfy.conds.CONDRegular(F.pad(given[_TEXT].cond, around))
    if padding.counts in given:
        given[padding.counts] = comfy.conds.CONDConstant(place.total)
    return {**entry, "model_conds": given, keys.WORDS_MOVED: place.text.start}


class TextAttentionCall:
    """One model call in which the attentions that see the text are changed. A subclass says how.

    A module with such an attention says when it runs, and the function around the host's attention asks whether one
    does. So no other attention is taken for it, whatever its tokens.

    Args:
        who: what would be missing if one did not answer, the subject of the refusal.

    ``answered`` holds the modules whose attention was changed.
    """

    def __init__(self, network: TextAttentions, who: str) -> None:
        self.network, self.who = network, who
        self.site: str | None = None
        self.heads = 0  # of the attention that runs
        self.entered: set[str] = set()
        self.answered: set[str] = set()

    def attention(
        self, attend: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The output of one of these attentions.

        Args:
            attend: the host's attention or another pack's, called as ``attend(q, k, v, mask)``.
        """
        raise NotImplementedError

    def run(self, call: ModelCall, run: RunCall) -> torch.Tensor:
        """The call's output. All hooks are gone afterwards.

        Raises:
            ValueError: an attention did not pass through the function around it.
        """
        given = call.transformer_options
        around = partial(self._attend, given.get(keys.ATTENTION_OVERRIDE))
        options = {**given, keys.ATTENTION_OVERRIDE: around}
        with contextlib.ExitStack() as stack:
            for handle in self.hooks():
                stack.callback(handle.remove)
            out = run(call._replace(transformer_options=options))
        check_answered(self.entered - self.answered, self.who)
        return out

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hangs up what the call needs."""
        padding, network = self.network.padding, self.network.network
        for name, module in self.network.sites.items():
            yield from self.site_hooks(name, module)
            if padding.until and padding.until in dict(module.named_modules()):
                yield module.get_submodule(padding.until).register_forward_pre_hook(self._leave)
        if padding.by == "token":
            yield network.get_submodule(padding.after).register_forward_hook(self._fill)

    def site_hooks(self, name: str, module: torch.nn.Module) -> Iterator[RemovableHandle]:
        """Hangs up what says that a module with such an attention runs."""
        yield module.register_forward_pre_hook(partial(self._enter, name))
        yield module.register_forward_hook(self._leave)

    def filled_in(self) -> Iterator[tuple[slice, slice]]:
        """Rows, and which of their tokens get the one that the network fills prompts up with."""
        raise NotImplementedError

    def _enter(self, site: str, *_: object) -> None:
        self.site = site
        self.entered.add(site)

    def _leave(self, *_: object) -> None:
        self.site = None

    def _fill(self, module: torch.nn.Module, inputs: HookInputs, output: torch.Tensor) -> torch.Tensor:
        """Behind each prompt, the token that the network would have put there. ``output`` is (rows, tokens, …)."""
        token = getattr(self.network.network, self.network.padding.token).to(output)
        out = output.clone()
        for rows, tokens in self.filled_in():
            out[rows, tokens] = token
        return out

    def _attend(
        self,
        other: Attention | None,
        attention: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        *more: object,
        **options: object,
    ) -> torch.Tensor:
        """The host's attention, or another pack's around it, changed where a module with text runs."""
        attend = attention if other is None else partial(other, attention)
        if self.site is None:
            return attend(q, k, v, heads, mask, *more, **options)
        self.answered.add(self.site)
        self.heads = heads

        def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return attend(q, k, v, heads, mask, *more, **options)

        return self.attention(whole, q, k, v, mask)


class _Masking(TextAttentionCall):
    """One model call in which no attention sees what was filled in."""

    def __init__(
        self, network: TextAttentions, places: Sequence[tuple[slice, _Place]], rows: int, device: torch.device
    ) -> None:
        super().__init__(network, _WHO)
        self.places = places
        self.seen = torch.ones(rows, places[0][1].total, dtype=torch.bool)  # (rows, text tokens)
        for own, place in places:
            self.seen[own, : place.seen.start] = False
            self.seen[own, place.seen.stop :] = False
        self.seen = self.seen.to(device)

    def filled_in(self) -> Iterator[tuple[slice, slice]]:
        for rows, place in self.places:
            yield rows, slice(place.text.stop, place.seen.stop)

    def attention(
        self, attend: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return attend(q, k, v, self._masked(mask, k))

    def _masked(self, mask: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor:
        """What is added to the logits, (rows, 1 or more, 1 or more, keys). The text comes first among the keys.

        Finite, since some attentions work through parts of the keys, and a part may have none that are seen.
        """
        unseen = F.pad(~self.seen, (0, k.shape[-2] - self.seen.shape[1]), value=False)[:, None, None]
        far = torch.finfo(k.dtype).min / 2
        own = torch.zeros(unseen.shape, dtype=k.dtype, device=k.device).masked_fill(unseen, far)
        if mask is None:
            return own
        theirs = mask[(None,) * (3 - mask.ndim)] if mask.ndim < 3 else mask
        theirs = theirs if theirs.ndim == 4 else theirs[:, None]  # as the host reads it: (rows, queries, keys)
        if theirs.dtype == torch.bool:
            return own.masked_fill(~theirs, far)
        return own + theirs.clamp(min=far)
