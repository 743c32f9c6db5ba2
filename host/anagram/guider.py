"""Guiders: how the pack takes part in the host's sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import node_helpers
import torch

from ...methods.anagram.prediction import Memory
from ...methods.panels import Panel
from .. import keys
from ..engine.preview import Painter, with_previews
from ..engine.sampling import asking_for_room
from .anti_segregation import Pull, Puller, pulled_model, puller_for
from .guidance import Combine, check_own_cfg, check_view, guide_views, known_latent, times_the_rows
from .views import ViewConds

SIDES = ("positive", "negative")


@dataclass(frozen=True)
class ViewPrompt:
    """One view of a picture and the CONDITIONINGs that describe it, or the clean latent that is what it shows.

    ``view`` also has ``check(height, width)`` and ``latent``, which is ``pixels only`` if it means nothing on a latent.
    ``known`` is a latent as it travels on a wire, (1 or batch, channels, …, height, width). ``cfg`` is the view's own guidance
    scale, as the combiner was told it, None for the sampler's. A view that is not ``counted`` (of weight 0) is shown, and
    the others are neither pulled towards it nor led away from it.
    """

    view: Any
    positive: list
    negative: list
    known: torch.Tensor | None = None
    cfg: float | None = None
    counted: bool = True


def tagged(prompt: ViewPrompt, **values: Any) -> tuple[list, list]:
    """Positive and negative of a view with the host's word for their side, and any further values, in every entry.

    Raises:
        ValueError: one of them is empty.
    """
    if not prompt.positive or not prompt.negative:
        raise ValueError(
            f"The view '{prompt.view.name}' has an empty conditioning, so there is nothing to draw; "
            "connect a CLIP Text Encode to it (its text may be empty)."
        )
    return (
        node_helpers.conditioning_set_values(prompt.positive, {"prompt_type": "positive", **values}),
        node_helpers.conditioning_set_values(prompt.negative, {"prompt_type": "negative", **values}),
    )


def own_controls(prompt: ViewPrompt) -> ViewPrompt:
    """The view with the controls of its positive on its own negative, where the older Apply ControlNet asks for that.

    The host would do it at sampling, as this does: but to the first negatives that have none, whosever they are.
    """
    asking = [v["control"] for _, v in prompt.positive if v.get("control_apply_to_uncond") and "area" not in v]
    if not asking:
        return prompt
    negative = list(prompt.negative)
    free = [number for number, (_, values) in enumerate(negative) if "area" not in values]
    if free and not any(negative[number][1].get("control") for number in free):
        for count, control in enumerate(asking):
            at = free[count % len(free)]
            cond, values = negative[at]
            negative[at] = [cond, {**values, "control": control}]
    positive = node_helpers.conditioning_set_values(prompt.positive, {"control_apply_to_uncond": False})
    return replace(prompt, positive=positive, negative=negative)


class ViewsGuider(comfy.samplers.CFGGuider):
    """Samples one picture that satisfies a prompt in each of several views. Works with any sampler and scheduler.

    Positive and negative predictions are combined apart in the canonical frame; the host's own cfg function then runs
    once, with every patch that hangs on it.
    """

    conds: dict[str, Any]  # the host's: what it is sampling with, by name
    view_conds: list[ViewConds]  # ours: the same by view, while a sampling runs
    memory: Memory  # of what each sampling has seen so far
    puller: Puller | None = None
    shows_views = True  # while it works: every view, upright; without it, what the host shows

    def __init__(
        self, model: Any, prompts: Sequence[ViewPrompt], combine: Combine, cfg: float, pull: Pull | None = None
    ) -> None:
        if not prompts:
            raise ValueError("An anagram needs at least one view; connect an Anagram View to 'views'.")
        super().__init__(model if pull is None else pulled_model(model, prompts))
        self.prompts, self.pull = tuple(prompts), pull
        self.combine = combine
        self.set_cfg(cfg)
        self.model_options: dict[str, Any] = comfy.model_patcher.create_model_options_clone(self.model_options)
        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING, keys.VIEWS, asking_for_room(self.times_the_rows()),
            self.model_options, is_model_options=True,
        )  # fmt: skip
        for index, prompt in enumerate(prompts):
            # each view gets its own copy of the negative: the host gives every copy a uuid of its own
            positive, negative = tagged(prompt)
            self.inner_set_conds({f"positive {index}": positive, f"negative {index}": negative})

    def times_the_rows(self) -> int:
        """How many times as many rows are asked at once as the host reckons with."""
        return times_the_rows(self.prompts)

    def sample(self, noise: torch.Tensor, latent_image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        for prompt in self.prompts:
            check_view(prompt.view, self.model_patcher, latent_image)
        return super().sample(noise, latent_image, *args, **kwargs)

    def inner_sample(
        self,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        device: torch.device,
        sampler: Any,
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None,
        callback: Any,
        disable_pbar: bool,
        seed: int | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        raw, self.conds = self.conds, {}
        shown = latent_image
        if latent_image is not None and torch.count_nonzero(latent_image) > 0:
            shown = self.inner_model.process_latent_in(latent_image)
        self.view_conds = []
        for index, prompt in enumerate(self.prompts):
            # one view at a time, under the names the host knows: it copies ControlNets and GLIGEN from "positive" to
            # "negative", and areas between all it is given, which must not reach another view
            pair = {side: raw[f"{side} {index}"] for side in SIDES}
            pair = comfy.samplers.process_conds(
                self.inner_model, noise, pair, device, shown, denoise_mask, seed, **kwargs
            )
            known = None if prompt.known is None else known_latent(self.inner_model, prompt.known, noise)
            self.view_conds.append(ViewConds(prompt.view, pair["positive"], pair["negative"], known))
        self.memory = Memory()
        if self.shows_views:
            callback = with_previews(callback, self.model_patcher, self.panels)
        try:
            if self.pull is not None:
                counted = [v for v, prompt in zip(self.view_conds, self.prompts, strict=True) if prompt.counted]
                self.puller = puller_for(self.inner_model, counted, self.pull, sampler, sigmas, denoise_mask)
            return super().inner_sample(
                noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs
            )
        finally:
            # the host cleans up after every conditioning it finds here
            self.conds = {f"{side} {i}": getattr(v, side) for i, v in enumerate(self.view_conds) for side in SIDES}
            del self.view_conds, self.memory
            self.puller = None

    def panels(self, x0: torch.Tensor, paint: Painter) -> list[Panel]:
        """The first picture of the batch in every view."""
        picture = paint(x0).movedim(-1, 0)
        return [Panel(prompt.view.show(picture).movedim(0, -1), prompt.view.name) for prompt in self.prompts]

    def predict_noise(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """The denoised picture in the canonical frame (the host's name for it is historical)."""
        options = model_options or {}
        check_own_cfg(self.prompts, self.cfg, options)
        if self.puller is not None:
            x = self.puller(x, timestep, options)
        routed = guide_views(self.inner_model, self.view_conds, self.combine, self.cfg, options, self.memory)
        # what the host hands on to patches, which may ask the model again with it
        positive, negative = ([entry for v in self.view_conds for entry in getattr(v, side)] for side in SIDES)
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative, positive, self.cfg, routed, seed
        )
