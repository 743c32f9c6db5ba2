"""The attentions of a UNet: where they are and what they attend to.

Forward hooks on the projections read queries and keys, after anything that changes them (low-rank branches, other
packs' contexts). The model computes its own attention as always, and the host's single slots stay free.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ..families.unet import transformer_at, transformers_of
from ..types import HookInputs

SELF, CROSS = "self", "cross"
MODULES = {SELF: "attn1", CROSS: "attn2"}
"""The host's names of both attentions of a transformer block."""
_MAX_SITES = 8  # models with deep blocks (SDXL) give one map per block
_LOSS_GRID = 16  # tokens of the shorter side of the maps, as in the paper for SD 1.5


class AttentionModule(Protocol):
    """An attention of the host: its projections and its number of heads."""

    heads: int
    attn_precision: torch.dtype | None
    to_q: torch.nn.Module
    to_k: torch.nn.Module
    to_v: torch.nn.Module


class Site(NamedTuple):
    """One attention of a UNet.

    ``block`` is the host's name and number (``("output", 3)``), ``depth`` the transformer block inside it, ``kind`` is
    ``self`` or ``cross``. ``factor`` is the side of one token in latent cells. ``layer`` counts the transformer blocks
    in the order they run (the layer of a layer-wise prompt).
    """

    block: tuple[str, int]
    depth: int
    kind: str
    factor: int
    layer: int

    def module(self, unet: UNetModel) -> AttentionModule:
        """The attention module itself."""
        block = transformer_at(unet, self.block).transformer_blocks[self.depth]
        return getattr(block, MODULES[self.kind])


def sites_of(unet: UNetModel) -> list[Site]:
    """Every attention in the order it runs: first the self-, then the cross-attention of a transformer block."""
    sites: list[Site] = []
    layer = 0
    for block, transformer, factor in transformers_of(unet):
        for depth in range(len(transformer.transformer_blocks)):
            sites += [Site(block, depth, kind, factor, layer) for kind in (SELF, CROSS)]
            layer += 1
    return sites


def find_sites(
    unet: UNetModel, kind: str | None = None, block: str | None = None, factor: int | None = None
) -> list[Site]:
    """The sites of that kind, in that part of the UNet (``input``, ``middle``, ``output``), at that factor."""
    return [
        site
        for site in sites_of(unet)
        if kind in (None, site.kind) and block in (None, site.block[0]) and factor in (None, site.factor)
    ]


def heads_apart(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries or keys as (rows, heads, tokens, channels); some come as (rows, tokens, heads · channels)."""
    return tokens if tokens.ndim == 4 else tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_to_phrase(q: torch.Tensor, k: torch.Tensor, heads: int, phrase: Sequence[int]) -> torch.Tensor:
    """How much queries attend to a phrase among a prompt's keys, (queries,), the mean over rows and heads."""
    queries, words = (heads_apart(t, heads).float() for t in (q, k))
    attention = (queries @ words.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(-1)
    return attention[..., list(phrase)].sum(-1).mean((0, 1))


def attention_to_columns(
    attend: Callable[..., torch.Tensor],
    v: torch.Tensor,
    heads: int,
    columns: Sequence[tuple[slice, Sequence[int]]],
    others: bool = False,
) -> torch.Tensor:
    """How much every query attends to some keys, (rows, heads, queries, columns), in float32 or better.

    It comes from a call of the attention itself, whose values are one at such a key and zero elsewhere. So it knows any
    kernel, any mask and any other pack's function, and nothing of the size queries × keys is built.

    Args:
        attend: the attention, called as ``attend(v=…)`` with values in the form of ``v``; for as many columns as a head
            has channels at a time.
        columns: rows, and the keys that count in them; shorter lists are filled up with zeros.
        others: whether a function around the attention may add something of its own; it is asked for it and left out.
    """
    own_part = attend(v=torch.zeros_like(v)) if others else 0
    width, most, parts = heads_apart(v[:1], heads).shape[-1], max(len(own) for _, own in columns), []
    for first in range(0, most, width):
        marks = torch.zeros_like(v)
        by_head = heads_apart(marks, heads)  # a view
        for rows, own in columns:
            for channel, column in enumerate(own[first : first + width]):
                by_head[rows, :, column, channel] = 1
        parts.append(heads_apart(attend(v=marks) - own_part, heads)[..., : most - first])
    whole = torch.cat(parts, -1)
    return whole.to(torch.promote_types(whole.dtype, torch.float32))


class Captured:
    """Queries and keys of the captured sites, one entry per model call, in the order of the calls.

    A site is a ``Site`` of a UNet, or one of a transformer.
    """

    def __init__(self) -> None:
        self.queries: dict[Hashable, list[torch.Tensor]] = {}
        self.keys: dict[Hashable, list[torch.Tensor]] = {}
        self.grids: dict[Hashable, tuple[int, int]] = {}
        self.heads: dict[Hashable, int] = {}

    def key(self, site: Hashable) -> torch.Tensor:
        """The projected keys of all heads, (rows, keys, heads · channels)."""
        return _joined_calls(self.keys[site])

    def probabilities(self, site: Hashable, rows: slice | Sequence[int] = slice(None)) -> torch.Tensor:
        """The attention of the site's queries to its keys, (rows, heads, queries, keys), in float32 or better.

        An attention mask is not part of it.
        """
        q, k = (_joined_calls(stored[site])[rows] for stored in (self.queries, self.keys))
        q, k = (heads_apart(t, self.heads[site]) for t in (q, k))  # (rows, heads, tokens, d)
        precise = torch.promote_types(q.dtype, torch.float32)
        logits = q.to(precise) @ k.to(precise).transpose(-1, -2) * q.shape[-1] ** -0.5
        return logits.softmax(-1)

    def first(self) -> Captured:
        """The first row of the first call, off the graph. It holds views, so it costs nothing."""
        out = Captured()
        out.grids, out.heads = self.grids, self.heads
        for theirs, ours in ((self.queries, out.queries), (self.keys, out.keys)):
            ours.update({site: [calls[0][:1].detach()] for site, calls in theirs.items()})
        return out

    def grid(self, site: Hashable) -> tuple[int, int]:
        """Height and width of the site's grid of image tokens."""
        return self.grids[site]


def _joined_calls(calls: list[torch.Tensor]) -> torch.Tensor:
    return calls[0] if len(calls) == 1 else torch.cat(calls)


class _Exit(BaseException):
    """Ends a model call early. Not an ``Exception``, because no other code may catch it.

    A new one each time: its traceback holds the frames of the whole sampling, and goes with it.
    """


class Watch(NamedTuple):
    """A layer whose output is captured: of which site, whether as its keys or its queries, and which part of it."""

    site: Hashable
    layer: torch.nn.Module
    keys: bool = True
    part: Callable[[torch.Tensor], torch.Tensor] | None = None


@contextlib.contextmanager
def capture_layers(watches: Collection[Watch], *, stop: bool = False) -> Iterator[Captured]:
    """Records what these layers make during the model calls in the body.

    It stays on the graph inside a differentiable region. All hooks are removed at the end.

    Args:
        stop: leaves the body as soon as the last of the keys is there. The code after the model call does not run.
    """
    seen = Captured()
    missing = {watch.site for watch in watches if watch.keys}

    def hook_of(watch: Watch) -> Callable[..., None]:
        table = seen.keys if watch.keys else seen.queries

        def hook(module: torch.nn.Module, inputs: HookInputs, output: torch.Tensor) -> None:
            table.setdefault(watch.site, []).append(output if watch.part is None else watch.part(output))
            if watch.keys:
                missing.discard(watch.site)
                if stop and not missing:
                    raise _Exit(seen)

        return hook

    with contextlib.ExitStack() as stack:
        for watch in watches:
            stack.callback(watch.layer.register_forward_hook(hook_of(watch)).remove)
        try:
            yield seen
        except _Exit as reason:
            if reason.args[0] is not seen:
                raise


@contextlib.contextmanager
def capture(unet: UNetModel, sites: Collection[Site], *, stop: bool = False) -> Iterator[Captured]:
    """Records queries and keys at these sites of a UNet; the rest is as ``capture_layers``."""
    modules = [(site, site.module(unet)) for site in sites]
    watches = [Watch(site, module.to_q, keys=False) for site, module in modules]
    watches += [Watch(site, module.to_k) for site, module in modules]
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(capture_layers(watches, stop=stop))
        for site, module in modules:
            seen.heads[site] = module.heads
            hook = transformer_at(unet, site.block).register_forward_pre_hook(_grid_hook(seen, site))
            stack.callback(hook.remove)
        yield seen


def _grid_hook(seen: Captured, site: Site) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: HookInputs) -> None:
        seen.grids[site] = (int(inputs[0].shape[-2]), int(inputs[0].shape[-1]))

    return hook


def loss_sites(unet: UNetModel, kind: str, height: int = 64, width: int = 64) -> list[Site]:
    """The attentions that losses read: the level whose grid is nearest to 16 tokens per side, in encoder and decoder.

    For SD 1.5 at 512 px these are the five layers of the reference (latent / 4).
    """
    factors = {s.factor for s in find_sites(unet, kind, "output")}
    factor = _nearest_factor(factors, min(height, width))
    sites = [s for s in find_sites(unet, kind, factor=factor) if s.block[0] != "middle"]
    if len(sites) <= _MAX_SITES:
        return sites
    depths = {s.block: max(t.depth for t in sites if t.block == s.block) for s in sites}
    return [s for s in sites if s.depth == depths[s.block] // 2]


def _nearest_factor(factors: Iterable[int], shorter: int) -> int:
    return min(factors, key=lambda f: abs(math.log2(shorter / f / _LOSS_GRID)))
