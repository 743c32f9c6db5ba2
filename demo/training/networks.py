"""The host's own UNet, transformer and text encoder, built to be trained from nothing.

The host's layers leave their weights uninitialised, because it only loads checkpoints, and its blocks add residuals in
place. Plain ``torch.nn`` layers and a layer norm that copies its input make both trainable.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.sd1_clip
import torch
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import nn

from .. import architecture
from ..files import FOLDER, read_weights


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clone())  # the block adds to x in place afterwards; autograd keeps this copy


class TrainableOps:
    """What the host calls ``operations``: the layer classes a network is made of."""

    Linear, Conv2d, GroupNorm, LayerNorm, Embedding = nn.Linear, nn.Conv2d, nn.GroupNorm, _LayerNorm, nn.Embedding
    RMSNorm = nn.RMSNorm

    @staticmethod
    def conv_nd(dims: int, *args: object, **kwargs: object) -> nn.Module:
        return nn.Conv2d(*args, **kwargs)  # type: ignore[arg-type]


def build_unet() -> UNetModel:
    """A fresh UNet; every residual branch starts at zero."""
    unet = UNetModel(**architecture.UNET, dtype=torch.float32, operations=TrainableOps)
    branches = [m.out_layers[-1] for m in unet.modules() if isinstance(m, ResBlock)]
    branches += [m.proj_out for m in unet.modules() if isinstance(m, SpatialTransformer)]
    for last in [*branches, unet.out[-1]]:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return unet


def build_dit(config: dict[str, Any] = architecture.DIT) -> NextDiT:
    """A fresh transformer. Its modulations and its last layer start at zero, so it predicts zero."""
    dit = NextDiT(**config, device="cpu", dtype=torch.float32, operations=TrainableOps)
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in [*dit.layers, *dit.noise_refiner, dit.final_layer]:
        nn.init.zeros_(block.adaLN_modulation[-1].weight)
    nn.init.zeros_(dit.final_layer.linear.weight)
    for layer in (dit.t_embedder.mlp[0], dit.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)
    for token in (dit.x_pad_token, dit.cap_pad_token):
        nn.init.zeros_(token)
    return dit


class UsedTokens(nn.Module):
    """A token table of which only the rows ``ids`` are trained. Callable like the host's own embedding."""

    table: torch.Tensor
    index: torch.Tensor

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        table = architecture.untrained_rows()
        index = torch.full((len(table),), -1)
        index[ids] = torch.arange(len(ids))
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("ids", torch.tensor(ids))
        self.weight = nn.Parameter(table[ids].clone())

    def forward(self, tokens: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        row = self.index[tokens]
        trained = self.weight[row.clamp(min=0)]
        return torch.where((row >= 0).unsqueeze(-1), trained, self.table[tokens])


def build_text(ids: list[int]) -> comfy.clip_model.CLIPTextModel:
    """A fresh text encoder that trains the token rows ``ids``."""
    text = comfy.clip_model.CLIPTextModel(architecture.TEXT, torch.float32, "cpu", TrainableOps)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.1)
    text.set_input_embeddings(UsedTokens(ids))
    nn.init.eye_(text.text_projection.weight).requires_grad_(False)  # the UNet takes no pooled output
    return text


def bundled_networks(folder: Path = FOLDER) -> tuple[UNetModel, comfy.clip_model.CLIPTextModel]:
    """The bundled UNet and text encoder as networks that can be trained on."""
    unet = build_unet()
    unet.load_state_dict({k: v.float() for k, v in read_weights(folder / "unet.safetensors").items()})
    weights = {k: v.float() for k, v in read_weights(folder / "text.safetensors").items()}
    ids = weights.pop("token_ids").long()
    text = build_text(ids.tolist())
    prefix = "text_model.embeddings.token_embedding."
    text.load_state_dict(weights | {prefix + "ids": ids, prefix + "weight": weights.pop("token_rows")})
    return unet, text


def bundled_dit(folder: Path = FOLDER) -> NextDiT:
    """The bundled transformer as a network that can be trained on."""
    dit = build_dit()
    weights = {k: v.float() for k, v in read_weights(folder / "dit.safetensors").items()}
    unused = {k: v for k, v in dit.state_dict().items() if k in architecture.UNUSED}
    dit.load_state_dict(unused | weights)
    return dit


class Tokenizer:
    """The host's tokenizer with a cache by word. A sequence is 77 ids: start, words, end, and ends as padding."""

    LENGTH, START, END = 77, 49406, 49407

    def __init__(self) -> None:
        self._bpe = comfy.sd1_clip.SDTokenizer().tokenizer
        self.words = tuple(
            sorted(w[:-4] for w in self._bpe.get_vocab() if w.endswith("</w>") and w[:-4].isalpha() and w.isascii())
        )

    @cache  # noqa: B019  one tokenizer lives as long as its process
    def word(self, word: str) -> tuple[int, ...]:
        """The ids of one word (or punctuation mark)."""
        return tuple(self._bpe(word)["input_ids"][1:-1])

    def __call__(self, caption: str, nouns: tuple[str, ...] = ()) -> tuple[list[int], list[int]]:
        """The 77 ids of a caption, and for each noun the position of its last token."""
        ids, at = [self.START], {}
        for word in caption.replace(",", " ,").split():
            ids += self.word(word)
            at[word] = len(ids) - 1
        ids = [*ids[: self.LENGTH - 1], self.END]
        return ids + [self.END] * (self.LENGTH - len(ids)), [at[noun] for noun in nouns]
