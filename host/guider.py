"""Guiders: how the pack takes part in the host's sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.samplers
import node_helpers
import torch

from .sampling import levels, progress_of, step_of
from .views import ViewConds, predict_views

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

    def __init__(self, model: Any, prompts: Sequence[ViewPrompt], combine: Combine, cfg: float) -> None:
        if not prompts:
            raise ValueError("An anagram needs at least one view; connect an Anagram View to 'views'.")
        super().__init__(model)
        self.views = [prompt.view for prompt in prompts]
        self.combine = combine
        self.set_cfg(cfg)
        for index, prompt in enumerate(prompts):
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

    def predict_noise(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """The denoised picture in the canonical frame (the host's name for it is historical)."""
        options = model_options or {}

        def views_batch(args: dict[str, Any]) -> list[torch.Tensor]:
            skip_negative = args["conds"][1] is None
            views = [
                ViewConds(v, self.conds[f"positive {i}"], None if skip_negative else self.conds[f"negative {i}"])
                for i, v in enumerate(self.views)
            ]
            predictions = predict_views(self.inner_model, views, args["input"], args["sigma"], options)
            return self._combined(args["input"], args["sigma"], options, *predictions, skip_negative)

        routed = comfy.model_patcher.create_model_options_clone(options)
        routed["sampler_calc_cond_batch_function"] = views_batch
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, self.conds["negative 0"], self.conds["positive 0"], self.cfg, routed, seed
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
