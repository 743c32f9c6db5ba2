"""The UNet of SD 1.x, SD 2.x and SDXL: image tokens of several grids, and cross-attention to the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample

from ..architecture import (
    Architecture,
    Attention,
    AttentionKind,
    EqualLengths,
    Layout,
    Part,
    Size,
    image_layout,
    text_layout,
)

Block: TypeAlias = tuple[str, int]
"""The host's name and number of a block: ``("output", 3)``."""

_BLOCK = r"transformer_blocks\.\d+"
_KINDS: tuple[tuple[AttentionKind, str], ...] = (("self", "attn1"), ("cross", "attn2"))


class UNet(Architecture):
    """Image and text never share a sequence. A token is a cell, or a square of cells deeper in the network."""

    title = "SD 1.x, SD 2.x and SDXL"
    classes = ("UNetModel",)
    overwrites_saved = False
    kinds = (
        ("global", r"\bemb_layers\b|^time_embed\b|^label_emb\b"),
        ("text", r"\.attn2\.to_[kv]$"),
        ("image", r"^(input_blocks|middle_block|output_blocks|out)\b"),
    )
    attentions = tuple(
        Attention(
            rf"{stage}.*\.transformer_blocks\.\d+", part, kind, Part(f"{name}.to_k"), f"{name}.to_out.0", ("image",)
        )
        for stage, part in (("input_blocks", "input"), ("middle_block", "middle"), ("output_blocks", "output"))
        for kind, name in _KINDS
    )
    first_text_layers = r"\.attn2\.to_[kv]$"
    pooled_layer = "label_emb.0.0"
    equal_lengths = EqualLengths("host")
    targets = {
        "cross k/v": r"attn2\.to_[kv]$",
        "cross": r"attn2\.to_(q|k|v|out\.0)$",
        "outside cross": rf"{_BLOCK}\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))$",
        "all": rf"{_BLOCK}\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))$",
    }

    @property
    def patch(self) -> int:
        return 1

    def grid(self, height: int, width: int, layer: str = "") -> Size:
        for _ in range(self._halvings(layer)):
            height, width = -(-height // 2), -(-width // 2)
        return height, width

    def _halvings(self, layer: str) -> int:
        """How often the picture was halved on the way to a layer's output."""
        stage, *path = layer.split(".")
        if stage not in ("input_blocks", "middle_block", "output_blocks"):
            return 0
        down = sum(stage != "input_blocks" or block <= int(path[0]) for block, _ in self._parts("input_blocks", "Down"))
        if stage != "output_blocks":
            return down
        here = (int(path[0]), int(path[1]))  # what doubles a picture is the last part of its block
        return down - sum(part <= here for part in self._parts("output_blocks", "Up"))

    def _parts(self, stage: str, way: str) -> list[tuple[int, int]]:
        """What changes the grid in a stage: numbers of block and part."""
        return [
            (number, part)
            for number, block in enumerate(getattr(self.network, stage))
            for part, module in enumerate(block)
            if type(module).__name__ == f"{way}sample"
        ]

    def streams(self, layer: str, text: int, size: Size, references: Sequence[Size]) -> tuple[Layout, Layout]:
        rows, columns = self.grid(*size, layer)
        return text_layout(text), image_layout(rows * columns)


def transformers_of(unet: UNetModel) -> Iterator[tuple[Block, SpatialTransformer, int]]:
    """Every transformer in the order they run: its block, itself, and the side of one of its tokens in cells."""
    factor = 1
    for block, modules in _blocks(unet):
        for module in modules:
            if isinstance(module, SpatialTransformer):
                yield block, module, factor
            elif isinstance(module, Downsample):
                factor *= 2
            elif isinstance(module, Upsample):
                factor //= 2


def transformer_at(unet: UNetModel, block: Block) -> SpatialTransformer:
    """The transformer of a block of the UNet."""
    name, number = block
    modules = unet.middle_block if name == "middle" else getattr(unet, f"{name}_blocks")[number]
    return next(module for module in modules if isinstance(module, SpatialTransformer))


def _blocks(unet: UNetModel) -> Iterator[tuple[Block, torch.nn.Sequential]]:
    yield from ((("input", number), block) for number, block in enumerate(unet.input_blocks))
    if unet.middle_block is not None:
        yield ("middle", 0), unet.middle_block
    yield from ((("output", number), block) for number, block in enumerate(unet.output_blocks))
