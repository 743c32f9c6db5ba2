"""``dev.py bench compose|conduct --model flux|zimage|qwen|krea2``: several concepts where text and picture meet.

At the token counts of a picture of 1024 × 1024: 4096 of the image, and 256 of each prompt.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.samplers
import node_helpers
import torch

from ..host.compose.joint import JointGuider
from ..host.conduct.path_guider import PathGuider
from ..host.engine.base_prompts import BasePrompts
from ..host.lora.concept import Concept
from ..methods.compose.settings import Compose
from ..methods.masks import MaskPyramid
from .host_hooks import hooked_in
from .random_models import boxes
from .random_transformers import TRANSFORMERS, random_lora, random_prompt, random_transformer
from .timing import in_turn

CELLS, TOKENS = 128, 256  # of a latent's side; of a prompt


class TransformerBench:
    """One step at cfg 1 of everything that is compared, for N concepts on one model."""

    def __init__(self, name: str, concepts: int, cells: int = CELLS, tokens: int = TOKENS) -> None:
        self.model, self.count, self.cells = random_transformer(name), concepts, cells
        self.base, *own = (random_prompt(name, tokens, seed) for seed in range(1 + concepts))
        self.concepts = [
            Concept(f"c{n}", "", random_lora(self.model.model, n), 1.0, words, words) for n, words in enumerate(own)
        ]

    def _sample(self, guider: comfy.samplers.CFGGuider) -> None:
        latents = self.model.model.latent_format
        shape = (1, latents.latent_channels, *(1,) * (latents.latent_dimensions - 2), self.cells, self.cells)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.5])
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)

    def _plain(self, positive: list) -> Callable[[], None]:
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(positive, self.base)
        guider.set_cfg(1.0)
        return lambda: self._sample(guider)

    def plain(self) -> Callable[[], None]:
        """The base prompt alone."""
        return self._plain(self.base)

    def composer(self) -> Callable[[], None]:
        """LoRA Composer with a box a concept."""
        prompts = BasePrompts(self.base, self.base, 1.0)
        guider = JointGuider(self.model, prompts, self.concepts, partial(boxes, self.count), Compose(reinit="off"))
        return lambda: self._sample(guider)

    def conductor(self) -> Callable[[], None]:
        """Concept Conductor with a box a concept."""
        prompts = BasePrompts(self.base, self.base, 1.0)
        guider = PathGuider(self.model, prompts, self.concepts, lambda h, w: MaskPyramid(boxes(self.count, h, w)))
        return lambda: self._sample(guider)

    def hooks(self) -> Callable[[], None]:
        """The host's LoRA hooks with masks, and the base prompt where none is."""
        positive: list[Any] = []
        for concept, mask in zip(self.concepts, boxes(self.count, self.cells, self.cells), strict=True):
            own = hooked_in(concept.lora.tensors, mask)
            positive += node_helpers.conditioning_set_values(concept.positive, own)
        return self._plain(positive + node_helpers.conditioning_set_values(self.base, {"default": True}))


OURS = {"compose": TransformerBench.composer, "conduct": TransformerBench.conductor}
"""By family of benches."""


def print_costs(family: str, name: str, bench: TransformerBench, runs: int) -> None:
    """Prints seconds over those of plain sampling, all run in turn, and how far memory grows."""
    actions = {"plain sampling": bench.plain(), "ours": OURS[family](bench), "host hooks": bench.hooks()}
    grown, times = in_turn(actions, runs)
    parts = []
    for title in ("ours", "host hooks"):
        ratios = [own / plain for own, plain in zip(times[title], times["plain sampling"], strict=True)]
        reach = f"{min(ratios):.2f} to {max(ratios):.2f}"
        parts.append(f"{title} {statistics.median(ratios):.2f} × plain sampling ({reach})")
    parameters = sum(p.numel() for p in bench.model.model.diffusion_model.parameters())
    print(
        f"{name} of {parameters / 1e9:.2f} B parameters, {bench.count} concepts, cfg 1: {', '.join(parts)}, {runs} "
        f"runs; growth in MB: {', '.join(f'{title} {mb:.0f}' for title, mb in grown.items())}",
        flush=True,
    )


def run(family: str, name: str, counts: Sequence[int], runs: int, cells: int = CELLS, tokens: int = TOKENS) -> None:
    """Prints a line for each number of concepts."""
    for count in counts:
        print_costs(family, name, TransformerBench(name, count, cells, tokens), runs)


NAMES = tuple(TRANSFORMERS)
