"""``dev.py score compose``: LoRA-Composer, with each ingredient off, against what users have today; and T2I-Zero without LoRAs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import comfy.hooks
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import comfy.utils
import node_helpers
import torch

from ..host.composer import ComposeGuider
from ..host.concept import Concept, make_concept
from ..host.lora import read_lora
from ..host.phrases import correct_objects, encode_with_objects
from ..host.suppression import with_suppression
from ..methods.compose.settings import Compose, Weights
from ..methods.regions import Box, Region, coverage
from . import vocabulary
from .board import Board
from .concept_scenes import SEEDS, STAND_INS, Tally, Task, lora_of, tasks, tasks_of_three
from .judge import THIRDS, WHOLE, Judge
from .sampling import CFG, STEPS, Painter, encode, noise_for
from .score_model import save_sheet

FULL = Compose(token_lora=False)
WHOLE_LORA = Compose()
COMPOSERS: dict[str, Compose] = {
    "composer": FULL,
    "composer + token LoRA": WHOLE_LORA,
    "composer, no isolation": dataclasses.replace(WHOLE_LORA, isolation=False),
    "composer, no first noise": dataclasses.replace(WHOLE_LORA, reinit="off"),
    "composer, copied noise": dataclasses.replace(WHOLE_LORA, reinit="copy"),
    "composer, no gradient": dataclasses.replace(WHOLE_LORA, enhancement=0.0),
    "composer, no fill loss": dataclasses.replace(WHOLE_LORA, weights=Weights(fill=0.0)),
    "composer, no region loss": dataclasses.replace(WHOLE_LORA, weights=Weights(region=0.0)),
    "composer, reference stop": dataclasses.replace(WHOLE_LORA, stop="rise"),
}
AUTOMATIC = "composer automatic"
BASELINES = ("stacked LoRAs", "host hooks")


def regions_of(task: Task) -> list[Region]:
    """The boxes of the layout."""
    return [Region(c, (Box(*box),)) for c, box in zip(task.concepts, task.layout.fractions(), strict=True)]


class Maker:
    """Draws a task in every way of the board."""

    def __init__(self) -> None:
        self.painter, self.judge = Painter(), Judge.load()
        self.tally = Tally(self.judge)

    @functools.cache  # noqa: B019  one object a board
    def concept(self, name: str, prompt: str) -> Concept:
        return make_concept(read_lora(lora_of(name)), 1.0, self.painter.clip, prompt, name, "")

    def sample(self, guider: Any, task: Task, model: Any) -> torch.Tensor:
        noise = noise_for(list(task.seeds), task.layout.width)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
        sampler = comfy.samplers.sampler_object("euler")
        latents = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)
        return self.painter.vae.decode(latents).float()

    def counted(self, model: Any) -> Any:
        """A clone whose calls and rows are counted."""
        model = model.clone()

        def count(executor, x, *args, **kwargs):
            self.tally.calls, self.tally.rows = self.tally.calls + 1, self.tally.rows + len(x)
            return executor(x, *args, **kwargs)

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "score", count)
        return model

    def host(self, task: Task, model: Any, positive: list, negative: list) -> torch.Tensor:
        model = self.counted(model)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(CFG)
        return self.sample(guider, task, model)

    def stacked(self, task: Task) -> torch.Tensor:
        """All LoRAs on one model, one prompt that names them at their places."""
        model, clip = self.painter.model, self.painter.clip
        for name in task.concepts:
            state = comfy.utils.load_torch_file(lora_of(name), safe_load=True)
            model, clip = comfy.sd.load_lora_for_models(model, clip, state, 1.0, 1.0)
        return self.host(task, model, encode(clip, task.true_prompt()), encode(clip, ""))

    def hooks(self, task: Task) -> torch.Tensor:
        """The host's own way: a masked prompt with a LoRA hook for each concept, the scene as default."""
        positive = []
        for number, (name, region) in enumerate(zip(task.concepts, regions_of(task), strict=True)):
            state = comfy.utils.load_torch_file(lora_of(name), safe_load=True)
            hook = comfy.hooks.create_hook_lora(state, 1.0, 1.0)
            clip = self.painter.clip.clone()
            clip.patcher.forced_hooks = hook
            entry = clip.encode_from_tokens_scheduled(clip.tokenize(scene_with(task, number)))
            mask = region.raster(128, task.layout.width)[None]
            positive += node_helpers.conditioning_set_values(entry, {"mask": mask, "mask_strength": 1.0, "hooks": hook})
        scene = encode(self.painter.clip, task.base_prompt())
        positive += node_helpers.conditioning_set_values(scene, {"default": True})
        return self.host(task, self.painter.model, positive, encode(self.painter.clip, ""))

    def compose(self, settings: Compose, automatic: bool, task: Task) -> torch.Tensor:
        model, drawn = self.counted(self.painter.model), regions_of(task)
        prompts = [scene_with(task, n) for n in range(len(task.concepts))]
        concepts = [self.concept(name, prompt) for name, prompt in zip(task.concepts, prompts, strict=True)]
        positive, negative = encode(self.painter.clip, task.base_prompt()), encode(self.painter.clip, "")
        covered = None if automatic else partial(coverage, drawn)
        return self.sample(ComposeGuider(model, positive, negative, CFG, concepts, covered, settings), task, model)

    def conduct(self, task: Task) -> torch.Tensor:
        """Concept Conductor with its own defaults and the same boxes, no layout reference."""
        from ..host.conductor import ConductGuider
        from ..methods.conduct.settings import Conduct

        model, drawn = self.counted(self.painter.model), regions_of(task)
        concepts = [self.concept(name, task.concept_prompt(name)) for name in task.concepts]
        positive, negative = encode(self.painter.clip, task.base_prompt()), encode(self.painter.clip, "")
        guider = ConductGuider(model, positive, negative, CFG, concepts, partial(coverage, drawn), Conduct())
        return self.sample(guider, task, model)

    def methods(self) -> dict[str, Callable[[Task], torch.Tensor]]:
        """Every row with LoRAs, by name."""
        found: dict[str, Callable[[Task], torch.Tensor]] = {"stacked LoRAs": self.stacked, "host hooks": self.hooks}
        found |= {name: partial(self.compose, settings, False) for name, settings in COMPOSERS.items()}
        found[AUTOMATIC] = partial(self.compose, WHOLE_LORA, True)
        try:
            from ..host import conductor  # noqa: F401
        except ImportError:
            return found
        return found | {"conductor": self.conduct}


def scene_with(task: Task, number: int) -> str:
    """The scene with one of its concepts at its place, and nouns the base model knows at the others."""
    return task.scene(tuple(c if n == number else STAND_INS[c] for n, c in enumerate(task.concepts)))


def score_row(maker: Maker, draw: Callable[[Task], torch.Tensor], todo: Sequence[Task], sheet: Path | None) -> dict:
    """The metrics of one row over some tasks."""
    maker.tally = Tally(maker.judge)
    rows = []
    with torch.inference_mode():
        for number, task in enumerate(todo, 1):
            pictures = draw(task)
            maker.tally.count(task, pictures)
            rows.append(pictures)
            if number % 10 == 0:
                print(f"    {number} of {len(todo)} tasks", flush=True)
    for line in maker.tally.wrong:
        print(f"    not as asked: {line}", flush=True)
    if sheet is not None:
        save_sheet(rows, sheet)
    return maker.tally.metrics()


def objects_present(maker: Maker, zero: bool, count: int, seeds: list[int]) -> dict:
    """Prompts of three objects, and of one, with and without T2I-Zero: the share of pictures in which all are named right."""
    rng, painter = Random(11), maker.painter
    backgrounds = list(vocabulary.BACKGROUNDS)
    shares: dict[int, list[bool]] = {3: [], 1: []}
    started = time.monotonic()
    model = with_suppression(painter.model, 1.0, 0.0, 0.25) if zero else painter.model
    for number in range(count):
        for size, boxes in ((3, THIRDS), (1, (WHOLE,))):
            scene = vocabulary.scene_of(tuple(rng.sample(vocabulary.CONCEPTS, size)), backgrounds[number % 8])
            positive = encode_with_objects(painter.clip, scene.caption(), list(scene.concepts))
            if zero:
                positive = correct_objects(positive, 0.2, 3, 0.6)
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(positive, encode(painter.clip, ""))
            guider.set_cfg(CFG)
            noise = noise_for(seeds, 192 if size == 3 else 128)
            sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
            sampler = comfy.samplers.sampler_object("euler")
            with torch.inference_mode():
                latents = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)
                pictures = painter.vae.decode(latents).float()
            seen = list(zip(*([v.name for v in maker.judge.look(pictures, box)] for box in boxes), strict=True))
            shares[size] += [sorted(row) == sorted(scene.concepts) for row in seen]
    return {
        "all_present": statistics.mean(shares[3]), "single_right": statistics.mean(shares[1]), "n": len(shares[3]),
        "seconds_sampling": time.monotonic() - started,
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    parser = argparse.ArgumentParser(prog="dev.py score compose")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="4 pairs in 1 layout, 1 seed, 2 triples, 4 prompts without LoRA"
    )
    parser.add_argument("--pairs", type=int, help="how many pairs instead")
    parser.add_argument("--sheets", type=Path, help="a folder for sheets of all pictures")
    parser.add_argument("--method", action="append", help="only this row (again for more)")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    maker, board = Maker(), Board("compose", list(SEEDS))
    pairs = options.pairs or (4 if options.quick else 12)
    two = list(tasks(pairs, 1, 1) if options.quick else tasks(pairs))
    three = list(tasks_of_three(2, 1) if options.quick else tasks_of_three())
    for name, draw in maker.methods().items():
        if options.method and name not in options.method:
            continue
        with board.row(name) as metrics:
            metrics |= score_row(maker, draw, two, options.sheets and options.sheets / f"{name}.png")
        if name in ("composer, copied noise", "composer, reference stop"):
            continue
        with board.row(f"{name}, three") as metrics:
            metrics |= score_row(maker, draw, three, options.sheets and options.sheets / f"{name}, three.png")
    for name, zero in (("plain prompt", False), ("t2i-zero", True)):
        if not options.method or name in options.method:
            with board.row(name) as metrics:
                metrics |= objects_present(maker, zero, 4 if options.quick else 24, [100, 101])
    board.write(options.json)
    return 0
