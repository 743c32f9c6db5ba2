"""Qwen-Image: blocks of two streams with unfused layers under the names of diffusers."""

from __future__ import annotations

from ..architecture import Architecture


class Qwen(Architecture):
    """Text first, then the image, then references."""

    title = "Qwen-Image"
    classes = ("QwenImageTransformer2DModel",)
    kinds = (
        ("global", r"^time_text_embed\b|\.(img|txt)_mod\.|^norm_out\b"),
        ("text", r"^txt_(in|norm)$|add_[qkv]_proj$|to_add_out$|norm_added_[qk]$|\.txt_(mlp|norm\d)\b"),
        ("image", r"^img_in$|\.attn\.|\.img_(mlp|norm\d)\b|^proj_out$"),
    )

    @property
    def patch(self) -> int:
        return int(self.network.patch_size)
