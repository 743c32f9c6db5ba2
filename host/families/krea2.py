"""Krea 2: text of twelve layers is fused first, then blocks of one stream."""

from __future__ import annotations

import torch

from ..architecture import Architecture, Attention, EqualLengths, Part, Size

_BLOCK = (
    ("attn.to_q", "attn.wq"),
    ("attn.to_k", "attn.wk"),
    ("attn.to_v", "attn.wv"),
    ("attn.to_gate", "attn.gate"),
    ("attn.to_out.0", "attn.wo"),
    ("attn.to_out", "attn.wo"),
    ("ff.gate", "mlp.gate"),
    ("ff.up", "mlp.up"),
    ("ff.down", "mlp.down"),
)
_STAGES = (
    ("transformer_blocks", "blocks"),
    ("text_fusion.layerwise_blocks", "txtfusion.layerwise_blocks"),
    ("text_fusion.refiner_blocks", "txtfusion.refiner_blocks"),
)


class Krea2(Architecture):
    """Text first, then the image, then references. Queries, keys and values are layers of their own."""

    title = "Krea 2"
    classes = ("SingleStreamDiT",)
    kinds = (
        ("global", r"^(tmlp|tproj)\b|\bmod(ulation)?$"),
        ("rows", r"^txtfusion\.(layerwise_blocks|projector)\b"),
        ("text", r"^txtfusion\.refiner_blocks\.|^txtmlp\b"),
        ("image", r"^first$"),
        ("joint", r"^blocks\.|^last\b"),
    )
    names = (
        *((f"{s}.{{}}.{theirs}", f"{t}.{{}}.{ours}", ()) for s, t in _STAGES for theirs, ours in _BLOCK),
        ("img_in", "first", ()),
        ("time_embed.linear_1", "tmlp.0", ()),
        ("time_embed.linear_2", "tmlp.2", ()),
        ("time_mod_proj", "tproj.1", ()),
        ("txt_in.linear_1", "txtmlp.1", ()),
        ("txt_in.linear_2", "txtmlp.3", ()),
        ("text_fusion.projector", "txtfusion.projector", ()),
        ("final_layer.linear", "last.linear", ()),
    )
    attentions = (
        Attention(r"txtfusion\.refiner_blocks\.\d+", "refiner", "text", Part("attn.wk"), "attn.wo", ("text",)),
        Attention(r"blocks\.\d+", "single", "joint", Part("attn.wk"), "attn.wo", ("joint",)),
    )
    first_text_layers = r"^txtmlp\.1$"
    between = "network"
    position_embedder = "pe_embedder"
    takes_references = True
    targets = {
        "text": r"^txtfusion\.refiner_blocks\.\d+\.attn\.(w[qkvo]|gate)$",
        "attention": r"^(txtfusion\.refiner_)?blocks\.\d+\.attn\.(w[qkvo]|gate)$",
        "all": r"^(txtfusion\.refiner_)?blocks\.\d+\.(attn\.(w[qkvo]|gate)|mlp\.(gate|up|down))$",
    }

    equal_lengths = EqualLengths("mask", attentions=r"^(blocks|txtfusion\.refiner_blocks)\.\d+\.attn$")

    @property
    def patch(self) -> int:
        return int(self.network.patch)

    def text_positions(self, text: int, size: Size) -> torch.Tensor:
        return torch.zeros(text, 3)
