"""``dev.py score conduct``: how often several concepts stand right in one picture, by Concept Conductor and by what the host has."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import comfy.utils
import node_helpers
import torch

from ..host.concept import Concept, make_concept
from ..host.conductor import ConductGuider
from ..host.layout import LayoutReference
from ..host.lora import read_lora
from ..methods.conduct.settings import Conduct
from ..methods.regions import Box, Region, coverage
from . import vocabulary
from .board import Board
from .concept_scenes import SEEDS, STAND_INS, Tally, Task, found_box, lora_of, tasks, tasks_of_three
from .judge import WHOLE, Judge
from .sampling import CFG, Painter, encode, noise_for
from .score_model import save_sheet

STEPS = 20
CONDUCTOR = Conduct(whole_transformers=True, iterations=1)


@dataclass(frozen=True)
class Variant:
    """One way to conduct: the settings, and whether the reference picture is shown."""

    settings: Conduct = CONDUCTOR
    layout: bool = True


OFF = {"refine_start": 0.0, "refine_end": 0.0}
VARIANTS = {
    "conductor": Variant(),
    "attentions only": Variant(replace(CONDUCTOR, whole_transformers=False)),
    "no alignment": Variant(replace(CONDUCTOR, guidance_weight=0.0)),
    "no refinement": Variant(replace(CONDUCTOR, **OFF)),
    "regions alone": Variant(replace(CONDUCTOR, guidance_weight=0.0, **OFF), layout=False),
    "no injection": Variant(replace(CONDUCTOR, injection_start=1.0, injection_end=0.0)),
}


class Maker:
    """Samples the pictures of a task in one of the ways of the board."""

    def __init__(self) -> None:
        self.painter = Painter()
        self.sigmas = comfy.samplers.calculate_sigmas(
            self.painter.model.get_model_object("model_sampling"), "normal", STEPS
        )
        self.negative = encode(self.painter.clip, "")
        self.concept = cache(self._concept)
        self.object_on = cache(self._object_on)

    def ways(self) -> dict[str, Callable[[Task, Any], Any]]:
        """The guider of each row for a task, on a model."""
        host = {"stacked LoRAs": self.stacked, "host hooks": self.hooked, "area composition": self.areas}
        return host | {
            name: (lambda task, model, variant=variant: self.conducted(task, model, variant))
            for name, variant in VARIANTS.items()
        }

    @torch.inference_mode()
    def make(self, guider_of: Callable[[Task, Any], Any], task: Task, tally: Tally) -> torch.Tensor:
        """The pictures of a task, (seeds, h, w, 3); its model calls go to the tally."""
        model = self.painter.model.clone()

        def count(executor, x, *args, **kwargs):
            tally.calls += 1
            tally.rows += len(x)
            return executor(x, *args, **kwargs)

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "score", count)
        noise = noise_for(list(task.seeds), task.layout.width, 128)
        guider = guider_of(task, model)
        latents = guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object("euler"),
            self.sigmas,
            disable_pbar=True,
            seed=1,
        )
        return self.painter.vae.decode(latents).float()

    def _concept(self, noun: str, prompt: str) -> Concept:
        return make_concept(read_lora(lora_of(noun)), 1.0, self.painter.clip, prompt, vocabulary.article(noun), "")

    def concepts(self, task: Task) -> list[Concept]:
        return [self.concept(c, task.concept_prompt(c)) for c in task.concepts]

    def covered(self, task: Task, height: int, width: int) -> torch.Tensor:
        return coverage([Region("", (Box(*b),)) for b in task.layout.fractions()], height, width)

    def conducted(self, task: Task, model: Any, variant: Variant) -> ConductGuider:
        positive = encode(self.painter.clip, task.base_prompt())
        layout = LayoutReference(positive, self.reference(task)) if variant.layout else None
        return ConductGuider(
            model, positive, self.negative, CFG, self.concepts(task), lambda h, w: self.covered(task, h, w),
            variant.settings, layout,
        )  # fmt: skip

    def reference(self, task: Task) -> torch.Tensor:
        """A collage as the layout: objects the base model knows, in the boxes of the task, as a latent."""
        colour = torch.tensor(vocabulary.BACKGROUNDS[task.background]) / 255
        canvas = colour.expand(128, task.layout.width, 3).clone()
        for concept, (x0, y0, x1, y1) in zip(task.concepts, task.layout.boxes, strict=True):
            thing = self.object_on(STAND_INS[concept], task.background).movedim(-1, 0)[None]
            scaled = torch.nn.functional.interpolate(thing, (y1 - y0, x1 - x0), mode="bilinear", antialias=True)
            canvas[y0:y1, x0:x1] = scaled[0].movedim(0, -1)
        return self.painter.vae.encode(canvas[None])

    def _object_on(self, noun: str, background: str) -> torch.Tensor:
        """A cut-out of one object, (h, w, 3)."""
        picture = self.painter.paint(vocabulary.scene_of((noun,), background).caption(), [3])[0]
        x0, y0, x1, y1 = found_box(picture, WHOLE) or (0, 0, 128, 128)
        return picture[y0:y1, x0:x1]

    def stacked(self, task: Task, model: Any) -> comfy.samplers.CFGGuider:
        """All LoRAs on the model and the text encoder, as a chain of Load LoRA nodes."""
        model, clip = self._with_all(task, model)
        return _guider(model, encode(clip, task.true_prompt()), encode(clip, ""))

    def areas(self, task: Task, model: Any) -> comfy.samplers.CFGGuider:
        """The same with Conditioning (Set Area) for each concept, over the prompt of the whole."""
        model, clip = self._with_all(task, model)
        positive = list(encode(clip, task.true_prompt()))
        for concept, (x, y, w, h) in zip(task.concepts, task.layout.fractions(), strict=True):
            area = {"area": ("percentage", h, w, y, x), "strength": 1.0, "set_area_to_bounds": False}
            positive += node_helpers.conditioning_set_values(encode(clip, task.lone_prompt(concept)), area)
        return _guider(model, positive, encode(clip, ""))

    def hooked(self, task: Task, model: Any) -> comfy.samplers.CFGGuider:
        """The host's LoRA hooks: each concept's prompt with its LoRA and mask, the base prompt where no mask is."""
        positive, negative = [], []
        masks = self.covered(task, 16, task.layout.width // 8)
        for concept, mask in zip(self.concepts(task), masks, strict=True):
            hook = comfy.hooks.create_hook_lora(_state(concept.name), 1.0, 0.0)
            own = {"mask": mask[None], "hooks": hook, "mask_strength": 1.0, "set_area_to_bounds": False}
            positive += node_helpers.conditioning_set_values(concept.positive, own)
            negative += node_helpers.conditioning_set_values(concept.negative, own)
        base = node_helpers.conditioning_set_values(encode(self.painter.clip, task.base_prompt()), {"default": True})
        empty = node_helpers.conditioning_set_values(self.negative, {"default": True})
        return _guider(model, positive + base, negative + empty)

    def _with_all(self, task: Task, model: Any) -> tuple[Any, Any]:
        clip = self.painter.clip
        for concept in task.concepts:
            model, clip = comfy.sd.load_lora_for_models(model, clip, _state(Path(lora_of(concept)).stem), 1.0, 1.0)
        return model, clip


@cache
def _state(name: str) -> dict[str, torch.Tensor]:
    return comfy.utils.load_torch_file(lora_of(name.removeprefix("concepts-demo-")), safe_load=True)


def _guider(model: Any, positive: list, negative: list) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(CFG)
    return guider


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    parser = argparse.ArgumentParser(prog="dev.py score conduct")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="6 pairs in one layout with one seed, one set of three")
    parser.add_argument("--pairs", type=int, default=20, help="how many of the 28 pairs")
    parser.add_argument("--sheets", type=Path, help="a folder for sheets of all pictures")
    parser.add_argument("--method", action="append", help="only this row (again for more)")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    todo = list(tasks(6, 1, 1) if options.quick else tasks(options.pairs))
    three = list(tasks_of_three(1, 1) if options.quick else tasks_of_three())
    board, maker, judge = Board("conduct", list(SEEDS[:1] if options.quick else SEEDS)), Maker(), Judge.load()
    ways = maker.ways()
    plan = [(name, name, todo) for name in options.method or ways]
    if not options.method:
        plan += [(f"{name}, three", name, three) for name in ("host hooks", "conductor")]
    for title, name, some in plan:
        with board.row(title) as metrics:
            tally, rows = Tally(judge), []
            for number, task in enumerate(some, 1):
                rows.append(maker.make(ways[name], task, tally))
                tally.count(task, rows[-1])
                if number % 10 == 0:
                    print(f"    {number} of {len(some)} scenes", flush=True)
            metrics |= tally.metrics()
        for line in tally.wrong:
            print(f"    not as asked: {line}", flush=True)
        if options.sheets:
            save_sheet(rows, options.sheets / f"{title}.png")
        board.write(options.json)
    return 0
