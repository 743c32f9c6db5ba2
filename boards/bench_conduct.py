"""``dev.py bench conduct``: what a step of Concept Conductor costs, against bare rows and against the host's hooks."""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.sd
import node_helpers
import torch

from ..demo.architecture import UNET
from ..demo.loader import load_demo_model
from ..host.conduct.path_guider import PathGuider
from ..host.conduct.paths import Paths
from ..host.engine.base_prompts import BasePrompts
from ..host.lora.concept import Concept
from ..host.lora.files import LoraFile
from ..methods.masks import MaskPyramid
from ..methods.regions import Box, Region
from . import transformer_bench
from .host_hooks import hooked_in
from .random_models import SD15_UNET, random_model
from .timing import in_turn

RANK = 4
CELLS = 16  # of a latent's side: a small canvas, or the full-size model takes minutes a step on a CPU
TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0")  # what an ED-LoRA changes


def random_lora(model: Any, seed: int) -> LoraFile:
    """Factors for every projection of every attention."""
    tensors, generator = {}, torch.Generator().manual_seed(seed)
    for path, module in model.diffusion_model.named_modules():
        if path.endswith(TARGETS):
            out, inner = module.weight.shape
            name = f"lora_unet_{path.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, inner, generator=generator) * 0.01
            tensors[f"{name}.lora_up.weight"] = torch.randn(out, RANK, generator=generator) * 0.01
    return LoraFile(f"random {seed}", tensors)


class ConductBench:
    """One step of everything that is compared, for N concepts on one model."""

    def __init__(self, patcher: Any, channels: int, concepts: int, cells: int) -> None:
        self.patcher, self.count = patcher, concepts
        self.x = torch.randn(1, 4, cells, cells, generator=torch.Generator().manual_seed(1))
        self.sigmas = torch.tensor([2.0, 1.0])  # one step
        text = [[[torch.randn(1, 77, channels, generator=torch.Generator().manual_seed(n)), {}]] for n in range(2)]
        self.positive, self.negative = text
        self.concepts = [Concept(f"c{n}", "", random_lora(patcher.model, n), 1.0, *text) for n in range(concepts)]
        self.regions = [Region("", (Box(n / concepts, 0, 1 / concepts, 1),)) for n in range(concepts)]

    def _sample(self, guider: comfy.samplers.CFGGuider) -> None:
        sampler = comfy.samplers.sampler_object("euler")
        guider.sample(self.x, torch.zeros_like(self.x), sampler, self.sigmas, disable_pbar=True, seed=1)

    def _plain(self, model: Any, positive: list, negative: list) -> comfy.samplers.CFGGuider:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(5.0)
        return guider

    def ours(self) -> Callable[[], None]:
        """The paths; the factors are read once, as in a sampling of many steps."""
        base = BasePrompts(self.positive, self.negative, 5.0)
        guider = PathGuider(self.patcher, base, self.concepts, lambda h, w: MaskPyramid.of(self.regions, h, w))
        read, first = guider.new_paths, list[Paths]()

        def with_known_factors(x: torch.Tensor) -> Paths:
            if not first:
                first.append(read(x))
            return first[0].with_conds(guider.path_conds())

        guider.new_paths = with_known_factors  # type: ignore[method-assign]
        return lambda: self._sample(guider)

    def bare(self) -> Callable[[], None]:
        """As many rows in one call, without LoRAs or masks."""
        guider = self._plain(self.patcher, self.positive * (1 + self.count), self.negative * (1 + self.count))
        return lambda: self._sample(guider)

    def one_by_one(self) -> Callable[[], None]:
        """N + 1 models, patched in turn."""
        models = [self.patcher]
        models += [
            comfy.sd.load_lora_for_models(self.patcher, None, dict(c.lora.tensors), 1.0, 0.0)[0] for c in self.concepts
        ]
        guiders = [self._plain(model, self.positive, self.negative) for model in models]

        def step() -> None:
            for guider in guiders[1:] + guiders[:1]:
                self._sample(guider)

        return step

    def hooks(self) -> Callable[[], None]:
        """The host's LoRA hooks with masks, and the plain prompt where none is."""
        sides: list[list] = [[], []]
        for concept, region in zip(self.concepts, self.regions, strict=True):
            own = hooked_in(concept.lora.tensors, region.raster(*self.x.shape[-2:]))
            for side, text in zip(sides, (self.positive, self.negative), strict=True):
                side += node_helpers.conditioning_set_values(text, own)
        for side, text in zip(sides, (self.positive, self.negative), strict=True):
            side += text
        guider = self._plain(self.patcher, *sides)
        return lambda: self._sample(guider)


def compare(name: str, bench: ConductBench, runs: int) -> None:
    """Prints the ratio of each to ours' seconds, run in turn: all meet the same machine."""
    steps = {
        "ours": bench.ours(),
        "bare rows": bench.bare(),
        "one by one": bench.one_by_one(),
        "host hooks": bench.hooks(),
    }
    peaks, times = in_turn(steps, runs)
    ours = times["ours"]
    over = statistics.median(o / b for o, b in zip(ours, times["bare rows"], strict=True))
    line = f"{name}, N = {bench.count}: ours {over:.2f} × the bare rows"
    for title in ("one by one", "host hooks"):
        ratio = statistics.median(t / o for t, o in zip(times[title], ours, strict=True))
        line += f", {title} {ratio:.2f} × ours"
    print(line + "; growth in MB: " + ", ".join(f"{t} {p:.0f}" for t, p in peaks.items()), flush=True)


@torch.inference_mode()
def main(arguments: list[str]) -> int:
    """Prints a line for each number of concepts on each model."""
    parser = argparse.ArgumentParser(prog="dev.py bench conduct")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--concepts", type=int, action="append", help="only this number (again for more); else 1 to 6")
    models = ("demo", "sd15", *transformer_bench.NAMES)
    parser.add_argument("--model", choices=models, action="append", help="only this one; default: demo and sd15")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    for name in options.model or ("demo", "sd15"):
        counts = options.concepts or range(1, 7)
        if name in transformer_bench.NAMES:
            transformer_bench.run("conduct", name, counts, options.runs)
            continue
        patcher = load_demo_model()[0] if name == "demo" else random_model(SD15_UNET)
        channels = (UNET if name == "demo" else SD15_UNET)["context_dim"]
        for count in counts:
            compare(name, ConductBench(patcher, channels, count, CELLS), options.runs)
    return 0
