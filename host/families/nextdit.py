"""NextDiT, which is Lumina 2 and Z-Image: refiners of text and of image, then blocks of one stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..architecture import Architecture, Attention, EqualLengths, Layout, Part, Size, image_layout, text_layout, tiled

_KEYS = Part("attention.qkv", ("k",))
_BLOCK = (
    ("attention.to_q", "attention.qkv", ("q",)),
    ("attention.to_k", "attention.qkv", ("k",)),
    ("attention.to_v", "attention.qkv", ("v",)),
    ("attention.to_out.0", "attention.out", ()),
    ("attention.to_out", "attention.out", ()),
    ("attention.norm_q", "attention.q_norm", ()),
    ("attention.norm_k", "attention.k_norm", ()),
    ("attn.to_q", "attention.qkv", ("q",)),
    ("attn.to_k", "attention.qkv", ("k",)),
    ("attn.to_v", "attention.qkv", ("v",)),
    ("attn.to_out.0", "attention.out", ()),
    ("feed_forward.linear_1", "feed_forward.w1", ()),
    ("feed_forward.linear_2", "feed_forward.w2", ()),
    ("feed_forward.linear_3", "feed_forward.w3", ()),
)
"""Z-Image in diffusers, then Lumina 2 there."""


class NextDiT(Architecture):
    """Text first, then the image. Z-Image fills both up to a multiple of 32 with tokens that it has learned."""

    title = "Lumina 2 and Z-Image"
    classes = ("NextDiT",)
    kinds = (
        ("global", r"^t_embedder\b|adaLN_modulation|^time_text_embed\b|^clip_text_pooled_proj\b"),
        ("text", r"^cap_embedder\b|^context_refiner\.|^siglip_"),
        ("image", r"^x_embedder$|^noise_refiner\."),
        ("joint", r"^layers\.|^final_layer\b|^norm_final$"),
    )
    names = (
        *(
            (f"{stage}.{{}}.{theirs}", f"{stage}.{{}}.{ours}", spans)
            for stage in ("layers", "context_refiner", "noise_refiner")
            for theirs, ours, spans in _BLOCK
        ),
        ("all_final_layer.2-1.linear", "final_layer.linear", ()),
        ("all_final_layer.2-1.adaLN_modulation.1", "final_layer.adaLN_modulation.1", ()),
        ("all_x_embedder.2-1", "x_embedder", ()),
    )
    attentions = (
        Attention(r"context_refiner\.\d+", "refiner", "text", _KEYS, "attention.out", ("text",)),
        Attention(r"noise_refiner\.\d+", "refiner", "self", _KEYS, "attention.out", ("image",)),
        Attention(r"layers\.\d+", "single", "joint", _KEYS, "attention.out", ("joint",)),
    )
    first_text_layers = r"^cap_embedder\.1$"
    between = "norm"
    pooled_layer = "clip_text_pooled_proj.1"
    position_embedder = "rope_embedder"
    targets = {
        "text": r"^context_refiner\.\d+\.attention\.(qkv|out)$",
        "attention": r"\.attention\.(qkv|out)$",
        "all": r"\.(attention\.(qkv|out)|feed_forward\.w[123])$",
    }

    @property
    def patch(self) -> int:
        return int(self.network.patch_size)

    @property
    def multiple(self) -> int:
        """Both sequences are as long as a multiple of this."""
        return int(getattr(self.network, "pad_tokens_multiple", None) or 1)

    def spans(self, layer: str) -> Mapping[str, Size]:
        if not layer.endswith(".attention.qkv"):
            return {}
        attention = self.network.get_submodule(layer.removesuffix(".qkv"))
        queries, keys = (heads * attention.head_dim for heads in (attention.n_local_heads, attention.n_local_kv_heads))
        return tiled([("q", queries), ("k", keys), ("v", keys)])

    def streams(self, layer: str, text: int, size: Size, references: Sequence[Size]) -> tuple[Layout, Layout]:
        image, _ = self.image_tokens(size)
        if layer.startswith(("cap_embedder", "x_embedder")):  # what fills up comes behind them
            return text_layout(text), image_layout(image)
        return text_layout(text, self._filled(text)), image_layout(image, length=self._filled(image))

    def _filled(self, tokens: int) -> int:
        return -(-tokens // self.multiple) * self.multiple

    @property
    def equal_lengths(self) -> EqualLengths:  # type: ignore[override]
        plain = self.multiple == 1
        return EqualLengths(
            "mask" if plain else "token",
            token="" if plain else "cap_pad_token",
            after="" if plain else "cap_embedder",
            multiple=self.multiple,
            shifts=True,
            counts="num_tokens",
            attentions=r"^(layers|context_refiner)\.\d+\.attention$",
            not_with=("ref_latents", "ref_contexts", "siglip_feats"),
        )

    def text_positions(self, text: int, size: Size) -> torch.Tensor:
        """Of padding too. The image lies one behind the last of them."""
        positions = torch.zeros(self._filled(text), 3)
        positions[:, 0] = torch.arange(len(positions)) + 1
        return positions
