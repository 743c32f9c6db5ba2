"""LoRA-Composer as a guider: concepts in regions on the one path of the base model (2403.11627)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import torch

from ...methods.compose.automatic import found_regions
from ...methods.compose.settings import Compose
from ...methods.masks import MaskPyramid
from ...methods.panels import AttentionSnapshot, Panel, attention_panels, concept_panels
from .. import keys
from ..engine.attention import unet_of
from ..engine.base_prompts import check_base_prompts
from ..engine.gradients import plain_patcher
from ..engine.latent_edits import EditSchedule, edit_schedule_for
from ..engine.preview import Painter, with_previews
from ..engine.sampling import percent_of
from ..lora.branches import prepared
from ..lora.concept import Concept, check_layers
from ..lora.factors import unet_factors
from .enhancement import Enhancer, reinitialised
from .injection import Injection, Voice, Words
from .region_search import Watcher

log = logging.getLogger(__name__)

_WHO = "LoRA-Composer's enhancement"
_NEVER_FOUND = (
    "LoRA Composer: the sampling ended before the regions were found, which is after %.0f %% of it, so no concept is in the "
    "picture; lower automatic_percent, take more steps, or draw the regions."
)


class ComposeGuider(comfy.samplers.CFGGuider):
    """Samples one picture with each concept in its region. Without concepts it is the host's own guider.

    Args:
        positive, negative: the whole picture's prompts.
        concepts: one a region, in the regions' order; a concept may come twice. Those of strength 0 are left out.
        covered_for: how much of each cell of a latent of (height, width) each region covers, (regions, height, width);
            None finds the regions in the concepts' own attention during the first steps, one set for the whole batch.
        soft: whether regions fade into what lies around them.

    After a sampling ``regions`` holds the regions at the latent's size, ``updates`` counts the gradient steps and ``losses``
    holds what they saw.
    """

    running: Injection | None = None
    enhancer: Enhancer | None = None
    watcher: Watcher | None = None
    found: AttentionSnapshot | None = None

    def __init__(
        self,
        model: Any,
        positive: list,
        negative: list,
        cfg: float,
        concepts: Sequence[Concept],
        covered_for: Callable[[int, int], torch.Tensor] | None,
        settings: Compose,
        soft: bool = False,
    ) -> None:
        active = [n for n, concept in enumerate(concepts) if concept.strength != 0]
        super().__init__(plain_patcher(model) if active and settings.enhancement > 0 else model)
        check_base_prompts(positive, negative)
        self.inner_set_conds({"positive": positive, "negative": negative})
        self.set_cfg(cfg)
        self.concepts = [concepts[n] for n in active]
        self.settings, self.soft = settings, soft
        self.covered_for = covered_for
        self.active = active
        self.regions: torch.Tensor | None = None
        self.losses: list[torch.Tensor] = []
        self.updates = 0

    def inner_sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.concepts:
            return super().inner_sample(*args, **kwargs)
        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, "concepts.composer", self._sampling, self.model_options,
            is_model_options=True,
        )  # fmt: skip
        try:
            return super().inner_sample(*args, **kwargs)
        finally:
            self.running = self.enhancer = self.watcher = self.found = None

    def _sampling(self, executor, guider, sigmas, extra_args, callback, noise, latent, mask, *args, **kwargs):
        """Around the sampler: by now the host has loaded the model and processed the prompts."""
        self.losses, self.updates, self.regions = [], 0, None
        once = self._once(executor.class_obj, sigmas, mask)
        covered = torch.ones(len(self.concepts), *noise.shape[-2:])
        if self.covered_for is not None:
            covered = self.covered_for(*noise.shape[-2:])[self.active]
        self._start(covered, noise, once)
        assert self.running is not None
        if self.covered_for is None:
            self.watcher = Watcher(self.running)
        elif self.settings.reinit != "off":
            noise = reinitialised(
                self.running,
                self.conds["positive"],
                noise,
                latent,
                sigmas,
                extra_args["model_options"],
                self.settings.reinit,
            )
        callback = with_previews(callback, self.model_patcher, self.panels)
        out = executor(guider, sigmas, extra_args, callback, noise, latent, mask, *args, **kwargs)
        if self.watcher is not None:
            log.warning(_NEVER_FOUND, 100 * self.settings.automatic)
        return out

    def _once(self, sampler: Any, sigmas: torch.Tensor, mask: torch.Tensor | None) -> EditSchedule | None:
        if self.settings.enhancement <= 0:
            return None
        return edit_schedule_for(sampler, sigmas, mask, self.inner_model.model_sampling, _WHO)

    def panels(self, x0: torch.Tensor, paint: Painter) -> list[Panel]:
        """What a person sees of a step: the picture under the regions of its concepts, once they are known, and below where
        the concepts' phrases were seen, if that was asked."""
        picture, names, attention = paint(x0), [concept.phrase for concept in self.concepts], self.attention()
        panels = [Panel(picture)] if self.regions is None else concept_panels(picture, self.regions, names)
        return panels if attention is None else [*panels, *attention_panels(picture, attention, names)]

    def attention(self) -> AttentionSnapshot | None:
        """What the cross-attention of the phrases was last, of those who look at it anyway: the gradient steps (of the first
        picture), and the search for regions (of the whole batch, over the steps so far)."""
        if self.enhancer is not None and self.enhancer.seen is not None:
            cross, progress = self.enhancer.seen
            return AttentionSnapshot(torch.stack([maps[0].mean(0) for maps in cross]), progress)
        if self.watcher is not None and self.watcher.sums:
            return AttentionSnapshot(self.watcher.maps(), self.watcher.progress)
        return self.found

    def _start(self, covered: torch.Tensor, like: torch.Tensor, once: EditSchedule | None) -> None:
        model = self.inner_model
        dtype = model.manual_cast_dtype or model.get_dtype()
        device = model.current_patcher.load_device
        sides = {e["uuid"]: side for side, name in enumerate(("positive", "negative")) for e in self.conds[name]}
        made: dict[int, Voice] = {}
        check_layers(self.concepts, unet_of(model))
        for concept in self.concepts:
            if id(concept) not in made:
                factors = prepared(unet_factors(concept.lora, model), device, dtype)
                made[id(concept)] = Voice(words_of(concept, device, dtype), factors, concept.strength)
        voices = [made[id(concept)] for concept in self.concepts]
        self.running = Injection(
            model,
            voices,
            MaskPyramid(covered.to(device), self.soft, overlapping=True),
            sides,
            self.settings.isolation,
            self.settings.token_lora,
        )
        self.running.fill()
        self.regions = None if self.covered_for is None else covered
        if once is not None:
            self.enhancer = Enhancer(self.running, self.conds["positive"], self.settings, once)

    def predict_noise(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """The denoised picture (the host's name for it is historical)."""
        running, options = self.running, model_options or {}
        if running is None:
            return super().predict_noise(x, timestep, options, seed)
        if self.watcher is not None:
            progress = percent_of(self.inner_model.model_sampling, float(timestep.max()))
            if progress < self.settings.automatic or not self.watcher.sums:
                return super().predict_noise(x, timestep, self.watcher.options(options, progress), seed)
            self.found = self.attention()
            self.regions = found_regions(self.watcher.maps())
            _check_found(self.regions, self.concepts)
            running.masks, self.watcher = MaskPyramid(self.regions.to(x.device), self.soft, overlapping=True), None
        if self.enhancer is not None:
            x = self.enhancer(x, timestep, options)
            self.losses, self.updates = self.enhancer.losses, self.enhancer.updates
        return super().predict_noise(x, timestep, running.options(options), seed)


def _check_found(regions: torch.Tensor, concepts: Sequence[Concept]) -> None:
    """Refuses regions (concepts, h, w) of which one is empty: its concept would stand nowhere.

    Raises:
        ValueError: which concept has no place, and what to do.
    """
    for region, concept in zip(regions, concepts, strict=True):
        if not region.any():
            raise ValueError(
                f"No region was found for the concept '{concept.name}': another one looks at the same places with the same words, "
                "so that nothing tells them apart; give each concept a phrase of its own, or draw the regions with Region Editor."
            )


def words_of(concept: Concept, device: torch.device, dtype: torch.dtype) -> Words:
    """A concept's prompts where and as the model computes, as ordinary tensors.

    Raises:
        ValueError: the prompt does not say where its phrase stands.
    """
    sides = []
    with torch.inference_mode(False):
        for context, values in (concept.positive[0], concept.negative[0]):
            layers = values.get(keys.LAYER_CONTEXTS, context)
            sides.append(layers.detach().to(device, dtype).clone())
    phrase = concept.positive[0][1].get(keys.PHRASE_POSITIONS)
    if not phrase:
        raise ValueError(
            f"The concept '{concept.name}' has no phrase in its prompt, so nobody knows where to look for it; write a phrase "
            "that stands in the prompt."
        )
    return Words(sides[0], sides[1], tuple(phrase))
