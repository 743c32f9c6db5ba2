"""A CLIP's text encoders as something to train: the layers the model reads, and encoding on the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from comfy.sd1_clip import SDClipModel

from ...methods.erase.trained.prompts import EncodedPrompts, stacked
from ..lora.adapters import Layers
from ..types import CLIP

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def text_layers(clip: CLIP) -> Layers:
    """The layers that few-shot unlearning trains, by the keys of their weights.

    They are the linear layers of every feed-forward part up to the layer that the model reads, and that layer's
    attention ("Erasing Concepts from Text-to-Image Diffusion Models with Few-shot Unlearning", 2405.07288). The CLIP
    skip counts, and so do the layers that a model's own encoder leaves unread (SDXL reads the last but one).

    Raises:
        ValueError: the CLIP has no encoder of the CLIP kind (T5 and language models).
    """
    layers = {key: layer for name, encoder in _encoders(clip) for key, layer in _layers_of(clip, name, encoder)}
    if not layers:
        raise ValueError(
            "This text encoder is not of the CLIP kind, and unlearning in it is not possible; use Train Erasure on the "
            "model."
        )
    return layers


def _layers_of(clip: CLIP, name: str, encoder: SDClipModel) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The trained layers of one encoder, with the keys of their weights."""
    layers = encoder.transformer.text_model.encoder.layers
    last = _last_read(clip, encoder, len(layers))
    for number, layer in enumerate(layers[: last + 1]):
        prefix = f"{name}.transformer.text_model.encoder.layers.{number}"
        for part in ("fc1", "fc2"):
            yield f"{prefix}.mlp.{part}.weight", getattr(layer.mlp, part)
        if number == last:
            for part in _ATTENTION:
                yield f"{prefix}.self_attn.{part}.weight", getattr(layer.self_attn, part)


def _encoders(clip: CLIP) -> Iterator[tuple[str, SDClipModel]]:
    for name, module in clip.cond_stage_model.named_children():
        if isinstance(module, SDClipModel) and hasattr(module.transformer, "text_model"):
            yield name, module


def _last_read(clip: CLIP, encoder: SDClipModel, count: int) -> int:
    """The number of the layer whose output becomes the CONDITIONING."""
    index = clip.layer_idx if clip.layer_idx is not None else encoder.options_default[1]
    if index is None or abs(index) > count:
        return count - 1
    return index % count


def encode_texts(clip: CLIP, texts: Sequence[str]) -> EncodedPrompts:
    """The texts as the host encodes them, one per row, on the graph inside a differentiable region.

    Brackets are part of the words.
    """
    encoder = clip.cond_stage_model
    encoder.reset_clip_options()
    if clip.layer_idx is not None:
        encoder.set_clip_options({"layer": clip.layer_idx})
    rows = []
    for text in texts:
        context, pooled, *_ = encoder.encode_token_weights(clip.tokenize(text, disable_weights=True))
        rows.append(EncodedPrompts(context, pooled))
    return stacked(rows)
