"""Where the host looks for files."""

from __future__ import annotations

from pathlib import Path

import folder_paths


def offer_loras(folder: Path) -> None:
    """Lets the host's own LoRA loaders list the files of a folder, after those of the user. Safe to call twice."""
    folder_paths.add_model_folder_path("loras", str(folder))
