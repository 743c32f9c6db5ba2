"""Views that have no meaning on latents, on latent models: a latent for each view, brought together as pictures.

"LookingGlass", 2504.08902, section 4.1: each step's clean estimates are decoded, blended in the canonical frame, and encoded
again in every view; what the VAE cannot carry (the residual) is added back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers
import torch

from ..methods.panels import Panel
from .beside import sampled_stays_loaded, with_helpers
from .guider import ViewPrompt, ViewsGuider
from .preview import Painter
from .sampling import step_of
from .vae import cell_side

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
        super().__init__(with_helpers(model, [vae]), prompts, combine=_unused, cfg=cfg)
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

    def sample(self, noise: torch.Tensor, latent_image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
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
            everyone, latent_image.repeat(views, *[1] * (noise.ndim - 1)), *args, **kwargs
        )
        return out[: len(noise)]

    def predict_noise(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """The denoised latents of all views, one after the other along the batch, views of one picture again."""
        options = model_options or {}
        clean = [
            comfy.samplers.sampling_function(
                self.inner_model, part, timestep[: len(part)], view.negative, view.positive, self.cfg, options, seed
            )
            for part, view in zip(x.chunk(len(self.view_conds)), self.view_conds, strict=True)
        ]
        step = step_of(options.get("transformer_options", {}), float(timestep.max()))
        if len(clean) > 1 and step % self.every == 0:
            with sampled_stays_loaded(self.inner_model, x):
                clean = self._brought_together(clean)
        return torch.cat(clean)

    def panels(self, x0: torch.Tensor, paint: Painter) -> list[Panel]:
        """Every view's own latent, which stands upright already."""
        parts = x0.chunk(len(self.prompts))
        return [Panel(paint(part), prompt.view.name) for part, prompt in zip(parts, self.prompts, strict=True)]

    def _brought_together(self, clean: list[torch.Tensor]) -> list[torch.Tensor]:
        pictures = [self._decoded(z) for z in clean]
        # what the VAE loses of each latent; it belongs to the latent's own view, which has no meaning on the others' grid
        residuals = [z - self._encoded(p, z) for z, p in zip(clean, pictures, strict=True)]
        views = [v.view for v in self.view_conds]
        whole = self.blend(torch.stack([view.inverse(p) for view, p in zip(views, pictures, strict=True)]))
        return [self._encoded(view.forward(whole), z) + r for view, z, r in zip(views, clean, residuals, strict=True)]

    def _decoded(self, z: torch.Tensor) -> torch.Tensor:
        """A picture symmetric about zero, (batch, 3, height, width) in −1..1."""
        return self.vae.decode(self.inner_model.process_latent_out(z)).movedim(-1, 1) * 2 - 1

    def _encoded(self, picture: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        latent = self.vae.encode((picture.movedim(1, -1) + 1) / 2)
        return self.inner_model.process_latent_in(latent.to(like))


def _unused(**_: Any) -> tuple[torch.Tensor, None]:
    raise NotImplementedError("views are brought together as pictures here")
