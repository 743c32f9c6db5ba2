"""The paths of a UNet: they meet in its decoder, and keys and maps come from self-attentions there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ....methods.conduct.refine import MAP_SIDE
from ....methods.conduct.settings import Meeting
from ...engine.attention import SELF, Captured, Site, capture, find_sites
from ...engine.attention_patches import OutputSite, after_attention, after_transformers
from ...engine.model_call import ModelCall
from ...registry import unet_of
from ...types import BaseModel, ModelOptions, TransformerOptions


class _Recorded(NamedTuple):
    """The attention of one call at a site."""

    captured: Captured
    site: Site

    @property
    def grid(self) -> tuple[int, int]:
        return self.captured.grid(self.site)

    def attention(self, rows: slice) -> torch.Tensor | None:
        """Of these rows, mean over heads, (rows, tokens, tokens). None where another node answered."""
        return None if self.site not in self.captured.keys else self.captured.probabilities(self.site, rows).mean(1)


class UNetPaths:
    """A UNet as ``interface.PathNetwork`` describes it."""

    patch = 1

    def __init__(self, model: BaseModel) -> None:
        self.network = unet_of(model)

    @property
    def guidance_site(self) -> Site:
        return guidance_site(self.network)

    def whole_rows(self, count: int) -> None:
        return None

    def enter(self, call: ModelCall) -> None:
        """Nothing of a call matters here."""

    def _blocks(self, meeting: Meeting) -> set[tuple[str, int]]:
        """The blocks of the decoder in which paths meet."""
        blocks = list(dict.fromkeys(site.block for site in find_sites(self.network, block="output")))
        return {blocks[number] for number in meeting.among(len(blocks))}

    def routed(
        self,
        options: ModelOptions,
        merge: Callable[[torch.Tensor, OutputSite, TransformerOptions], torch.Tensor],
        meeting: Meeting,
    ) -> ModelOptions:
        if meeting.whole_blocks:
            return options
        chosen = self._blocks(meeting)

        def in_decoder(output: torch.Tensor, place: OutputSite, extra: TransformerOptions) -> torch.Tensor:
            return merge(output, place, extra) if place.block in chosen else output

        return after_attention(options, in_decoder)

    @contextlib.contextmanager
    def merging(
        self, change: Callable[[torch.Tensor, OutputSite], torch.Tensor], meeting: Meeting
    ) -> Iterator[set[str]]:
        chosen = self._blocks(meeting)

        def in_decoder(output: torch.Tensor, place: OutputSite) -> None:
            if place.block in chosen:
                change(output, place)

        with after_transformers(self.network, in_decoder) if meeting.whole_blocks else contextlib.nullcontext():
            yield set()

    def capture(self, stop: bool) -> AbstractContextManager[Captured]:
        return capture(self.network, [self.guidance_site], stop=stop)

    @contextlib.contextmanager
    def recording(self, call: ModelCall) -> Iterator[tuple[ModelCall, _Recorded]]:
        site = mask_site(self.network, *call.x.shape[-2:])
        with capture(self.network, [site]) as captured:
            yield call, _Recorded(captured, site)


def guidance_site(unet: UNetModel) -> Site:
    """The self-attention whose keys are aligned: the first of the decoder; in deep blocks the middle of its second."""
    sites = find_sites(unet, SELF, "output")
    coarsest = max(s.factor for s in sites)
    return _middle_of_second_block(sites, coarsest) or next(s for s in sites if s.factor == coarsest)


def mask_site(unet: UNetModel, height: int, width: int) -> Site:
    """The self-attention whose rows make masks: the last of the decoder's level nearest to 32 × 32 tokens."""
    sites = find_sites(unet, SELF, "output")
    factors = sorted({s.factor for s in sites})
    factor = min(factors, key=lambda f: abs(min(height, width) / f - MAP_SIDE))
    return _middle_of_second_block(sites, factor) or [s for s in sites if s.factor == factor][-1]


def _middle_of_second_block(sites: Iterable[Site], factor: int) -> Site | None:
    """In models with deep blocks (SDXL); None in others."""
    at_factor = [s for s in sites if s.factor == factor]
    blocks = sorted({s.block for s in at_factor})
    found = [s for s in at_factor if len(blocks) > 1 and s.block == blocks[1] and s.depth == 4]
    return found[0] if found else None
