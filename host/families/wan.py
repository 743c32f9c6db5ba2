"""Wan 2.1 and 2.2 as image models: image blocks with cross-attention to the text."""

from __future__ import annotations

from collections.abc import Sequence

from ..architecture import Architecture, Layout, Size


class Wan(Architecture):
    """Image and text never share a sequence."""

    title = "Wan"
    classes = ("WanModel",)
    kinds = (
        ("global", r"^time_(embedding|projection)\b"),
        ("text", r"^text_embedding\b|^img_emb\b|\.cross_attn\.(k|v|norm_k)(_img)?$"),
        ("image", r"^patch_embedding$|^ref_conv$|^blocks\.|^head\b"),
    )

    @property
    def patch(self) -> int:
        return int(self.network.patch_size[-1])

    def streams(self, layer: str, text: int, size: Size, references: Sequence[Size]) -> tuple[Layout, Layout]:
        if references:
            raise self.lacks("A picture beside the latent", "remove the reference latents")
        return super().streams(layer, text, size, references)
