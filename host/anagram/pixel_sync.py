"""Views that have no meaning on latents, on latent models: one latent per view, synchronised as pictures.

"LookingGlass", 2504.08902, section 4.1: each step's clean estimates are decoded, blended in the canonical frame, and
encoded again in every view. What the VAE cannot carry (the residual) is added back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import UUID

import comfy.samplers
import torch
import torch.nn.functional as F

from ...methods.anagram.extents import within_extents
from ...methods.anagram.prediction import Predictions
from ...methods.panels import Panel
from .. import keys
from ..engine.auxiliary_models import keep_model_loaded, with_additional_models
from ..engine.cond_or_uncond import cond_or_uncond_of, with_cond_or_uncond
from ..engine.model_call import (
    EVALUATION_SLOT,
    ModelCall,
    RunCall,
    around_model_call,
    conditioning_rows,
    with_evaluation,
)
from ..engine.preview import Painter
from ..engine.sampling import guides_by_negative, sampler_name, step_of
from ..engine.vae import cell_side, decoded_pictures, encoded_latents
from ..types import VAE, BaseModel, EvaluationArguments, ModelOptions, ModelPatcher, Sampler
from .guider import AnagramRun, ViewsGuider
from .views import ViewConds, ViewPrompt, check_latent, extent_of, in_canonical_frame, in_one_call, needs_own_frame

_SEES_ONE_LATENT = (EVALUATION_SLOT, "context_handler", "model_function_wrapper")
"""Options by which other packs may cut up the latents they see."""

_SEED_OFFSET = 0xBF58476D1CE4E5B9
"""Keeps the views' noise different from the picture's own, and from what time travel and ancestral samplers draw."""


class PixelSyncGuider(ViewsGuider):
    """Samples one latent per view and keeps them views of one picture. Returns the first one.

    The first view must be ``identity``: its latent is the picture. Each latent has its own noise, as in the paper.

    Args:
        blend: pictures (views, batch, 3, height, width) to one, (batch, 3, height, width).
        every: the number of steps from one synchronisation to the next.
    """

    def __init__(
        self,
        model: ModelPatcher,
        prompts: Sequence[ViewPrompt],
        cfg: float,
        vae: VAE,
        blend: Callable[[torch.Tensor], torch.Tensor],
        every: int = 1,
    ) -> None:
        super().__init__(with_additional_models(model, [vae]), prompts, combine=_unused, cfg=cfg)
        self.vae, self.blend, self.every = vae, blend, max(1, every)
        if self.prompts[0].view.name != "identity":
            raise ValueError(
                "With pixel sync the first view is the picture itself; put an Anagram View with 'identity' first in "
                "the list."
            )
        for prompt in self.prompts:
            if prompt.reference_latent is not None or prompt.view.component is not None:
                raise ValueError(
                    f"'{prompt.view.name}' is a component, which works on the latent as it is; use Anagram Guider for "
                    "it."
                )

    def sample(
        self, noise: torch.Tensor, latent_image: torch.Tensor, sampler: Sampler, *args: object, **kwargs: Any
    ) -> torch.Tensor:
        self._check_start(latent_image, sampler, kwargs.get("denoise_mask"))
        views, seed = len(self.prompts), kwargs.get("seed") or 0
        generator = torch.Generator().manual_seed((seed + _SEED_OFFSET) % 2**63)
        others = [torch.randn(noise.shape, generator=generator).to(noise) for _ in range(views - 1)]
        everyone = torch.cat([noise, *others])
        # past the checks of our own parent, which are about views on latents
        out = super(ViewsGuider, self).sample(
            everyone, latent_image.repeat(views, *[1] * (noise.ndim - 1)), sampler, *args, **kwargs
        )
        return out[: len(noise)]

    def _check_start(self, latent_image: torch.Tensor, sampler: Sampler, denoise_mask: torch.Tensor | None) -> None:
        """Refuses what pixel sync cannot start from or sample with.

        Raises:
            ValueError: a film, a cfg++ sampler, a given picture or mask, or a canvas that a view cannot take.
        """
        check_latent(latent_image)
        if latent_image.ndim > 4 and latent_image.shape[2] > 1:
            raise ValueError("Pixel sync brings pictures together, not films; set the latent's length to 1.")
        if guides_by_negative(sampler_name(sampler)):
            raise ValueError(
                "A cfg++ sampler goes on with the negative prediction of one latent, and here every view has its own; "
                "use euler or dpmpp_2m, or Anagram Guider."
            )
        if denoise_mask is not None or torch.count_nonzero(latent_image):
            raise ValueError(
                "Pixel sync starts every view from noise, so a given picture or a mask has no place in it; use an "
                "Empty Latent Image, or Anagram Guider."
            )
        cell = cell_side(self.vae)
        for prompt in self.prompts:
            prompt.view.check(latent_image.shape[-2] * cell, latent_image.shape[-1] * cell)

    @staticmethod
    def row_factor(prompts: Sequence[ViewPrompt]) -> int:
        """1: the host is handed one latent per view, and reckons with all of them."""
        return 1

    def predict(
        self, run: AnagramRun, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions, seed: int | None
    ) -> torch.Tensor:
        """The denoised latents of all views, one after the other along the batch, synchronised."""
        parts, views = x.chunk(len(run.views)), run.views
        clean = [
            self.guided(part, sigma[: len(part)], own, seed, view.positive, view.negative)
            for part, view, own in zip(parts, views, self._options_per_view(views, parts, options), strict=True)
        ]
        step = step_of(options.get("transformer_options", {}), float(sigma.max()))
        if len(clean) > 1 and step % self.every == 0:
            with keep_model_loaded(self.inner_model, x):
                clean = self._synchronised(views, clean, sigma)
        return torch.cat(clean)

    def panels(self, run: AnagramRun, x0: torch.Tensor, paint: Painter) -> list[Panel]:
        """Every view's own latent, which is upright already."""
        parts = x0.chunk(len(self.prompts))
        return [Panel(paint(part), prompt.view.name) for part, prompt in zip(parts, self.prompts, strict=True)]

    def _options_per_view(
        self, views: Sequence[ViewConds], parts: Sequence[torch.Tensor], options: ModelOptions
    ) -> list[ModelOptions]:
        """For each view the options under which the host evaluates its own latent.

        All views are evaluated in one batch, unless something of another pack would take their latents for one.
        """
        bound = any(needs_own_frame(conds) for view in views for conds in (view.positive, view.negative))
        if len(views) == 1 or bound or any(options.get(name) is not None for name in _SEES_ONE_LATENT):
            return [options] * len(views)
        shared = _SharedEvaluation(self.inner_model, views, parts, options)
        return [with_evaluation(options, partial(shared.of_view, number)) for number in range(len(views))]

    def _synchronised(
        self, views: Sequence[ViewConds], clean: Sequence[torch.Tensor], sigma: torch.Tensor
    ) -> list[torch.Tensor]:
        """The clean latents as views of one picture."""
        pictures = [self._decoded(z) for z in clean]
        # what the VAE loses of each latent belongs to its own view, which has no meaning on the others' grid
        residuals = [z - self._encoded(p, z) for z, p in zip(clean, pictures, strict=True)]
        extents = [_extent(v, z, sigma, p) for v, z, p in zip(views, clean, pictures, strict=True)]
        upright = [v.view.inverse(p) for v, p in zip(views, pictures, strict=True)]
        whole = self.blend(torch.stack(within_extents(upright, extents, torch.ones(1, len(views)))))
        return [self._encoded(v.view.forward(whole), z) + r for v, z, r in zip(views, clean, residuals, strict=True)]

    def _decoded(self, z: torch.Tensor) -> torch.Tensor:
        """A picture symmetric about zero, (batch, 3, height, width) in −1..1."""
        return decoded_pictures(self.vae, self.inner_model.process_latent_out(z)).movedim(-1, 1) * 2 - 1

    def _encoded(self, picture: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self.inner_model.process_latent_in(encoded_latents(self.vae, (picture.movedim(1, -1) + 1) / 2, like))


def _extent(view: ViewConds, z: torch.Tensor, sigma: torch.Tensor, picture: torch.Tensor) -> torch.Tensor | None:
    """Where on the whole picture a view acts, by its own latent; None is everywhere."""
    where = extent_of(view, z, sigma[: len(z)])
    if where is None:
        return None
    cells = where[:, :1].reshape(len(z), 1, *where.shape[-2:]).float()  # pixel sync takes no films
    return in_canonical_frame(view.view, F.interpolate(cells, picture.shape[-2:]).expand_as(picture))


def _unused(_: Predictions) -> tuple[torch.Tensor, None]:
    raise NotImplementedError("views are synchronised as pictures here")


class _SharedEvaluation:
    """One evaluation of all views, each on its own latent. It is made when the host evaluates the first of them."""

    def __init__(
        self, model: BaseModel, views: Sequence[ViewConds], latents: Sequence[torch.Tensor], options: ModelOptions
    ) -> None:
        self.model, self.views, self.latents, self.options = model, views, latents, options
        self.predictions: list[list[torch.Tensor]] = []

    def of_view(self, number: int, args: EvaluationArguments) -> list[torch.Tensor]:
        """Positive and negative prediction of one view, (batch, channels, …, height, width)."""
        if not self.predictions:
            self.predictions.extend(self._evaluate(args))
        return self.predictions[number]

    def _evaluate(self, args: EvaluationArguments) -> list[list[torch.Tensor]]:
        """The predictions of all views, with the host's arguments for the first of them."""
        views, skip_negative = self.views, args["conds"][1] is None
        conds = [*(v.positive for v in views), *(None if skip_negative else v.negative for v in views)]
        own = {
            entry["uuid"]: z
            for v, z in zip(views, self.latents, strict=True)
            for entry in (*v.positive, *(v.negative or ()))
        }
        numbers = cond_or_uncond_of((v.positive for v in views), (v.negative for v in views))
        conds, options = with_cond_or_uncond(conds, _with_latents(self.options, own), numbers)
        conds, options = in_one_call(self.model, views, conds, args["input"], args["sigma"], options)
        out = comfy.samplers.calc_cond_batch(self.model, conds, args["input"], args["sigma"], options)
        return [list(pair) for pair in zip(out[: len(views)], out[len(views) :], strict=True)]


def _with_latents(options: ModelOptions, latents: Mapping[UUID, torch.Tensor]) -> ModelOptions:
    """A copy of the options under which the model sees a latent per conditioning entry, by its uuid."""

    def show_own(call: ModelCall, run: RunCall) -> torch.Tensor:
        entries = conditioning_rows(call.transformer_options, len(call.x))
        if not entries:
            return run(call)
        own = [latents[entry.uuid] if entry.uuid in latents else call.x[entry.rows] for entry in entries]
        return run(call._replace(x=torch.cat(own)))

    return around_model_call(options, keys.PIXEL_SYNC, show_own)
