"""Guiders: how the pack takes part in the host's sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import node_helpers
import torch

from .sampling import levels, progress_of, step_of
from .views import ViewConds, frames_of, in_frames, predict_views

_PIXEL_CHANNELS = 3  # a model whose latents have three channels works on the picture itself

Combine = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""All views' predictions to one positive and one negative, in the canonical frame. Called with the keywords ``x``,
``signal``, ``noise``, ``progress``, ``step``, ``positive``, ``negative`` (None without one) and ``cfg``."""


@dataclass(frozen=True)
class ViewPrompt:
    """One view of a picture and the CONDITIONINGs that describe it.

    ``view`` also has ``check(height, width)`` and ``latent``, which is ``pixels only`` if it means nothing on a latent.
    """

    view: Any
    positive: list
    negative: list


class ViewsGuider(comfy.samplers.CFGGuider):
    """Samples one picture that satisfies a prompt in each of several views. Works with any sampler and scheduler.

    Positive and negative predictions are combined apart in the canonical frame; the host's own cfg function then runs
    once, with every patch that hangs on it.
    """

    conds: dict[str, Any]  # the host's: what it is sampling with, by name
    view_conds: list[ViewConds]  # ours: the same by view, while a sampling runs

    def __init__(self, model: Any, prompts: Sequence[ViewPrompt], combine: Combine, cfg: float) -> None:
        if not prompts:
            raise ValueError("An anagram needs at least one view; connect an Anagram View to 'views'.")
        super().__init__(model)
        self.views = [prompt.view for prompt in prompts]
        self.combine = combine
        self.set_cfg(cfg)
        for index, prompt in enumerate(prompts):
            if not prompt.positive or not prompt.negative:
                raise ValueError(
                    f"View {index + 1} ('{prompt.view.name}') has an empty conditioning, so there is nothing to draw; "
                    "connect a CLIP Text Encode to it (its text may be empty)."
                )
            # each view gets its own copy of the negative: the host gives every copy a uuid of its own
            positive = node_helpers.conditioning_set_values(prompt.positive, {"prompt_type": "positive"})
            negative = node_helpers.conditioning_set_values(prompt.negative, {"prompt_type": "negative"})
            self.inner_set_conds({f"positive {index}": positive, f"negative {index}": negative})

    def sample(self, noise: torch.Tensor, latent_image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if getattr(latent_image, "is_nested", False):
            raise ValueError("Anagrams work on one latent, not on a packed pair; use an ordinary Empty Latent Image.")
        for view in self.views:
            self._check(view, latent_image)
        return super().sample(noise, latent_image, *args, **kwargs)

    def _check(self, view: Any, latent_image: torch.Tensor) -> None:
        latent_format = self.model_patcher.get_model_object("latent_format")
        if view.latent == "pixels only" and latent_format.latent_channels != _PIXEL_CHANNELS:
            raise ValueError(
                f"The view '{view.name}' moves single pixels or their brightness, which has no meaning on the "
                f"{latent_format.latent_channels} channels of this model's latents; use a model that works on pixels, or a "
                "view such as 'rotate_180' or 'patch_permute'."
            )
        view.check(*latent_image.shape[-2:])

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
        for index, view in enumerate(self.views):
            # one view at a time, under the names the host knows: it copies ControlNets and GLIGEN from "positive" to
            # "negative", and areas between all it is given, which must not reach another view
            pair = {side: raw[f"{side} {index}"] for side in ("positive", "negative")}
            pair = comfy.samplers.process_conds(
                self.inner_model, noise, pair, device, shown, denoise_mask, seed, **kwargs
            )
            self.view_conds.append(ViewConds(view, pair["positive"], pair["negative"]))
        try:
            return super().inner_sample(
                noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs
            )
        finally:
            # the host cleans up after every conditioning it finds here
            self.conds = {f"{side} {i}": getattr(v, side) for i, v in enumerate(self.view_conds) for side in pair}
            del self.view_conds

    def predict_noise(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """The denoised picture in the canonical frame (the host's name for it is historical)."""
        options, first = model_options or {}, self.view_conds[0]

        def views_batch(args: dict[str, Any]) -> list[torch.Tensor]:
            skip_negative = args["conds"][1] is None
            views = (
                [dataclasses.replace(v, negative=None) for v in self.view_conds] if skip_negative else self.view_conds
            )
            predictions = predict_views(self.inner_model, views, args["input"], args["sigma"], options)
            return self._combined(args["input"], args["sigma"], options, *predictions, skip_negative)

        # patches that run after guidance may ask the model again with a conditioning of ours: its view goes with it
        routed = in_frames(options, frames_of(self.view_conds))
        routed["sampler_calc_cond_batch_function"] = views_batch
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, first.negative, first.positive, self.cfg, routed, seed
        )

    def _combined(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        options: dict[str, Any],
        positive: list[torch.Tensor],
        negative: list[torch.Tensor],
        skip_negative: bool,
    ) -> list[torch.Tensor]:
        """One positive and one negative prediction; without a negative the host expects zeros."""
        model_sampling, level = self.inner_model.model_sampling, float(sigma.max())
        signal, noise = levels(model_sampling, level)
        cond, uncond = self.combine(
            x=x, signal=signal, noise=noise, progress=progress_of(model_sampling, level),
            step=step_of(options.get("transformer_options", {}), level), positive=tuple(positive),
            negative=None if skip_negative else tuple(negative), cfg=self.cfg,
        )  # fmt: skip
        return [cond, torch.zeros_like(cond) if uncond is None else uncond]
