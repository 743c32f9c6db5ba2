"""Turns training checkpoints into the bundled weights: fp16, and of the token table only the rows that were trained."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..architecture import UNUSED
from ..files import FOLDER
from ..loader import KINDS
from .train_dit import AVERAGE, CHECKPOINT

_TOKEN_PREFIX = "text_model.embeddings.token_embedding."


def _half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in state.items()}


def export_model(checkpoint: Path, folder: Path) -> None:
    """``unet.safetensors`` and ``text.safetensors`` of a checkpoint of ``train_unet``."""
    state = load_file(checkpoint)
    save_file(_half({k[5:]: v for k, v in state.items() if k.startswith("unet.")}), folder / "unet.safetensors")
    text = {k[5:]: v for k, v in state.items() if k.startswith("text.")}
    text["token_ids"] = text.pop(_TOKEN_PREFIX + "ids").int()
    text["token_rows"] = text.pop(_TOKEN_PREFIX + "weight")
    save_file(_half(text), folder / "text.safetensors")


def export_dit(checkpoint: Path, folder: Path) -> None:
    """``dit.safetensors`` of a checkpoint of ``train_dit``: the moving average."""
    state = load_file(checkpoint)
    average = {k.removeprefix(AVERAGE): v for k, v in state.items() if k.startswith(AVERAGE)}
    save_file(_half({k: v for k, v in average.items() if k not in UNUSED}), folder / "dit.safetensors")


def main(arguments: list[str]) -> int:
    """``dev.py train export``: copies what a training folder holds into the pack's weights."""
    parser = argparse.ArgumentParser(prog="dev.py train export")
    parser.add_argument("--out", type=Path, required=True, help="the training folder")
    parser.add_argument("--to", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    options.to.mkdir(parents=True, exist_ok=True)
    if (options.out / "model-ema.safetensors").exists():
        export_model(options.out / "model-ema.safetensors", options.to)
    if (options.out / CHECKPOINT).exists():
        export_dit(options.out / CHECKPOINT, options.to)
    for name in {kind.decoder for kind in KINDS.values()}:
        if (options.out / f"{name}.safetensors").exists():
            save_file(_half(load_file(options.out / f"{name}.safetensors")), options.to / f"{name}.safetensors")
    for name in ("judge.safetensors", "reader.safetensors", "held_out.webp", "held_out.json"):
        if (options.out / name).exists():
            shutil.copy(options.out / name, options.to / name)
    return 0
