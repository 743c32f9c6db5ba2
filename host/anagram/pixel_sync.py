"""Views that have no meaning on latents, on latent models: a latent for each view, brought together as pictures.

"LookingGlass", 2504.08902, section 4.1: each step's clean estimates are decoded, blended in the canonical frame, and encoded
again in every view; what the VAE cannot carry (the residual) is added back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch

from ...methods.panels import Panel
from .. import keys
from ..engine.auxiliary_models import keep_model_loaded, with_additional_models
from ..engine.preview import Painter
from ..engine.sampling import step_of
from ..engine.time_travel import sampler_name
from ..engine.vae import cell_side, decoded_pictures, encoded_latents
from .guidance import check_latent
from .guider import ViewPrompt, ViewsGuider
from .views import ViewConds, needs_own_frame

_SLOT = "sampler_calc_cond_batch_function"
_SEES_ONE_LATENT = (
    _SLOT,
    "context_handler",
    "model_function_wrapper",
)  # of other packs: these may cut up what they see
_SEEDS_APART = 0xBF58476D1CE4E5B9  # from the picture's own noise, and from what time travel and ancestral samplers draw


class PixelSyncGuider(ViewsGuider):
    """Samples as many latents as there are views and keeps them views of one picture. Returns the first one.

    The first view must be ``identity``: its latent is the picture. Each latent has noise of its own, as in the paper.

    Args:
        blend: pictures (views, batch, 3, height, width) to one, (batch, 3, height, width).
        every: pictures are brought together at every so many steps.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[ViewPrompt],
        cfg: float,
        vae: Any,
        blend: Callable[[torch.Tensor], torch.Tensor],
        every: int = 1,
    ) -> None:
        super().__init__(with_additional_models(model, [vae]), prompts, combine=_unused, cfg=cfg)
        self.vae, self.blend, self.every = vae, blend, max(1, every)
        if self.prompts[0].view.name != "identity":
            raise ValueError(
                "With pixel sync the first view is the picture itself; put an Anagram View with 'identity' first in the list."
            )
        for prompt in self.prompts:
            if prompt.known is not None or getattr(prompt.view, "component", None) is not None:
                raise ValueError(
                    f"'{prompt.view.name}' is a component, which works on the latent as it is; use Anagram Guider for it."
                )

    def sample(
        self, noise: torch.Tensor, latent_image: torch.Tensor, sampler: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        check_latent(latent_image)
        if latent_image.ndim > 4 and latent_image.shape[2] > 1:
            raise ValueError("Pixel sync brings pictures together, not films; set the latent's length to 1.")
        if "cfg_pp" in sampler_name(sampler):
            raise ValueError(
                "A cfg++ sampler goes on with the negative prediction of one latent, and here every view has its own; use "
                "euler or dpmpp_2m, or Anagram Guider."
            )
        if kwargs.get("denoise_mask") is not None or torch.count_nonzero(latent_image):
            raise ValueError(
                "Pixel sync starts every view from noise, so a given picture or a mask has no place in it; use an Empty Latent "
                "Image, or Anagram Guider."
            )
        cell, views = cell_side(self.vae), len(self.prompts)
        for prompt in self.prompts:
            prompt.view.check(latent_image.shape[-2] * cell, latent_image.shape[-1] * cell)
        generator = torch.Generator().manual_seed(((kwargs.get("seed") or 0) + _SEEDS_APART) % 2**63)
        others = [torch.randn(noise.shape, generator=generator).to(noise) for _ in range(views - 1)]
        everyone = torch.cat([noise, *others])
        # past the checks of our own parent, which are about views on latents
        out = super(ViewsGuider, self).sample(
            everyone, latent_image.repeat(views, *[1] * (noise.ndim - 1)), sampler, *args, **kwargs
        )
        return out[: len(noise)]

    def times_the_rows(self) -> int:
        """As many as the host reckons with, which is handed a latent a view."""
        return 1

    def predict_noise(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """The denoised latents of all views, one after the other along the batch, views of one picture again."""
        options, parts = model_options or {}, x.chunk(len(self.view_conds))
        clean = [
            comfy.samplers.sampling_function(
                self.inner_model, part, timestep[: len(part)], view.negative, view.positive, self.cfg, own, seed
            )
            for part, view, own in zip(parts, self.view_conds, self._turns(parts, options), strict=True)
        ]
        step = step_of(options.get("transformer_options", {}), float(timestep.max()))
        if len(clean) > 1 and step % self.every == 0:
            with keep_model_loaded(self.inner_model, x):
                clean = self._brought_together(clean)
        return torch.cat(clean)

    def panels(self, x0: torch.Tensor, paint: Painter) -> list[Panel]:
        """Every view's own latent, which stands upright already."""
        parts = x0.chunk(len(self.prompts))
        return [Panel(paint(part), prompt.view.name) for part, prompt in zip(parts, self.prompts, strict=True)]

    def _turns(self, parts: Sequence[torch.Tensor], options: dict[str, Any]) -> list[dict[str, Any]]:
        """For each view the options under which the host's evaluation answers for its latent: all are asked in one batch,
        unless something in the way would take the latents for one."""
        views = self.view_conds
        bound = any(needs_own_frame(conds) for view in views for conds in (view.positive, view.negative))
        if len(views) == 1 or bound or any(options.get(name) is not None for name in _SEES_ONE_LATENT):
            return [options] * len(views)
        answers: list[list[torch.Tensor]] = []

        def turn(number: int, args: dict[str, Any]) -> list[torch.Tensor]:
            if not answers:
                answers.extend(_asked_together(self.inner_model, views, parts, args, options))
            return answers[number]

        return [{**options, _SLOT: partial(turn, number)} for number in range(len(views))]

    def _brought_together(self, clean: list[torch.Tensor]) -> list[torch.Tensor]:
        pictures = [self._decoded(z) for z in clean]
        # what the VAE loses of each latent; it belongs to the latent's own view, which has no meaning on the others' grid
        residuals = [z - self._encoded(p, z) for z, p in zip(clean, pictures, strict=True)]
        views = [v.view for v in self.view_conds]
        whole = self.blend(torch.stack([view.inverse(p) for view, p in zip(views, pictures, strict=True)]))
        return [self._encoded(view.forward(whole), z) + r for view, z, r in zip(views, clean, residuals, strict=True)]

    def _decoded(self, z: torch.Tensor) -> torch.Tensor:
        """A picture symmetric about zero, (batch, 3, height, width) in −1..1."""
        return decoded_pictures(self.vae, self.inner_model.process_latent_out(z)).movedim(-1, 1) * 2 - 1

    def _encoded(self, picture: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self.inner_model.process_latent_in(encoded_latents(self.vae, (picture.movedim(1, -1) + 1) / 2, like))


def _unused(**_: Any) -> tuple[torch.Tensor, None]:
    raise NotImplementedError("views are brought together as pictures here")


def _asked_together(
    model: Any,
    views: Sequence[ViewConds],
    latents: Sequence[torch.Tensor],
    args: dict[str, Any],
    options: dict[str, Any],
) -> list[list[torch.Tensor]]:
    """For each view the positive and negative prediction of its own latent, (batch, channels, …, height, width), from one
    evaluation of the host; ``args`` are those of its slot for the first view."""
    skip_negative = args["conds"][1] is None
    conds = [v.positive for v in views] + [None if skip_negative else v.negative for v in views]
    own = {e["uuid"]: z for v, z in zip(views, latents, strict=True) for c in (v.positive, v.negative) for e in c or ()}
    out = comfy.samplers.calc_cond_batch(model, conds, args["input"], args["sigma"], _with_latents(options, own))
    return [list(pair) for pair in zip(out[: len(views)], out[len(views) :], strict=True)]


def _with_latents(options: dict[str, Any], latents: Mapping[Any, torch.Tensor]) -> dict[str, Any]:
    """A copy of the options under which the rows of a conditioning entry, known by its uuid, show the model its own latent."""
    options = comfy.model_patcher.create_model_options_clone(options)

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        uuids = (transformer_options or {}).get("uuids", ())
        if uuids:
            rows = zip(uuids, x.chunk(len(uuids)), strict=True)
            x = torch.cat([latents.get(uuid, row) for uuid, row in rows])
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    comfy.patcher_extension.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.APPLY_MODEL, keys.PIXEL_SYNC, wrapper, options, is_model_options=True
    )
    return options
