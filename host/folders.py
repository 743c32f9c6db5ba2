"""Where the host looks for files."""

from __future__ import annotations

from pathlib import Path

import folder_paths


def offer_loras(folder: Path) -> None:
    """Lets the host's own LoRA loaders list the files of a folder, after those of the user. Safe to call twice."""
    folder_paths.add_model_folder_path("loras", str(folder))


def lora_names() -> list[str]:
    """The LoRA files the host knows."""
    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> str:
    """The path of one of them.

    Raises:
        ValueError: there is none of that name.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise ValueError(f"There is no LoRA '{name}'; choose one from the list, after pressing R if it is new.")
    return path
