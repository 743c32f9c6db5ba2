"""Where the host looks for files."""

from __future__ import annotations

from pathlib import Path

import folder_paths


def offer_loras(folder: Path) -> None:
    """Adds a folder to the host's LoRA loaders; the user's own files come first. Safe to call twice."""
    folder_paths.add_model_folder_path("loras", str(folder))


def lora_names() -> list[str]:
    """The LoRA files the host knows."""
    return folder_paths.get_filename_list("loras")


def lora_file(name: str) -> str:
    """The file behind a name of ``lora_names``.

    Raises:
        ValueError: it does not exist.
    """
    file = folder_paths.get_full_path("loras", name)
    if file is None:
        raise ValueError(f"There is no LoRA '{name}'; choose one from the list, after pressing R if it is new.")
    return file


EDITS = "concepts_edits"
"""The host's name for folders of saved erasures."""


def offer_edits() -> None:
    """Has the host list saved erasures, in its models folder and its output folder. Safe to call twice."""
    folders = [Path(folder_paths.models_dir, EDITS), Path(folder_paths.get_output_directory(), EDITS)]
    folder_paths.folder_names_and_paths[EDITS] = ([str(folder) for folder in folders], {".safetensors"})


def edit_names() -> list[str]:
    """The files Load Edit can read."""
    return folder_paths.get_filename_list(EDITS)


def edit_file(name: str) -> Path:
    """The file behind a name of ``edit_names``.

    Raises:
        ValueError: it does not exist.
    """
    found = edit_names()
    if name not in found:
        known = f"there are {', '.join(found)}" if found else "none has been saved yet; use Save Edit first"
        raise ValueError(f"There is no saved edit '{name}'; {known}.")
    return Path(folder_paths.get_full_path_or_raise(EDITS, name))


def new_output(prefix: str) -> Path:
    """A new file in the host's output folder, numbered as the host numbers its pictures.

    Raises:
        ValueError: the prefix leads out of the output folder, or the system cannot write there.
    """
    output = folder_paths.get_output_directory()
    try:
        folder, name, number, *_ = folder_paths.get_save_image_path(prefix, output)
    except OSError as error:
        raise ValueError(
            f"'{prefix}' cannot be written in {output} ({error.strerror}); name another folder, or let ComfyUI write "
            "there."
        ) from error
    except Exception as error:
        raise ValueError(
            f"The file prefix '{prefix}' leads out of the output folder; write a name, or folder/name."
        ) from error
    return Path(folder, f"{name}_{number:05}_.safetensors")
