"""Text encoders for the tiny transformers: the host's own tokenizers, and random rows of the width that a model reads.

A row depends on all tokens before it, as in a language model; in a T5 or a CLIP's padding too. Prompts have the host's
lengths, templates and padding, and its cut of templates.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from .tiny_transformers import FAMILIES

_CUT = 34
"""Tokens of a template that Qwen-Image's and Krea 2's encoders leave out."""

# the module and class of the host's tokenizer, and how many rows are left out
_TOKENIZERS: dict[str, tuple[str, str, int]] = {
    "flux": ("flux", "FluxTokenizer", 0),
    "flux_schnell": ("flux", "FluxTokenizer", 0),
    "flux2": ("flux", "KleinTokenizer", 0),
    "chroma": ("pixart_t5", "PixArtTokenizer", 0),
    "sd3": ("sd3_clip", "SD3Tokenizer", 0),
    "qwen": ("qwen_image", "QwenImageTokenizer", _CUT),
    "lumina2": ("z_image", "ZImageTokenizer", 0),  # its own vocabulary comes with its weights
    "zimage": ("z_image", "ZImageTokenizer", 0),
    "wan": ("cosmos", "CosmosT5Tokenizer", 0),  # the same
    "cosmos": ("cosmos", "CosmosT5Tokenizer", 0),
    "krea2": ("krea2", "Krea2Tokenizer", _CUT),
    "anima": ("anima", "AnimaTokenizer", 0),
}


class TinyClip:
    """A CLIP of the host as far as prompts go."""

    layer_idx = None
    use_clip_schedule = False

    def __init__(self, name: str) -> None:
        module, tokenizer, self.cut = _TOKENIZERS[name]
        host: Any = importlib.import_module(f"comfy.text_encoders.{module}")
        if not hasattr(host, tokenizer):  # only newer hosts have Flux.2's smaller encoder
            host, tokenizer = importlib.import_module("comfy.text_encoders.z_image"), "ZImageTokenizer"
        self.tokenizer, self.name, self.family = getattr(host, tokenizer)(), name, FAMILIES[name]
        self.known: dict[int, torch.Tensor] = {}

    def tokenize(self, text: str, **options: Any) -> dict[str, list[list[tuple[Any, ...]]]]:
        return self.tokenizer.tokenize_with_weights(text, **options)

    def encode_from_tokens_scheduled(self, tokens: dict[str, list[list[tuple[Any, ...]]]]) -> list[list[Any]]:
        numbers = {name: [token for section in called for token, *_ in section] for name, called in tokens.items()}
        read = {"flux": ["t5xxl"], "flux_schnell": ["t5xxl"], "sd3": ["l", "t5xxl"]}.get(self.name, list(numbers)[:1])
        rows = torch.cat([self._rows(numbers[name]) for name in read])[None, self.cut :]
        values: dict[str, Any] = {"pooled_output": None}
        if self.family.pooled is not None:
            values["pooled_output"] = self._rows(numbers["l"])[None, -1, : self.family.pooled]
        if self.name == "anima":
            values["t5xxl_ids"] = torch.tensor(numbers["t5xxl"], dtype=torch.int)
            values["t5xxl_weights"] = torch.ones(len(numbers["t5xxl"]))
        return [[rows, values]]

    def _rows(self, numbers: list[int]) -> torch.Tensor:
        own = torch.stack([self._row(number) for number in numbers])
        counts = torch.arange(1, len(own) + 1)[:, None]
        return own + own.cumsum(0) / counts

    def _row(self, number: int) -> torch.Tensor:
        if number not in self.known:
            generator = torch.Generator().manual_seed(number)
            self.known[number] = torch.randn(self.family.context, generator=generator)
        return self.known[number]
