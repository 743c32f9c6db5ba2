"""Cosmos-Predict2, and Anima, which is the same network with an adapter for its text."""

from __future__ import annotations

from collections.abc import Sequence

from ..architecture import Architecture, Attention, Between, EqualLengths, Layout, Part, Size, text_layout

_BLOCKS = r"blocks\.\d+"
ANIMA_TEXT = 512
"""Rows that Anima's adapter brings every shorter prompt to, with zeros behind."""


_ATTENTION = (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out.0", "output_proj"))


class Cosmos(Architecture):
    """Image and text never share a sequence. MLPs see the image as (batch, frames, rows, columns, channels)."""

    title = "Cosmos and Anima"
    classes = ("MiniTrainDIT", "Anima")
    kinds = (
        ("text", r"^llm_adapter\.|\.cross_attn\.(k_proj|v_proj|k_norm|v_norm)$"),
        ("global", r"^t_embed|\.adaln_modulation"),
        ("image", r"^x_embedder\b|^blocks\.|^final_layer\b"),
    )
    attentions = (
        Attention(_BLOCKS, "block", "self", Part("self_attn.k_proj"), "self_attn.output_proj", ("image",)),
        Attention(_BLOCKS, "block", "cross", Part("cross_attn.k_proj"), "cross_attn.output_proj", ("image",)),
    )
    first_text_layers = r"^blocks\.\d+\.cross_attn\.[kv]_proj$"
    targets = {
        "text": r"^blocks\.\d+\.cross_attn\.[kv]_proj$",
        "attention": r"^blocks\.\d+\.\w+_attn\.([qkv]|output)_proj$",
        "all": r"^blocks\.\d+\.(\w+_attn\.([qkv]|output)_proj|mlp\.layer[12])$",
    }

    names = (
        *(
            (f"transformer_blocks.{{}}.{theirs}.{name}", f"blocks.{{}}.{ours}.{layer}", ())
            for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
            for name, layer in _ATTENTION
        ),
        ("transformer_blocks.{}.ff.net.0.proj", "blocks.{}.mlp.layer1", ()),
        ("transformer_blocks.{}.ff.net.2", "blocks.{}.mlp.layer2", ()),
    )

    @property
    def patch(self) -> int:
        return int(self.network.patch_spatial)

    def streams(self, layer: str, text: int, size: Size, references: Sequence[Size]) -> tuple[Layout, Layout]:
        words, image = super().streams(layer, text, size, references)
        if self.has_adapter and not self.before_call(layer):
            words = text_layout(text, max(text, ANIMA_TEXT))
        return words, image

    def before_call(self, layer: str) -> bool:
        return layer.startswith("llm_adapter.")

    @property
    def has_adapter(self) -> bool:
        """Whether it is Anima."""
        return hasattr(self.network, "llm_adapter")

    @property
    def between(self) -> Between:  # type: ignore[override]
        return "network" if self.has_adapter else "nothing"

    @property
    def text_encoder(self) -> str | None:  # type: ignore[override]
        return "t5xxl" if self.has_adapter else None

    @property
    def equal_lengths(self) -> EqualLengths:  # type: ignore[override]
        return EqualLengths("host" if self.has_adapter else "mask", attentions=r"^blocks\.\d+\.cross_attn$")
