"""The paths of a transformer: they meet in the image tokens of all its blocks.

There is no decoder, and nothing follows the last block. Where the blocks themselves meet, no path sees what the others
made of its region, so a picture is little more than predictions blended. Where attentions meet, the base's own layers
are in between. Text tokens are never merged: each path has its own words.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle

from ....methods.conduct.refine import pooled_attention
from ....methods.conduct.settings import WHO, Meeting
from ....methods.lora_tokens import unknown_grid
from ... import keys
from ...architecture import Layout, Site, Size
from ...engine.attention import Captured, Watch, capture_layers, heads_apart
from ...engine.attention_patches import OutputSite
from ...engine.model_call import ModelCall
from ...lora.branches import WholeRows
from ...registry import architecture_of
from ...text.sequence import check_layout, references_of
from ...types import BaseModel, HookInputs, ModelOptions

Change = Callable[[torch.Tensor, OutputSite], torch.Tensor]


class TransformerPaths:
    """A transformer as ``interface.PathNetwork`` describes it. ``enter`` says where the tokens of the next call are.

    Raises:
        ValueError: another pack's layers are in the place of the host's.
    """

    def __init__(self, model: BaseModel) -> None:
        self.architecture = architecture_of(model)
        self.network: torch.nn.Module = self.architecture.network
        self.patch = self.architecture.patch
        self.sites = [site for site in self.architecture.sites() if site.attention.kind != "text"]
        if len({site.block for site in self.sites}) < self._blocks():
            raise self.architecture.lacks(
                f"{WHO} with attentions that are not the host's own", "load the model with the host's loader"
            )
        self.text, self.size, self.references = 0, (0, 0), list[Size]()

    def _blocks(self) -> int:
        """How many blocks should have such attentions."""
        names = [name for name, _ in self.network.named_modules()]
        patterns = {a.blocks for a in self.architecture.attentions if a.kind != "text"}
        return max(1, sum(re.fullmatch(pattern, name) is not None for pattern in patterns for name in names))

    @property
    def guidance_site(self) -> Site:
        """The attention between image tokens in the middle of the network."""
        sites = [s for s in self.sites if s.attention.kind != "cross" and s.attention.stage != "refiner"]
        return min(sites, key=lambda site: abs(site.start - 0.5))

    def whole_rows(self, count: int) -> WholeRows:
        return WholeRows(self.architecture.kind, count)

    def enter(self, call: ModelCall) -> None:
        check_layout(self.architecture, call, WHO)
        self.text = 0 if call.c_crossattn is None else call.c_crossattn.shape[1]
        self.size = (int(call.x.shape[-2]), int(call.x.shape[-1]))
        self.references = references_of(self.architecture, call)

    def routed(self, options: ModelOptions, merge: object, meeting: Meeting) -> ModelOptions:
        return options

    @contextlib.contextmanager
    def merging(self, change: Change, meeting: Meeting) -> Iterator[set[str]]:
        silent: set[str] = set()
        with contextlib.ExitStack() as stack:
            for layer, site in self._merge_points(meeting).items():
                silent.add(layer)
                stack.callback(self._hung_up(layer, site, change, silent).remove)
            yield silent

    def _merge_points(self, meeting: Meeting) -> dict[str, Site]:
        """The modules at which paths meet, in the order they run."""
        blocks = list(dict.fromkeys(site.block for site in self.sites))
        chosen = {blocks[number] for number in meeting.among(len(blocks))}
        sites = [site for site in self.sites if site.block in chosen]
        return {site.block if meeting.whole_blocks else _meeting_layer(site): site for site in sites}

    def _hung_up(self, layer: str, site: Site, change: Change, silent: set[str]) -> RemovableHandle:
        module, whole = self.network.get_submodule(layer), layer == site.block

        def merge(tokens: torch.Tensor) -> None:
            silent.discard(layer)
            self._merge(tokens, site, "block" if whole else site.attention.kind, change)

        def after_block(module: object, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
            parts = list(output) if isinstance(output, tuple) else [output]
            at = next(n for n, kind in enumerate(site.attention.output) if kind != "text")
            parts[at] = parts[at].clone(memory_format=torch.contiguous_format)  # a block may return its own input
            merge(parts[at])
            return tuple(parts) if isinstance(output, tuple) else parts[0]

        if whole:
            return module.register_forward_hook(after_block)
        if site.after is None:
            width = self.architecture.span(site.keys)
            assert width is not None  # such a layer's keys are a span of a fused matrix
            return module.register_forward_pre_hook(lambda _, inputs: merge(inputs[0][..., : width[1]]))
        return module.register_forward_hook(lambda _, inputs, output: merge(output))

    def _merge(self, tokens: torch.Tensor, site: Site, kind: str, change: Change) -> None:
        """Merges the image tokens of (rows, tokens, …, channels), in place. References keep what they are.

        Each token that fills the image up stands for a strip of it, so every path has its share of them.
        """
        flat, layout = tokens.flatten(1, -2), self._layout(_meeting_layer(site), tokens)
        change(flat[:, layout.image], OutputSite((site.block, 0), 0, kind, self.architecture.grid(*self.size)))
        filling = slice(max(layout.image.stop, layout.references.stop), layout.length)
        if filling.stop > filling.start:
            strips = (1, filling.stop - filling.start)
            change(flat[:, filling], OutputSite((site.block, 0), 1, kind, strips))

    def _layout(self, layer: str, tokens: torch.Tensor) -> Layout:
        """Where the tokens (rows, tokens, …, channels) of a layer are.

        Raises:
            ValueError: there are more or fewer than the network makes.
        """
        layout, count = self.architecture.layout(layer, self.text, self.size, self.references), tokens.shape[1:-1]
        if math.prod(count) != layout.length:
            raise unknown_grid(math.prod(count), [layout.length])
        return layout

    def capture(self, stop: bool) -> AbstractContextManager[Captured]:
        site = self.guidance_site
        layer = self.network.get_submodule(site.keys.layer)
        return capture_layers([Watch(site, layer, part=partial(self._image_keys, site))], stop=stop)

    def _image_keys(self, site: Site, output: torch.Tensor) -> torch.Tensor:
        """The keys of image tokens before norm and position, (rows, tokens, channels), of a layer's output."""
        span, layout = self.architecture.span(site.keys), self._layout(site.keys.layer, output)
        keys = output if span is None else output.narrow(-1, *span)
        return keys.flatten(1, -2)[:, layout.image]

    @contextlib.contextmanager
    def recording(self, call: ModelCall) -> Iterator[tuple[ModelCall, ImageAttention]]:
        site = self.guidance_site
        words, image = self.architecture.streams(site.keys.layer, self.text, self.size, self.references)
        layout = image.after(words) if site.attention.kind == "joint" else image
        seen = ImageAttention(layout, self.architecture.grid(*self.size))
        given = call.transformer_options
        around = partial(seen.attend, given.get(keys.ATTENTION_OVERRIDE))
        options = {**given, keys.ATTENTION_OVERRIDE: around}
        block = self.network.get_submodule(site.block)
        with contextlib.ExitStack() as stack:
            stack.callback(block.register_forward_pre_hook(seen.enter).remove)
            stack.callback(block.register_forward_hook(seen.leave).remove)
            yield call._replace(transformer_options=options), seen


class ImageAttention:
    """What image tokens look at among image tokens, in the first attention of a block during one call.

    Args:
        layout: of that attention's sequence.
        size: rows and columns of image tokens.
    """

    def __init__(self, layout: Layout, size: Size) -> None:
        self.layout, self.size = layout, size
        self.running = False
        self.recorded: tuple[torch.Tensor, torch.Tensor] | None = None
        self.grid: Size = size

    def enter(self, module: torch.nn.Module, inputs: HookInputs) -> None:
        self.running = True

    def leave(self, *_: object) -> None:
        self.running = False

    def attend(
        self,
        other: Callable[..., torch.Tensor] | None,
        attention: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        *more: object,
        **options: object,
    ) -> torch.Tensor:
        """The host's attention, or another pack's around it, unchanged."""
        if self.running:
            self.running = False
            self.recorded = (self._image(q, heads), self._image(k, heads))
        attend = attention if other is None else partial(other, attention)
        return attend(q, k, v, heads, *more, **options)

    def _image(self, t: torch.Tensor, heads: int) -> torch.Tensor:
        """(rows, heads, image tokens, channels) of queries or keys, which have their heads apart or together."""
        apart = heads_apart(t, heads)
        if apart.shape[-2] != self.layout.length:
            raise unknown_grid(apart.shape[-2], [self.layout.length])
        return apart[:, :, self.layout.image]

    def attention(self, rows: slice) -> torch.Tensor | None:
        """Of these rows, mean over heads, (rows, tokens, tokens) at ``grid``. None where another node answered."""
        if self.recorded is None:
            return None
        queries, keys = (t[rows] for t in self.recorded)
        maps, self.grid = pooled_attention(queries, keys, self.size)
        return maps


def _meeting_layer(site: Site) -> str:
    """The layer that an attention's output goes through, alone or together with the MLP."""
    return site.after or f"{site.block}.{site.attention.shared}"
