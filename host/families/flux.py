"""Flux.1 (Schnell, Kontext), Flux.2 (dev, Klein) and Chroma: blocks of two streams, then blocks of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ...methods.lora import layer_shape
from ..architecture import (
    Architecture,
    Attention,
    Between,
    EqualLengths,
    Kind,
    Layout,
    Part,
    Size,
    image_layout,
    tiled,
)

QKV = ("q", "k", "v")
_TWO: tuple[Kind, Kind] = ("image", "text")
_DOUBLE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("attn.to_q", "img_attn.qkv", ("q",)),
    ("attn.to_k", "img_attn.qkv", ("k",)),
    ("attn.to_v", "img_attn.qkv", ("v",)),
    ("attn.add_q_proj", "txt_attn.qkv", ("q",)),
    ("attn.add_k_proj", "txt_attn.qkv", ("k",)),
    ("attn.add_v_proj", "txt_attn.qkv", ("v",)),
    ("attn.to_out.0", "img_attn.proj", ()),
    ("attn.to_add_out", "txt_attn.proj", ()),
    ("norm1.linear", "img_mod.lin", ()),
    ("norm1_context.linear", "txt_mod.lin", ()),
    *(
        (f"{theirs}.{part}", f"{ours}.{number}", ())
        for theirs, ours in (("ff", "img_mlp"), ("ff_context", "txt_mlp"))
        for part, number in (("net.0.proj", 0), ("net.2", 2), ("linear_in", 0), ("linear_out", 2))
    ),
    ("attn.norm_q", "img_attn.norm.query_norm", ()),
    ("attn.norm_k", "img_attn.norm.key_norm", ()),
    ("attn.norm_added_q", "txt_attn.norm.query_norm", ()),
    ("attn.norm_added_k", "txt_attn.norm.key_norm", ()),
)
_XLABS = (
    ("double_blocks.{}.processor.qkv_lora1", "double_blocks.{}.img_attn.qkv", ()),
    ("double_blocks.{}.processor.qkv_lora2", "double_blocks.{}.txt_attn.qkv", ()),
    ("double_blocks.{}.processor.proj_lora1", "double_blocks.{}.img_attn.proj", ()),
    ("double_blocks.{}.processor.proj_lora2", "double_blocks.{}.txt_attn.proj", ()),
    ("single_blocks.{}.processor.qkv_lora", "single_blocks.{}.linear1", QKV),
    ("single_blocks.{}.processor.proj_lora", "single_blocks.{}.linear2", ()),
)
_SINGLE = (
    ("attn.to_q", "linear1", ("q",)),
    ("attn.to_k", "linear1", ("k",)),
    ("attn.to_v", "linear1", ("v",)),
    ("proj_mlp", "linear1", ("mlp",)),
    ("attn.to_qkv_mlp_proj", "linear1", ()),
    ("attn.to_out", "linear2", ()),
    ("proj_out", "linear2", ()),
    ("norm.linear", "modulation.lin", ()),
    ("attn.norm_q", "norm.query_norm", ()),
    ("attn.norm_k", "norm.key_norm", ()),
)
_REST = (
    ("x_embedder", "img_in", ()),
    ("context_embedder", "txt_in", ()),
    ("proj_out", "final_layer.linear", ()),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer", ()),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer", ()),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer", ()),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer", ()),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer", ()),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer", ()),
)
FLUX2_TEXT = 512
"""Rows that the host brings every shorter prompt of Flux.2 to, with zeros in front."""


class Flux(Architecture):
    """Text first, then the image, then references. Flux.2's own numbers come from its network."""

    title = "Flux"
    classes = ("Flux", "Chroma")
    kinds = (
        ("global", r"^(time_in|vector_in|guidance_in)\b|modulation|_mod\.lin$|adaLN|^distilled_guidance_layer\b"),
        ("image", r"^img_in$|\.img_(attn|mlp)\b|^final_layer\b"),
        ("text", r"^txt_(in|norm)$|\.txt_(attn|mlp)\b"),
        ("joint", r"^single_blocks\."),
    )
    names = (
        *((f"transformer_blocks.{{}}.{theirs}", f"double_blocks.{{}}.{ours}", s) for theirs, ours, s in _DOUBLE),
        *((f"single_transformer_blocks.{{}}.{theirs}", f"single_blocks.{{}}.{ours}", s) for theirs, ours, s in _SINGLE),
        *_XLABS,
        ("single_blocks.{}.linear1_qkv", "single_blocks.{}.linear1", QKV),
        *_REST,
    )
    attentions = (
        Attention(r"double_blocks\.\d+", "double", "joint", Part("img_attn.qkv", ("k",)), "img_attn.proj", _TWO),
        Attention(r"single_blocks\.\d+", "single", "joint", Part("linear1", ("k",)), "", ("joint",), "linear2"),
    )
    first_text_layers = r"^txt_in$"
    pooled_layer = "vector_in.in_layer"
    position_embedder = "pe_embedder"
    targets = {
        "text": r"\.txt_attn\.(qkv|proj)$",
        "attention": r"_attn\.(qkv|proj)$|^single_blocks\.\d+\.linear[12]$",
        "all": r"\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])$|^single_blocks\.\d+\.linear[12]$",
    }

    @property
    def patch(self) -> int:
        return int(self.network.patch_size)

    @property
    def is_flux2(self) -> bool:
        """Whether it is Flux.2: one modulation for all blocks, prompts of 512 rows."""
        return bool(getattr(self.network.params, "global_modulation", False))

    def spans(self, layer: str) -> Mapping[str, Size]:
        hidden = int(self.network.hidden_size)
        qkv = [(name, hidden) for name in QKV]
        if layer.endswith("_attn.qkv"):
            return tiled(qkv)
        if layer.endswith(".linear1"):  # Flux.2's MLP is gated: its rows are counted, not derived
            return tiled([*qkv, ("mlp", layer_shape(self.network.get_submodule(layer))[0] - 3 * hidden)])
        return {}

    def streams(self, layer: str, text: int, size: Size, references: Sequence[Size]) -> tuple[Layout, Layout]:
        length = max(text, FLUX2_TEXT) if self.is_flux2 else text
        return Layout(length, text=slice(length - text, length)), image_layout(*self.image_tokens(size, references))

    @property
    def takes_references(self) -> bool:  # type: ignore[override]
        return type(self.network).__name__ != "Chroma"

    @property
    def between(self) -> Between:  # type: ignore[override]
        return "nothing" if getattr(self.network, "txt_norm", None) is None else "norm"

    @property
    def equal_lengths(self) -> EqualLengths:  # type: ignore[override]
        facts = EqualLengths("mask", attentions=r"^(double|single)_blocks\.\d+$")
        return facts._replace(by="host", least=FLUX2_TEXT) if self.is_flux2 else facts

    def text_positions(self, text: int, size: Size) -> torch.Tensor:
        rows = max(text, FLUX2_TEXT) if self.is_flux2 else text
        params = self.network.params
        positions = torch.zeros(rows, len(params.axes_dim))
        for axis in getattr(params, "txt_ids_dims", [3] if len(params.axes_dim) == 4 else []):
            positions[:, axis] = torch.arange(rows)
        return positions
