"""What trainers call some layers of each transformer family, and which outputs of which of the host's layers they are.

Hand-written: the pack's own tables, and the host's, are checked against it.
"""

from __future__ import annotations

from typing import NamedTuple


class Rows(NamedTuple):
    """Outputs of a layer of the host: the first, and how many; all of them without."""

    layer: str
    start: int = 0
    length: int | None = None


def _thirds(name, layer, width, names=("to_q", "to_k", "to_v")):
    return {f"{name}.{part}": Rows(layer, n * width, width) for n, part in enumerate(names)}


_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_FLUX = {
    **_thirds("transformer_blocks.0.attn", "double_blocks.0.img_attn.qkv", 64),
    **_thirds("transformer_blocks.0.attn", "double_blocks.0.txt_attn.qkv", 64, _ADDED),
    "transformer_blocks.1.attn.to_out.0": Rows("double_blocks.1.img_attn.proj"),
    "transformer_blocks.1.attn.to_add_out": Rows("double_blocks.1.txt_attn.proj"),
    **_thirds("single_transformer_blocks.1.attn", "single_blocks.1.linear1", 64),
    "x_embedder": Rows("img_in"),
    "context_embedder": Rows("txt_in"),
}
_FLUX1 = _FLUX | {
    "transformer_blocks.0.ff.net.0.proj": Rows("double_blocks.0.img_mlp.0"),
    "transformer_blocks.0.ff_context.net.2": Rows("double_blocks.0.txt_mlp.2"),
    "single_transformer_blocks.0.proj_mlp": Rows("single_blocks.0.linear1", 192, 256),
    "single_transformer_blocks.0.proj_out": Rows("single_blocks.0.linear2"),
    "single_blocks.0.linear1_qkv": Rows("single_blocks.0.linear1", 0, 192),
}
_FLUX2 = _FLUX | {
    "transformer_blocks.0.ff.linear_in": Rows("double_blocks.0.img_mlp.0"),
    "transformer_blocks.0.ff_context.linear_out": Rows("double_blocks.0.txt_mlp.2"),
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": Rows("single_blocks.0.linear1"),
    "single_transformer_blocks.0.attn.to_out": Rows("single_blocks.0.linear2"),
    "single_transformer_blocks.1.proj_mlp": Rows("single_blocks.1.linear1", 192, 384),
}
_SD3 = {
    **_thirds("transformer_blocks.0.attn", "joint_blocks.0.x_block.attn.qkv", 128),
    **_thirds("transformer_blocks.0.attn2", "joint_blocks.0.x_block.attn2.qkv", 128),
    **_thirds("transformer_blocks.0.attn", "joint_blocks.0.context_block.attn.qkv", 128, _ADDED),
    "transformer_blocks.0.attn.to_out.0": Rows("joint_blocks.0.x_block.attn.proj"),
    "transformer_blocks.1.ff.net.2": Rows("joint_blocks.1.x_block.mlp.fc2"),
    "context_embedder": Rows("context_embedder"),
}


def _next_dit(query, keys):
    spans = {"to_q": (0, query), "to_k": (query, keys), "to_v": (query + keys, keys)}
    blocks = ("layers.1", "noise_refiner.0", "context_refiner.0")
    split = {f"{b}.attention.{part}": Rows(f"{b}.attention.qkv", *span) for b in blocks for part, span in spans.items()}
    return split | {
        "layers.0.attention.to_out.0": Rows("layers.0.attention.out"),
        "layers.0.feed_forward.w2": Rows("layers.0.feed_forward.w2"),
        "cap_embedder.1": Rows("cap_embedder.1"),
    }


_QWEN = (
    "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.1.img_mlp.net.0.proj", "txt_in",
)  # fmt: skip
_WAN = {
    "blocks.0.attn1.to_q": Rows("blocks.0.self_attn.q"),
    "blocks.0.attn1.to_out.0": Rows("blocks.0.self_attn.o"),
    "blocks.1.attn2.to_v": Rows("blocks.1.cross_attn.v"),
    "blocks.0.ffn.net.0.proj": Rows("blocks.0.ffn.0"),
    "blocks.0.ffn.net.2": Rows("blocks.0.ffn.2"),
}
_COSMOS = {
    "transformer_blocks.0.attn1.to_k": Rows("blocks.0.self_attn.k_proj"),
    "transformer_blocks.1.attn2.to_out.0": Rows("blocks.1.cross_attn.output_proj"),
    "transformer_blocks.0.ff.net.0.proj": Rows("blocks.0.mlp.layer1"),
    "transformer_blocks.0.ff.net.2": Rows("blocks.0.mlp.layer2"),
}
_KREA2 = {
    "transformer_blocks.0.attn.to_q": Rows("blocks.0.attn.wq"),
    "transformer_blocks.0.attn.to_out.0": Rows("blocks.0.attn.wo"),
    "transformer_blocks.1.ff.gate": Rows("blocks.1.mlp.gate"),
    "text_fusion.layerwise_blocks.0.attn.to_k": Rows("txtfusion.layerwise_blocks.0.attn.wk"),
    "text_fusion.refiner_blocks.1.ff.up": Rows("txtfusion.refiner_blocks.1.mlp.up"),
}

NAMES: dict[str, dict[str, Rows]] = {
    "flux": _FLUX1,
    "flux_schnell": _FLUX1,
    "flux2": _FLUX2,
    "chroma": _FLUX1,
    "sd3": _SD3,
    "qwen": {name: Rows(name) for name in _QWEN},
    "lumina2": _next_dit(96, 48),
    "zimage": _next_dit(256, 256),
    "wan": _WAN,
    "cosmos": _COSMOS,
    "krea2": _KREA2,
    "anima": _COSMOS,
}
"""By family, the names without a prefix."""
