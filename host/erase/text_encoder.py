"""A CLIP's text encoders as something to train: which layers the model really taps, and encoding on the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from comfy.sd1_clip import SDClipModel

from ...methods.erase.trained.ground import Encoded, stacked
from ..lora.adapters import Layers

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def text_layers(clip: Any) -> Layers:
    """The layers that few-shot unlearning trains: both linear layers of every feed-forward part up to the layer whose output
    the model reads, and that layer's attention ("Erasing Concepts from Text-to-Image Diffusion Models with Few-shot
    Unlearning", 2405.07288). The clip skip of the CLIP counts, and so does what a model's own encoder leaves unread (SDXL reads the last
    but one).

    Raises:
        ValueError: the CLIP has no encoder of the CLIP kind (T5 and language models).
    """
    found: Layers = {}
    for name, encoder in _encoders(clip):
        layers = encoder.transformer.text_model.encoder.layers
        tap = _tapped(clip, encoder, len(layers))
        for number, layer in enumerate(layers[: tap + 1]):
            prefix = f"{name}.transformer.text_model.encoder.layers.{number}"
            for part in ("fc1", "fc2"):
                found[f"{prefix}.mlp.{part}.weight"] = getattr(layer.mlp, part)
            if number == tap:
                for part in _ATTENTION:
                    found[f"{prefix}.self_attn.{part}.weight"] = getattr(layer.self_attn, part)
    if not found:
        raise ValueError(
            "This text encoder is not of the CLIP kind, and unlearning in it is not possible; use Train Erasure on the model."
        )
    return found


def _encoders(clip: Any) -> Iterator[tuple[str, Any]]:
    for name, module in clip.cond_stage_model.named_children():
        if isinstance(module, SDClipModel) and hasattr(module.transformer, "text_model"):
            yield name, module


def _tapped(clip: Any, encoder: Any, count: int) -> int:
    """The number of the layer whose output becomes the CONDITIONING."""
    index = clip.layer_idx if clip.layer_idx is not None else encoder.options_default[1]
    if index is None or abs(index) > count:
        return count - 1
    return index % count


def encoded(clip: Any, texts: Sequence[str]) -> Encoded:
    """The texts as the host encodes them, one a row, on the graph inside a differentiable region."""
    model = clip.cond_stage_model
    model.reset_clip_options()
    if clip.layer_idx is not None:
        model.set_clip_options({"layer": clip.layer_idx})
    rows = []
    for text in texts:
        context, pooled, *_ = model.encode_token_weights(clip.tokenize(text))
        rows.append(Encoded(context, pooled))
    return stacked(rows)
