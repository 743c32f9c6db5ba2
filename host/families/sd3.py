"""SD3 and SD3.5: blocks of two streams, each with one fused matrix for queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping

from ...methods.lora import layer_shape
from ..architecture import Architecture, Attention, Between, EqualLengths, Kind, Part, Size, tiled

_TWO: tuple[Kind, Kind] = ("text", "image")
_BLOCKS = r"joint_blocks\.\d+"
_BLOCK = (
    ("attn.to_q", "x_block.attn.qkv", ("q",)),
    ("attn.to_k", "x_block.attn.qkv", ("k",)),
    ("attn.to_v", "x_block.attn.qkv", ("v",)),
    ("attn.add_q_proj", "context_block.attn.qkv", ("q",)),
    ("attn.add_k_proj", "context_block.attn.qkv", ("k",)),
    ("attn.add_v_proj", "context_block.attn.qkv", ("v",)),
    ("attn2.to_q", "x_block.attn2.qkv", ("q",)),
    ("attn2.to_k", "x_block.attn2.qkv", ("k",)),
    ("attn2.to_v", "x_block.attn2.qkv", ("v",)),
    ("attn.to_out.0", "x_block.attn.proj", ()),
    ("attn.to_add_out", "context_block.attn.proj", ()),
    ("attn2.to_out.0", "x_block.attn2.proj", ()),
    ("norm1.linear", "x_block.adaLN_modulation.1", ()),
    ("norm1_context.linear", "context_block.adaLN_modulation.1", ()),
    ("ff.net.0.proj", "x_block.mlp.fc1", ()),
    ("ff.net.2", "x_block.mlp.fc2", ()),
    ("ff_context.net.0.proj", "context_block.mlp.fc1", ()),
    ("ff_context.net.2", "context_block.mlp.fc2", ()),
    ("attn.norm_q", "x_block.attn.ln_q", ()),
    ("attn.norm_k", "x_block.attn.ln_k", ()),
    ("attn.norm_added_q", "context_block.attn.ln_q", ()),
    ("attn.norm_added_k", "context_block.attn.ln_k", ()),
    ("attn2.norm_q", "x_block.attn2.ln_q", ()),
    ("attn2.norm_k", "x_block.attn2.ln_k", ()),
)


class SD3(Architecture):
    """Text first, then the image. The last block's text goes no further than its attention."""

    title = "SD3"
    classes = ("OpenAISignatureMMDITWrapper",)
    kinds = (
        ("global", r"^[ty]_embedder\b|adaLN_modulation"),
        ("image", r"\.x_block\b|^final_layer\b|^x_embedder\b"),
        ("text", r"\.context_block\b|^context_embedder\b|^context_processor\b"),
    )
    names = (
        *((f"transformer_blocks.{{}}.{theirs}", f"joint_blocks.{{}}.{ours}", spans) for theirs, ours, spans in _BLOCK),
        ("context_embedder", "context_embedder", ()),
        ("pos_embed.proj", "x_embedder.proj", ()),
        ("proj_out", "final_layer.linear", ()),
        ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0", ()),
        ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2", ()),
        ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0", ()),
        ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2", ()),
    )
    attentions = (
        Attention(_BLOCKS, "double", "joint", Part("x_block.attn.qkv", ("k",)), "x_block.attn.proj", _TWO),
        Attention(
            _BLOCKS, "double", "self", Part("x_block.attn2.qkv", ("k",)), "x_block.attn2.proj", ("text", "image")
        ),
    )
    first_text_layers = r"^context_embedder$"
    pooled_layer = "y_embedder.mlp.0"
    targets = {
        "text": r"\.context_block\.attn\.(qkv|proj)$",
        "attention": r"_block\.attn2?\.(qkv|proj)$",
        "all": r"_block\.(attn2?\.(qkv|proj)|mlp\.fc[12])$",
    }

    @property
    def patch(self) -> int:
        return int(self.network.patch_size)

    def spans(self, layer: str) -> Mapping[str, Size]:
        if not layer.endswith(".qkv"):
            return {}
        width = layer_shape(self.network.get_submodule(layer))[0] // 3
        return tiled([("q", width), ("k", width), ("v", width)])

    @property
    def between(self) -> Between:  # type: ignore[override]
        return "nothing" if self.network.context_processor is None else "network"

    @property
    def equal_lengths(self) -> EqualLengths:  # type: ignore[override]
        if self.network.context_processor is not None or self.network.register_length:  # no mask gets there
            return EqualLengths("mask")
        return EqualLengths("mask", attentions=r"^joint_blocks\.\d+$", until="context_block.attn.proj")
