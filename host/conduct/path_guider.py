"""The guider that samples several concepts, each with its own LoRA, in one picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import node_helpers
import torch

from ...methods.panels import AttentionSnapshot, Panel, attention_panels, concept_panels
from .. import keys
from ..engine.attention import unet_of
from ..engine.base_prompts import check_base_prompts
from ..engine.guider import asking_for_room
from ..engine.preview import Painter, with_previews
from ..lora.branches import prepared
from ..lora.concept import Concept, check_layers
from ..lora.factors import unet_factors
from .paths import Masks, Path, Paths

log = logging.getLogger(__name__)


class PathGuider(comfy.samplers.CFGGuider):
    """Samples with a path for each concept. Without any, it is the host's own guider.

    Args:
        masks_for: the masks of all concepts for a latent of (height, width), background first.
    """

    conds: dict[str, Any]  # the host's: what it is sampling with, by name
    running: Paths | None = None

    def __init__(
        self,
        model: Any,
        positive: list,
        negative: list,
        cfg: float,
        concepts: Sequence[Concept],
        masks_for: Callable[[int, int], Masks],
    ) -> None:
        super().__init__(model)
        check_base_prompts(positive, negative)
        if concepts:
            check_layers(concepts, unet_of(model.model))
        self.concepts, self.masks_for = tuple(concepts), masks_for
        self.set_cfg(cfg)
        self.set_conds(positive, negative)
        for number, concept in enumerate(self.concepts):
            for side, base, own in (("positive", positive, concept.positive), ("negative", negative, concept.negative)):
                self.inner_set_conds({f"{side} {number}": _beside(base, own, side)})
        self.model_options: dict[str, Any] = comfy.model_patcher.create_model_options_clone(model.model_options)
        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING, keys.PATHS, asking_for_room(1 + len(self.concepts)),
            self.model_options, is_model_options=True,
        )  # fmt: skip

    def inner_sample(
        self,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        device: torch.device,
        sampler: Any,
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None,
        callback: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        about = (noise, latent_image, device, sampler, sigmas, denoise_mask)
        if not self.concepts:
            return super().inner_sample(*about, callback, *args, **kwargs)
        self.about = (noise, sampler, sigmas, denoise_mask)
        callback = with_previews(callback, self.model_patcher, self.panels)
        try:
            return super().inner_sample(*about, callback, *args, **kwargs)
        finally:
            self.running = None
            del self.about

    def panels(self, x0: torch.Tensor, paint: Painter) -> list[Panel]:
        """What a person sees of a step: the picture under the masks of its concepts, each concept by itself, and below the
        same of their attention, if anybody has looked at it."""
        assert self.running is not None
        picture, names, attention = paint(x0), [concept.phrase for concept in self.concepts], self.attention()
        panels = concept_panels(picture, first_masks(self.running.masks, *x0.shape[-2:]), names)
        return panels if attention is None else [*panels, *attention_panels(picture, attention, names)]

    def attention(self) -> AttentionSnapshot | None:
        """The concepts' attention as it was looked at last; here, it is not."""
        return None

    def predict_noise(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """The denoised picture (the host's name for it is historical)."""
        options = model_options or {}
        if not self.concepts:
            return super().predict_noise(x, timestep, options, seed)
        if self.running is None:
            self.running = self.start(x)
        paths = self.running
        x = self.before(paths, x, timestep, options)

        def all_paths(args: dict[str, Any]) -> list[torch.Tensor]:
            return paths.predict(args["input"], args["sigma"], options, negative=args["conds"][1] is not None)

        # patches that run after guidance get options under which rows of ours still go their paths
        routed = paths.routed(options) | {"sampler_calc_cond_batch_function": all_paths}
        out = comfy.samplers.sampling_function(
            self.inner_model, x, timestep, self.conds["negative"], self.conds["positive"], self.cfg, routed, seed
        )
        self.after(paths, x, timestep)
        return out

    def start(self, x: torch.Tensor) -> Paths:
        """All paths for one sampling of a latent like ``x``; the host has processed the conditionings by now."""
        model = self.inner_model
        dtype = model.manual_cast_dtype or model.get_dtype()
        concepts = [
            Path(
                self.conds[f"positive {n}"], self.conds[f"negative {n}"],
                prepared(unet_factors(concept.lora, model), x.device, dtype), concept.strength,
            )
            for n, concept in enumerate(self.concepts)
        ]  # fmt: skip
        base = Path(self.conds["positive"], self.conds["negative"])
        return Paths(model, [base, *concepts], self.masks_for(*x.shape[-2:]))

    def before(self, paths: Paths, x: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """The latent to predict at; here, the one that came."""
        return x

    def after(self, paths: Paths, x: torch.Tensor, sigma: torch.Tensor) -> None:
        """What follows a prediction; here, nothing."""


def first_masks(masks: Masks, height: int, width: int) -> torch.Tensor:
    """The masks of the first picture's concepts, without the background, (concepts, height, width)."""
    at = masks.at(height, width)
    return (at if at.ndim == 3 else at[0])[1:]


def _beside(base: list, own: list, side: str) -> list:
    """A concept's conditioning under the ControlNets of the base, so that all paths stay in one call and in one layout."""
    values: dict[str, Any] = {"prompt_type": side}
    for key in ("control", "control_apply_to_uncond", "start_percent", "end_percent"):
        if len(base) == 1 and key in base[0][1]:
            values[key] = base[0][1][key]
    return node_helpers.conditioning_set_values(own[:1], values)
