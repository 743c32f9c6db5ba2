"""Reading the bundled weights, with a sentence for a file that is missing or damaged."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "weights"
LORAS = FOLDER / "loras"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a bundled safetensors file.

    Raises:
        RuntimeError: the file is missing or cannot be read; the message says how to get it back.
    """
    repair = "get it back with 'git checkout -- demo/weights' in the pack's folder, or clone the pack again"
    if not path.is_file():
        raise RuntimeError(f"The demo model's file {path.name} is missing; {repair}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RuntimeError(f"The demo model's file {path.name} is damaged ({error}); {repair}.") from error
