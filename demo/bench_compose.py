"""``dev.py bench compose``: what LoRA-Composer and T2I-Zero cost, against plain sampling in the same run."""

from __future__ import annotations

import argparse
import logging
import math
import resource
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models_base
import torch

from ..host.attention import unet_of
from ..host.composer import ComposeGuider
from ..host.concept import Concept, make_concept
from ..host.lora import LoraFile, read_lora
from ..host.phrases import ENTRY, OBJECTS
from ..host.suppression import with_suppression
from ..methods.compose.settings import Compose
from ..methods.compose.similarity import Words
from . import objects_present, vocabulary
from .bench_anagram import ratios
from .concept_scenes import lora_of
from .sampling import CFG, Painter, encode

SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1, "num_heads": 8,
    "num_head_channels": -1, "context_dim": 768, "use_spatial_transformer": True, "use_linear_in_transformer": False,
    "adm_in_channels": None, "use_temporal_attention": False, "legacy": False,
}  # fmt: skip
RANK = 16
_CROSS = ("attn2.to_k", "attn2.to_v", "attn2.to_out.0", "attn1.to_q", "attn2.to_q", "ff.net.2")
CASES = {
    "without gradient": Compose(enhancement=0.0, reinit="off", token_lora=False),
    "without gradient, token LoRA": Compose(enhancement=0.0, reinit="off"),
    "full": Compose(stop="rise"),
}


class _SD15(comfy.supported_models_base.BASE):
    unet_config = SD15
    latent_format = comfy.latent_formats.SD15
    memory_usage_factor = 1.0

    def model_type(self, state_dict: Any, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.EPS


def random_sd15() -> Any:
    """A UNet of SD 1.5's size with random weights: time does not depend on what they say."""
    with torch.inference_mode(False), torch.no_grad():
        config = _SD15(dict(SD15))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "", device="cpu")
        for parameter in model.diffusion_model.parameters():
            parameter.normal_(0, 0.02)
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def random_concept(model: Any, number: int, channels: int) -> Concept:
    """A concept with random factors of rank 16 on the attentions and feed-forwards."""
    generator, tensors = torch.Generator().manual_seed(number), {}
    for path, module in unet_of(model.model).named_modules():
        if path.endswith(_CROSS):
            out, into = module.weight.shape
            tensors[f"diffusion_model.{path}.lora_down.weight"] = torch.randn(RANK, into, generator=generator) * 0.02
            tensors[f"diffusion_model.{path}.lora_up.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    entry = [[torch.randn(1, 77, channels, generator=generator), {ENTRY: (5,)}]]
    return Concept(f"{number}", "it", LoraFile(f"{number}", tensors), 1.0, entry, entry)


def boxes(count: int, height: int, width: int) -> torch.Tensor:
    """That many boxes side by side, in two rows from five on, over two thirds of the canvas."""
    rows = 1 if count < 5 else 2
    columns = math.ceil(count / rows)
    covered = torch.zeros(count, height, width)
    for n in range(count):
        row, column = n // columns, n % columns
        top, left = row * height // rows, column * width // columns
        covered[n, top + height // rows // 6 : top + height // rows * 5 // 6, left : left + width // columns] = 1
    return covered


def bench(
    name: str,
    model: Any,
    concepts: list[Concept],
    prompt: list,
    size: tuple[int, int],
    steps: int,
    runs: int,
    counts: list[int],
) -> None:
    """Prints the ratios of one model."""
    noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)

    def sample(make: Callable[[], comfy.samplers.CFGGuider]) -> None:
        sampler = comfy.samplers.sampler_object("euler")
        make().sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)

    def plain(patcher: Any = model, positive: list = prompt) -> comfy.samplers.CFGGuider:
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(positive, prompt)
        guider.set_cfg(CFG)
        return guider

    def composer(count: int, settings: Compose) -> ComposeGuider:
        return ComposeGuider(model, prompt, prompt, CFG, concepts[:count], lambda h, w: boxes(count, h, w), settings)

    def say(what: str, other: Callable[[], comfy.samplers.CFGGuider]) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        measured = ratios(lambda: sample(plain), lambda: sample(other), runs)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(
            f"{name}, {what}: {statistics.median(measured):.2f} × plain sampling ({min(measured):.2f} to {max(measured):.2f}, "
            f"{runs} pairs, {steps} steps; peak memory + {grown:.0f} MB)",
            flush=True,
        )

    marked = [[prompt[0][0], {**prompt[0][1], OBJECTS: Words(((2,), (5,), (8,)), ((1, 9),))}]]
    say("t2i-zero", partial(plain, with_suppression(model, 1.0, 0.0, objects_present.Zero().end), marked))
    for count in counts:
        for case, settings in CASES.items():
            say(f"{count} concepts {case}", partial(composer, count, settings))


@torch.inference_mode()
def main(arguments: list[str]) -> int:
    """Prints the median and the range of the ratio for 1 to 8 concepts, with the demo model and at the size of SD 1.5."""
    parser = argparse.ArgumentParser(prog="dev.py bench compose")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--model", choices=["demo", "sd15"], action="append", help="only this one")
    parser.add_argument("--concepts", type=int, action="append", help="only this many (again for more)")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    counts = options.concepts or [1, 2, 4, 8]
    wanted = options.model or ["demo", "sd15"]
    if "demo" in wanted:
        painter = Painter()
        made = [
            make_concept(read_lora(lora_of(c)), 1.0, painter.clip, f"a {c}", c, "") for c in vocabulary.LORA_CONCEPTS
        ]
        bench(
            "demo model",
            painter.model,
            made,
            encode(painter.clip, "a cat"),
            (16, 24),
            options.steps,
            options.runs,
            counts,
        )
    if "sd15" in wanted:
        model = random_sd15()
        made = [random_concept(model, n, 768) for n in range(max(counts))]
        prompt = [[torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(0)), {}]]
        bench(
            "SD 1.5 size, 512 × 512",
            model,
            made,
            prompt,
            (64, 64),
            max(2, options.steps // 4),
            max(1, options.runs // 3),
            counts,
        )
    return 0
