"""Edits as safetensors files: factors are tensors, everything else is one JSON text in the header."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .edit import NOTHING, Edit
from .lowrank import LowRank

HEADER = "concepts_edit"
VERSION = 1


def tensors_of(edit: Edit) -> dict[str, torch.Tensor]:
    """The tensors of a file: ``text.up``, ``pooled.down``, ``layer.KEY.up``, ``diff.KEY`` …"""
    named = {"text": edit.text, "pooled": edit.pooled} | {f"layer.{key}": m for key, m in edit.layers.items()}
    tensors = {f"diff.{key}": difference for key, difference in edit.diffs.items()}
    for name, matrix in named.items():
        if matrix is not None:
            tensors |= {f"{name}.up": matrix.up, f"{name}.down": matrix.down}
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}


def save_edit(edit: Edit, path: Path) -> None:
    """Writes an edit; the same edit always gives the same bytes."""
    values = {
        "version": VERSION,
        "targets": edit.targets,
        "blocks": edit.blocks,
        "spec": edit.spec,
        "clip": edit.clip,
        "base": edit.base,
        "report": edit.report,
    }
    if edit.entry:  # files of a UNet's edits stay as they are
        values |= {"entry": edit.entry, "through": edit.through}
    write_tensors(tensors_of(edit), path, {HEADER: json.dumps(values, sort_keys=True)})


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with its header in alphabetical order: equal contents are equal bytes.

    Raises:
        ValueError: the system cannot write there; no part of a file stays behind.
    """
    raw = save(dict(tensors), metadata=dict(metadata))
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format asks for tensors on multiples of 8
    _write(path, len(header).to_bytes(8, "little") + header + raw[8 + length :])


def _write(path: Path, contents: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(contents)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); make room there, or name another folder in filename_prefix."
        ) from error


def load_edit(path: Path) -> Edit:
    """Reads an edit.

    Raises:
        ValueError: the file is not an edit, is damaged, or was written by a newer version of the pack.
    """
    try:
        with safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {}).get(HEADER, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()} if values else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read ({error}); save the edit again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} is not an edit: Save Edit did not write it. Load a LoRA with Load LoRA.")
    if values.get("version") != VERSION:
        raise ValueError(
            f"{path.name} was written by another version of this pack (edit format {values.get('version')}, this one "
            f"reads {VERSION}); update the pack or solve the edit again."
        )
    return _edit_of(tensors, values)


def _edit_of(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> Edit:
    def matrix(name: str) -> LowRank | None:
        return LowRank(tensors[f"{name}.up"], tensors[f"{name}.down"]) if f"{name}.up" in tensors else None

    keys = sorted(n[len("layer.") : -len(".up")] for n in tensors if n.startswith("layer.") and n.endswith(".up"))
    layers = {key: LowRank(tensors[f"layer.{key}.up"], tensors[f"layer.{key}.down"]) for key in keys}
    diffs = {name[len("diff.") :]: tensors[name] for name in sorted(tensors) if name.startswith("diff.")}
    return Edit(
        matrix("text"),
        matrix("pooled"),
        layers,
        diffs,
        targets=tuple(values["targets"]),
        blocks=values["blocks"],
        entry=tuple(values.get("entry", ())),
        through=values.get("through", NOTHING),
        spec=values["spec"],
        clip=tuple(values["clip"]),
        base=tuple(values["base"]),
        report=values["report"],
    )
