"""Wan 2.1 and 2.2 as image models: image blocks with cross-attention to the text."""

from __future__ import annotations

from ..architecture import Architecture, Attention, EqualLengths, Part

_PICTURES = ("reference_latent", "time_dim_concat", "context_latents")
_ATTENTION = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))


class Wan(Architecture):
    """Image and text never share a sequence."""

    title = "Wan"
    classes = ("WanModel",)
    kinds = (
        ("global", r"^time_(embedding|projection)\b"),
        ("text", r"^text_embedding\b|^img_emb\b|\.cross_attn\.(k|v|norm_k)(_img)?$"),
        ("image", r"^patch_embedding$|^ref_conv$|^blocks\.|^head\b"),
    )
    attentions = (
        Attention(r"blocks\.\d+", "block", "self", Part("self_attn.k"), "self_attn.o", ("image",)),
        Attention(r"blocks\.\d+", "block", "cross", Part("cross_attn.k"), "cross_attn.o", ("image",)),
    )
    first_text_layers = r"^text_embedding\.0$"
    text_embedder = "text_embedding"
    targets = {
        "text": r"\.cross_attn\.[kv]$",
        "attention": r"_attn\.[qkvo]$",
        "all": r"\.((self|cross)_attn\.[qkvo]|ffn\.[02])$",
    }

    names = (
        *(
            (f"blocks.{{}}.{theirs}.{name}", f"blocks.{{}}.{ours}.{layer}", ())
            for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
            for name, layer in _ATTENTION
        ),
        ("blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0", ()),
        ("blocks.{}.ffn.net.2", "blocks.{}.ffn.2", ()),
    )

    @property
    def patch(self) -> int:
        return int(self.network.patch_size[-1])

    @property
    def equal_lengths(self) -> EqualLengths:  # type: ignore[override]
        if getattr(self.network, "img_emb", None) is not None:  # its keys begin with those of a picture
            return EqualLengths("mask", not_with=_PICTURES)
        return EqualLengths("mask", attentions=r"^blocks\.\d+\.cross_attn$", not_with=_PICTURES)
