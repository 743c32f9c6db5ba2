"""Reading the bundled weights, with a sentence for a file that is missing or damaged."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "weights"
LORAS = FOLDER / "loras"
_LORA_NAMES = {"unet": "concepts-demo-{}", "dit": "concepts-demo-dit-{}"}
_REPAIR = "get it back with 'git checkout -- demo/weights' in the pack's folder, or clone the pack again"


def lora_file(concept: str, kind: str = "unet", folder: Path | None = None) -> Path:
    """Where the LoRA of a concept is for a kind of demo model."""
    return (folder or LORAS) / f"{_LORA_NAMES[kind].format(concept)}.safetensors"


def does_not_fit(name: str) -> RuntimeError:
    """The error for a whole file whose tensors are not those this version of the pack expects."""
    return RuntimeError(f"The demo model's file {name}.safetensors does not fit this version of the pack; {_REPAIR}.")


def load_strictly(module: torch.nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    """Loads every weight of a module, or raises ``does_not_fit``."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise does_not_fit(name) from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a bundled safetensors file.

    Raises:
        RuntimeError: the file is missing or cannot be read; the message says how to get it back.
    """
    if not path.is_file():
        raise RuntimeError(f"The demo model's file {path.name} is missing; {_REPAIR}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RuntimeError(f"The demo model's file {path.name} is damaged ({error}); {_REPAIR}.") from error
