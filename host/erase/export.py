"""An edit as a LoRA file."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.utils
import torch

from ...methods.erase.edit import Edit
from ...methods.erase.lowrank import LowRank, total
from ..lora.export import KOHYA, lora_tensors, names_of, write_lora
from ..types import CLIP, ModelPatcher
from .weights import weight_deltas


def layers_of(model: ModelPatcher, edit: Edit) -> dict[str, LowRank]:
    """ΔW of every weight the edit changes, by the host's key. All are whole weights: a range gets zero columns."""
    layers: dict[str, LowRank] = dict(edit.layers)
    for key, matrix in weight_deltas(model, edit).items():
        name, whole = (key, matrix) if isinstance(key, str) else (key[0], _widened_delta(model, key[0], matrix))
        layers[name] = total(layers[name], whole) if name in layers else whole
    return layers


def _widened_delta(model: ModelPatcher, key: str, delta: LowRank) -> LowRank:
    """The change of a weight's first columns as a change of the whole weight."""
    columns = comfy.utils.get_attr(model.model, key).shape[1]
    return LowRank(delta.up, torch.nn.functional.pad(delta.down, (0, columns - delta.width)))


def export_lora(
    model: ModelPatcher, clip: CLIP | None, edit: Edit, path: Path, naming: str = KOHYA, *, half: bool = True
) -> int:
    """Writes the edit as a LoRA for this model and returns the size of the file in bytes.

    Raises:
        ValueError: the edit changes nothing, does not fit the model, or changes what a LoRA cannot contain.
    """
    if edit.empty:
        raise ValueError("The edit changes nothing, so there is no LoRA to save; add concepts to Solve Erasure.")
    if clip is None and edit.on_clip():
        raise ValueError("This edit also changes the text encoder, which a LoRA needs; connect the CLIP it is for.")
    layers = layers_of(model, edit)
    dtype = torch.float16 if half else torch.float32
    tensors = lora_tensors(layers, names_of(model, clip, naming), naming, dtype, edit.diffs)
    rank = str(max(matrix.rank for matrix in layers.values()))
    metadata = {
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_network_module": "networks.lora",
        "concepts_erasure": json.dumps({"spec": edit.spec, "report": edit.report}, sort_keys=True),
    }
    write_lora(path, tensors, metadata)
    return path.stat().st_size
