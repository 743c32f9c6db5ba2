"""Qwen-Image: blocks of two streams with unfused layers under the names of diffusers."""

from __future__ import annotations

import torch

from ..architecture import Architecture, Attention, EqualLengths, Part, Size


class Qwen(Architecture):
    """Text first, then the image, then references."""

    title = "Qwen-Image"
    classes = ("QwenImageTransformer2DModel",)
    kinds = (
        ("global", r"^time_text_embed\b|\.(img|txt)_mod\.|^norm_out\b"),
        ("text", r"^txt_(in|norm)$|add_[qkv]_proj$|to_add_out$|norm_added_[qk]$|\.txt_(mlp|norm\d)\b"),
        ("image", r"^img_in$|\.attn\.|\.img_(mlp|norm\d)\b|^proj_out$"),
    )
    attentions = (
        Attention(r"transformer_blocks\.\d+", "double", "joint", Part("attn.to_k"), "attn.to_out.0", ("text", "image")),
    )
    first_text_layers = r"^txt_in$"
    between = "norm"
    position_embedder = "pe_embedder"
    takes_references = True
    targets = {
        "text": r"\.attn\.(add_[qkv]_proj|to_add_out)$",
        "attention": r"\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",
        "all": r"\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$|\.(img|txt)_mlp\.net\.(0\.proj|2)$",
    }

    equal_lengths = EqualLengths("mask", attentions=r"^transformer_blocks\.\d+\.attn$")

    @property
    def patch(self) -> int:
        return int(self.network.patch_size)

    def text_positions(self, text: int, size: Size) -> torch.Tensor:
        """All text lies on a diagonal that begins outside of the image, whose middle is at 0."""
        start = max(tokens // 2 for tokens in self.grid(*size))
        return torch.arange(start, start + text).float()[:, None].expand(-1, 3)
