"""``dev.py bench compose``: what LoRA-Composer and T2I-Zero cost, against plain sampling in the same run."""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.samplers
import torch

from ..demo import vocabulary
from ..demo.sampling import CFG, DemoSampler, encode
from ..host import keys
from ..host.compose.guider import ComposeGuider
from ..host.compose.suppression import with_suppression
from ..host.engine.attention import CROSS, find_sites
from ..host.engine.base_prompts import BasePrompts
from ..host.lora.concept import Concept, make_concept
from ..host.lora.files import LoraFile, read_lora
from ..host.registry import unet_of
from ..methods.compose.settings import Compose
from ..methods.compose.similarity import ObjectPositions
from . import object_prompts, transformer_bench
from .concept_tasks import lora_of
from .random_models import SD15_UNET, boxes, random_model
from .timing import peak_of, ratios

RANK, TOKENS, CHANNELS = 16, 77, 768  # as SD 1.5 has them
_LAYERS = (
    *(f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)
"""What a LoRA of a trainer usually has: all linear layers of the transformer blocks."""
CASES = {
    "without gradient": Compose(enhancement=0.0, reinit="off", token_lora=False),
    "without gradient, token LoRA": Compose(enhancement=0.0, reinit="off"),
    "full": Compose(stop="rise"),
}


def random_concept(model: Any, number: int, channels: int) -> Concept:
    """A concept with random factors of rank 16 on the attentions and feed-forwards."""
    generator, tensors = torch.Generator().manual_seed(number), {}
    for path, module in unet_of(model.model).named_modules():
        if path.endswith(_LAYERS):
            out, into = module.weight.shape[:2]
            tensors[f"diffusion_model.{path}.lora_down.weight"] = torch.randn(RANK, into, generator=generator) * 0.02
            tensors[f"diffusion_model.{path}.lora_up.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    entry = [[torch.randn(1, TOKENS, channels, generator=generator), {keys.PHRASE_POSITIONS: (5,)}]]
    return Concept(f"{number}", "it", LoraFile(f"{number}", tensors), 1.0, entry, entry)


@dataclass(frozen=True)
class ComposeBench:
    """One model with concepts to put into it. ``size``: height and width of the latent in cells."""

    name: str
    model: Any
    concepts: Sequence[Concept]
    prompt: list
    size: tuple[int, int]
    steps: int
    runs: int

    def sample(self, make: Callable[[], comfy.samplers.CFGGuider]) -> None:
        noise = torch.randn(1, 4, *self.size, generator=torch.Generator().manual_seed(1))
        sigmas = comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "normal", self.steps)
        sampler = comfy.samplers.sampler_object("euler")
        make().sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)

    def plain(self, patcher: Any = None, positive: list | None = None) -> comfy.samplers.CFGGuider:
        guider = comfy.samplers.CFGGuider(patcher or self.model)
        guider.set_conds(positive or self.prompt, self.prompt)
        guider.set_cfg(CFG)
        return guider

    def suppressed(self) -> comfy.samplers.CFGGuider:
        """T2I-Zero's suppression of three objects."""
        model = with_suppression(self.model, 1.0, 0.0, object_prompts.ZeroSettings().end)
        objects = ObjectPositions(((2,), (5,), (8,)), ((1, 9),))
        return self.plain(model, [[self.prompt[0][0], {**self.prompt[0][1], keys.OBJECT_POSITIONS: objects}]])

    def composed(self, count: int, settings: Compose) -> ComposeGuider:
        coverage = partial(boxes, count)
        return ComposeGuider(
            self.model, BasePrompts(self.prompt, self.prompt, CFG), self.concepts[:count], coverage, settings
        )

    def say(self, what: str, make: Callable[[], comfy.samplers.CFGGuider]) -> None:
        """Prints the median and the range of the ratio, and how far memory grows beyond what plain sampling needs."""
        plain, other = partial(self.sample, self.plain), partial(self.sample, make)
        measured = ratios(plain, other, self.runs)
        grown = peak_of(other) - peak_of(plain)
        print(
            f"{self.name}, {what}: {statistics.median(measured):.2f} × plain sampling ({min(measured):.2f} to "
            f"{max(measured):.2f}, {self.runs} pairs, {self.steps} steps); memory + {grown:.0f} MB",
            flush=True,
        )


def cached_bytes(model: Any) -> int:
    """Size of one concept's keys and values for the positive and the negative, which are kept for a whole run."""
    unet = unet_of(model.model)
    widths = [site.module(unet).to_k.out_features for site in find_sites(unet, CROSS)]
    return 2 * 2 * TOKENS * sum(widths) * torch.float32.itemsize


def print_costs(bench: ComposeBench, counts: Sequence[int], cases: Sequence[str]) -> None:
    """Prints everything about one model."""
    print(f"{bench.name}: cached keys and values {cached_bytes(bench.model) / 1e6:.1f} MB a concept", flush=True)
    bench.say("t2i-zero", bench.suppressed)
    for count in counts:
        for case in cases:
            bench.say(f"{count} concepts {case}", partial(bench.composed, count, CASES[case]))


@torch.inference_mode()
def main(arguments: list[str]) -> int:
    """Prints the median and range of each ratio for 1 to 8 concepts, with the demo model and at the size of SD 1.5."""
    parser = argparse.ArgumentParser(prog="dev.py bench compose")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of the demo model; SD 1.5 takes 2")
    models = ["demo", "sd15", *transformer_bench.NAMES]
    parser.add_argument("--model", choices=models, action="append", help="only this one; default: demo and sd15")
    parser.add_argument("--concepts", type=int, action="append", help="only this many (again for more)")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this one (again for more)")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    counts, cases = options.concepts or [1, 2, 4, 8], options.case or list(CASES)
    for name in options.model or ["demo", "sd15"]:
        if name in transformer_bench.NAMES:
            transformer_bench.run("compose", name, counts, options.runs)
            continue
        bench = demo_bench(options.steps, options.runs) if name == "demo" else sd15_bench(max(counts), options.runs)
        print_costs(bench, counts, cases)
    return 0


def demo_bench(steps: int, runs: int) -> ComposeBench:
    """The demo model with all its LoRAs."""
    demo = DemoSampler()
    concepts = [make_concept(read_lora(lora_of(c)), 1.0, demo.clip, f"a {c}", c, "") for c in vocabulary.LORA_CONCEPTS]
    return ComposeBench("demo model", demo.model, concepts, encode(demo.clip, "a cat"), (16, 24), steps, runs)


def sd15_bench(concepts: int, runs: int) -> ComposeBench:
    """A random model of SD 1.5's size with so many random LoRAs."""
    model = random_model(SD15_UNET)
    made = [random_concept(model, n, CHANNELS) for n in range(concepts)]
    prompt = [[torch.randn(1, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0)), {}]]
    return ComposeBench("SD 1.5 size, 512 × 512", model, made, prompt, (64, 64), 2, runs)
