"""Several concepts in one picture as users do it today and by Concept Conductor, for the boards that compare them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.samplers
import comfy.sd
import comfy.utils
import node_helpers
import numpy as np
import torch

from ..demo import vocabulary
from ..demo.architecture import LATENTS
from ..demo.judge import WHOLE, Judge
from ..demo.sampling import DemoSampler, encode, noise_for
from ..host.conduct.guider import ConductGuider
from ..host.conduct.layout import LayoutReference
from ..host.engine.base_prompts import BasePrompts
from ..host.lora.concept import Concept, make_concept
from ..host.lora.files import read_lora
from ..methods.conduct.settings import Conduct
from ..methods.regions import Box, Region, coverage
from .concept_tasks import STAND_INS, ConceptMetrics, ConceptTask, found_box, lora_of
from .demo_models import counting_clone
from .host_hooks import hooked_in

GuiderFactory = Callable[[ConceptTask, Any], comfy.samplers.CFGGuider]
"""(task, model) → the guider that draws it."""
CONDUCTOR = Conduct(whole_transformers=True, iterations=1, guidance_weight=12 * Conduct.guidance_weight)
"""One heavy step of the alignment before each guided step. The reference's 61 light ones would be nine."""


@dataclass(frozen=True)
class ConductVariant:
    """One way to conduct: the settings, and whether the reference picture is shown."""

    settings: Conduct = CONDUCTOR
    layout: bool = True


class ConceptRunner:
    """Samples the pictures of a task with the guider of any method, on a kind of demo model."""

    def __init__(self, kind: str = "unet") -> None:
        self.demo, self.judge = DemoSampler(kind=kind), Judge.load()
        self.sigmas = comfy.samplers.calculate_sigmas(
            self.demo.model.get_model_object("model_sampling"), self.demo.settings.scheduler, self.demo.settings.steps
        )
        self.negative = encode(self.demo.clip, "")
        self.concept = cache(self._concept)
        self.object_on = cache(self._object_on)

    @torch.inference_mode()
    def run(self, guider_of: GuiderFactory, task: ConceptTask) -> tuple[ConceptMetrics, np.ndarray]:
        """The counts over the pictures of a task, and the pictures, (seeds, h, w, 3) of bytes."""
        model, rows = counting_clone(self.demo.model)
        noise = noise_for(list(task.seeds), task.layout.width, kind=self.demo.kind)
        sampler = comfy.samplers.sampler_object(self.demo.settings.sampler)
        latents = guider_of(task, model).sample(
            noise, torch.zeros_like(noise), sampler, self.sigmas, disable_pbar=True, seed=1
        )
        pictures = self.demo.vae.decode(latents).float()
        metrics = ConceptMetrics(calls=len(rows), rows=sum(rows))
        metrics.count(self.judge, task, pictures)
        return metrics, (pictures * 255).round().byte().numpy()

    def _concept(self, noun: str, prompt: str) -> Concept:
        return make_concept(
            read_lora(lora_of(noun, self.demo.kind)), 1.0, self.demo.clip, prompt, vocabulary.article(noun), ""
        )

    def concepts(self, task: ConceptTask) -> list[Concept]:
        return [self.concept(c, task.concept_prompt(c)) for c in task.concepts]

    def coverage_at(self, task: ConceptTask, height: int, width: int) -> torch.Tensor:
        return coverage(self.regions(task), height, width)

    def regions(self, task: ConceptTask) -> list[Region]:
        return [Region("", (Box(*b),)) for b in task.layout.fractions()]

    def conductor_guider(self, task: ConceptTask, model: Any, variant: ConductVariant) -> ConductGuider:
        positive = encode(self.demo.clip, task.base_prompt())
        layout = LayoutReference(positive, self.reference_latent(task)) if variant.layout else None
        return ConductGuider(
            model,
            BasePrompts(positive, self.negative, self.demo.settings.cfg),
            self.concepts(task),
            self.regions(task),
            variant.settings,
            layout,
        )

    def reference_latent(self, task: ConceptTask) -> torch.Tensor:
        """A collage as the layout: objects the base model knows, in the boxes of the task, as a latent."""
        colour = torch.tensor(vocabulary.BACKGROUNDS[task.background]) / 255
        canvas = colour.expand(128, task.layout.width, 3).clone()
        for concept, (x0, y0, x1, y1) in zip(task.concepts, task.layout.boxes, strict=True):
            thing = self.object_on(STAND_INS[concept], task.background).movedim(-1, 0)[None]
            scaled = torch.nn.functional.interpolate(thing, (y1 - y0, x1 - x0), mode="bilinear", antialias=True)
            canvas[y0:y1, x0:x1] = scaled[0].movedim(0, -1)
        return self.demo.vae.encode(canvas[None])

    def _object_on(self, noun: str, background: str) -> torch.Tensor:
        """A cut-out of one object, (h, w, 3)."""
        picture = self.demo.sample(vocabulary.scene_of((noun,), background).caption(), [3])[0]
        x0, y0, x1, y1 = found_box(picture, WHOLE) or (0, 0, 128, 128)
        return picture[y0:y1, x0:x1]

    def stacked_loras_guider(self, task: ConceptTask, model: Any) -> comfy.samplers.CFGGuider:
        """All LoRAs on the model and the text encoder, as a chain of Load LoRA nodes."""
        model, clip = self._with_loras(task, model)
        return self.plain_guider(model, encode(clip, task.true_prompt()), encode(clip, ""))

    def area_guider(self, task: ConceptTask, model: Any) -> comfy.samplers.CFGGuider:
        """The same with Conditioning (Set Area) for each concept, over the prompt of the whole."""
        model, clip = self._with_loras(task, model)
        positive = list(encode(clip, task.true_prompt()))
        for concept, (x, y, w, h) in zip(task.concepts, task.layout.fractions(), strict=True):
            area = {"area": ("percentage", h, w, y, x), "strength": 1.0, "set_area_to_bounds": False}
            positive += node_helpers.conditioning_set_values(encode(clip, task.lone_prompt(concept)), area)
        return self.plain_guider(model, positive, encode(clip, ""))

    def hooks_guider(self, task: ConceptTask, model: Any) -> comfy.samplers.CFGGuider:
        """The host's LoRA hooks: each concept's prompt with its LoRA and mask, the base prompt where no mask is."""
        positive, negative = [], []
        factor = LATENTS[self.demo.kind].factor
        masks = self.coverage_at(task, 128 // factor, task.layout.width // factor)
        for noun, concept, mask in zip(task.concepts, self.concepts(task), masks, strict=True):
            own = hooked_in(_state(lora_of(noun, self.demo.kind)), mask)
            positive += node_helpers.conditioning_set_values(concept.positive, own)
            negative += node_helpers.conditioning_set_values(concept.negative, own)
        base = node_helpers.conditioning_set_values(encode(self.demo.clip, task.base_prompt()), {"default": True})
        empty = node_helpers.conditioning_set_values(self.negative, {"default": True})
        return self.plain_guider(model, positive + base, negative + empty)

    def _with_loras(self, task: ConceptTask, model: Any) -> tuple[Any, Any]:
        clip = self.demo.clip
        for concept in task.concepts:
            model, clip = comfy.sd.load_lora_for_models(model, clip, _state(lora_of(concept, self.demo.kind)), 1.0, 1.0)
        return model, clip

    def plain_guider(self, model: Any, positive: list, negative: list) -> comfy.samplers.CFGGuider:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(self.demo.settings.cfg)
        return guider


@cache
def _state(path: str) -> dict[str, torch.Tensor]:
    return comfy.utils.load_torch_file(path, safe_load=True)
