"""An edit as a LoRA file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.utils
import torch

from ...methods.erase.edit import Edit
from ...methods.erase.lowrank import LowRank, total
from ..lora.export import KOHYA, lora_tensors, names_of, write_lora
from .weights import weight_deltas


def layers_of(model: Any, edit: Edit) -> dict[str, LowRank]:
    """ΔW of every weight the edit changes, by the host's key, of whole weights (a part is filled up with zero columns)."""
    layers: dict[str, LowRank] = dict(edit.layers)
    for key, matrix in weight_deltas(model, edit).items():
        name, whole = (key, matrix) if isinstance(key, str) else (key[0], _widened(model, key[0], matrix))
        layers[name] = total(layers[name], whole) if name in layers else whole
    return layers


def _widened(model: Any, key: str, matrix: LowRank) -> LowRank:
    """The first columns of a weight as the whole weight."""
    columns = comfy.utils.get_attr(model.model, key).shape[1]
    return LowRank(matrix.up, torch.nn.functional.pad(matrix.down, (0, columns - matrix.width)))


def export_lora(
    model: Any, clip: Any, edit: Edit, path: Path, naming: str = KOHYA, *, half: bool = True
) -> int:  # fmt: skip
    """Writes the edit as a LoRA for this model and returns the size of the file in bytes.

    Raises:
        ValueError: the edit changes nothing, does not fit the model, or changes what a LoRA cannot hold.
    """
    if edit.empty:
        raise ValueError("The edit changes nothing, so that there is no LoRA to save; add concepts to Solve Erasure.")
    if clip is None and edit.on_clip():
        raise ValueError("This edit changes the text encoder too; connect the CLIP it is for.")
    layers = layers_of(model, edit)
    dtype = torch.float16 if half else torch.float32
    tensors = lora_tensors(layers, names_of(model, clip, naming), naming, dtype, edit.diffs)
    rank = max(matrix.rank for matrix in layers.values())
    about = {
        "ss_network_dim": str(rank), "ss_network_alpha": str(rank), "ss_network_module": "networks.lora",
        "concepts_erasure": json.dumps({"spec": dict(edit.spec), "report": dict(edit.report)}, sort_keys=True),
    }  # fmt: skip
    write_lora(path, tensors, about)
    return path.stat().st_size
