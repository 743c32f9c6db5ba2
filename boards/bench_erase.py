"""``dev.py bench erase``: what solving and applying an edit costs at the sizes of real models, with random weights.

Only the cross-attention weights of a UNet are made, or what reads the text first on a transformer, under their real
names, in fp16. The text encoder is replaced by
random rows of the right width. Seconds are of the solve (rows to edit) and of applying it (edit to patches).
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import time
from types import SimpleNamespace
from typing import Any

import comfy.model_patcher
import torch

from ..host.erase.apply import WEIGHTS, apply_edit
from ..host.erase.solve import SolveRequest, solve_erasure
from ..host.erase.weights import text_keys
from ..methods.erase.rows import PromptTokens
from ..methods.erase.solvers import SOLVERS
from ..methods.erase.spec import SPAN_TO_END, TEMPLATES, Erased, Preserved, filled_template
from .timing import forget_peak, memory

PRESERVES = 200

# (context width, [(block, transformer depths, channels)])
SIZES: dict[str, tuple[int, list[tuple[str, int, int]]]] = {
    "SD 1.5": (
        768,
        [
            *[(f"input_blocks.{n}.1", 1, c) for n, c in ((1, 320), (2, 320), (4, 640), (5, 640), (7, 1280), (8, 1280))],
            ("middle_block.1", 1, 1280),
            *[
                (f"output_blocks.{n}.1", 1, c)
                for n, c in zip(range(3, 12), [1280] * 3 + [640] * 3 + [320] * 3, strict=True)
            ],
        ],
    ),
    "SDXL": (
        2048,
        [
            *[(f"input_blocks.{n}.1", d, c) for n, d, c in ((4, 2, 640), (5, 2, 640), (7, 10, 1280), (8, 10, 1280))],
            ("middle_block.1", 10, 1280),
            *[
                (f"output_blocks.{n}.1", d, c)
                for n, d, c in zip(range(6), [10] * 3 + [2] * 3, [1280] * 3 + [640] * 3, strict=True)
            ],
        ],
    ),
}

# what reads the text first on a transformer: the network's class, the layer, the width of the text and of the layer
ENTRIES: dict[str, tuple[str, str, int, int]] = {
    "Flux": ("Flux", "txt_in", 4096, 3072),
    "Qwen-Image": ("QwenImageTransformer2DModel", "txt_in", 3584, 3072),
    "Flux 2 Klein": ("Flux", "txt_in", 7680, 3072),
    "Flux 2": ("Flux", "txt_in", 15360, 6144),
}


def text_entry_only(size: str) -> tuple[Any, int]:
    """A MODEL with the first text layer of that transformer and nothing else, and the width of its text."""
    kind, layer, width, channels = ENTRIES[size]
    root = torch.nn.Module()
    root.add_module("diffusion_model", type(kind, (torch.nn.Module,), {})())
    _put(root, f"diffusion_model.{layer}", width, channels, "cpu")
    return comfy.model_patcher.ModelPatcher(root, torch.device("cpu"), torch.device("cpu")), width


def cross_attention_only(size: str, device: str = "cpu") -> Any:
    """A MODEL with the key and value projections of that size and nothing else; on ``meta`` without their memory."""
    width, blocks = SIZES[size]
    root = torch.nn.Module()
    for place, depth, channels in blocks:
        for block in range(depth):
            for to in ("to_k", "to_v"):
                _put(root, f"diffusion_model.{place}.transformer_blocks.{block}.attn2.{to}", width, channels, device)
    root.model_config = SimpleNamespace(unet_config={"context_dim": width})  # type: ignore[assignment]
    return comfy.model_patcher.ModelPatcher(root, torch.device("cpu"), torch.device("cpu"))


def _put(root: torch.nn.Module, path: str, width: int, channels: int, device: str) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, torch.nn.Module())
        root = getattr(root, parent)
    layer = torch.nn.Linear(width, channels, bias=False, dtype=torch.float16, device="meta").to_empty(device=device)
    torch.nn.init.normal_(layer.weight, std=0.03)
    root.add_module(name, layer.requires_grad_(False))


class RandomEncoder:
    """Rows of norm 27 that share most of their direction, the same for the same text.

    Prompts have as many as a CLIP's, or as a T5's, whose padding is not erased (``padded``).
    """

    def __init__(self, width: int, *, padded: bool = False) -> None:
        self.width, self.padded = width, padded
        self.known: dict[str, torch.Tensor] = {}
        self.shared = torch.randn(1, width, generator=torch.Generator().manual_seed(0))

    def __call__(self, text: str, phrase: str = "") -> PromptTokens:
        if text not in self.known:
            self.known[text] = self._rows(text)
        first = 0 if self.padded else 1
        end = first + len(text.split())
        start, until = end - len(phrase.split()), end + 1 if self.padded else None
        return PromptTokens(self.known[text], start, end, end, first=first, until=until)

    def parts(self, text: str) -> list[PromptTokens]:
        return [self(text)]

    def _rows(self, text: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
        count = 256 if self.padded else 77
        rows = 0.9 * self.shared + 0.44 * torch.randn(count, self.width, generator=torch.Generator().manual_seed(seed))
        return rows * 27 / rows.norm(dim=1, keepdim=True)


def _mb(figure: float | None, before: float | None = 0.0) -> str:
    return "unknown" if figure is None or before is None else f"{figure - before:.0f} MB"


def main(arguments: list[str]) -> int:
    """Prints a line for each size and solver."""
    parser = argparse.ArgumentParser(prog="dev.py bench erase")
    parser.add_argument("--size", choices=[*SIZES, *ENTRIES], action="append")
    parser.add_argument("--solver", choices=list(SOLVERS), action="append")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    kept = Preserved(tuple(f"kept prompt {n}" for n in range(PRESERVES)), 1.0)
    print(f"one concept in {len(TEMPLATES['object'])} sentences, {PRESERVES} kept prompts", flush=True)
    for size in options.size or [*SIZES, *ENTRIES]:
        model, width = text_entry_only(size) if size in ENTRIES else (cross_attention_only(size), SIZES[size][0])
        encode = RandomEncoder(width, padded=size in ENTRIES)
        print(f"{size}: {len(text_keys(model, ('k', 'v')))} weights, {_mb(memory('VmRSS'))} with the model", flush=True)
        for solver in options.solver or SOLVERS:
            _line(model, encode, solver, kept)
    return 0


@torch.inference_mode()
def _line(model: Any, encode: Any, solver: str, kept: Preserved) -> None:
    erased = Erased("concept", "anchor", TEMPLATES["object"], SPAN_TO_END, 1.0)
    for text in ("", *kept.prompts, *(filled_template(t, w) for t in erased.templates for w in ("concept", "anchor"))):
        encode(text)  # making up rows is not measured
    forget_peak()
    before, started, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    edit = solve_erasure(model, SimpleNamespace(layer_idx=None), erased, kept, SolveRequest(solver), encode)
    solved, cpu = time.perf_counter(), time.process_time() - cpu
    apply_edit(model, edit, 1.0, WEIGHTS)
    applied = time.perf_counter()
    print(
        f"  {solver:<16} solve {solved - started:6.1f} s ({cpu:5.1f} s of processor)  "
        f"apply {applied - solved:5.1f} s  rank {edit.report['rank']:3d}  "
        f"peak beyond the model {_mb(memory('VmHWM'), before)}",
        flush=True,
    )
