"""The guider that samples one picture for a prompt in each of several views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from ...methods.anagram.overlap import GradientStep
from ...methods.anagram.prediction import Combine
from ...methods.panels import Panel
from .. import keys
from ..engine.guider import RunGuider, Sampling
from ..engine.preview import Painter
from ..types import ModelOptions, ModelPatcher, Sampler
from .guidance import AnagramRun, begin_run, check_own_cfg, check_view, model_for_views, row_factor
from .views import PROMPT_TYPES, ViewConds, ViewPrompt, conds_of_view, tagged_prompt


class ViewsGuider(RunGuider[AnagramRun]):
    """Samples one picture that satisfies a prompt in each of several views. Works with any sampler and scheduler.

    Positive and negative predictions are combined apart in the canonical frame. The host's own cfg function then runs
    once, with every patch that hangs on it.
    """

    # one view at a time, under the names the host knows: it copies ControlNets and GLIGEN from "positive" to
    # "negative", and areas between all conditionings it is given, which must not reach another view
    host_processes = False

    def __init__(
        self,
        model: ModelPatcher,
        prompts: Sequence[ViewPrompt],
        combine: Combine,
        cfg: float,
        gradient_step: GradientStep | None = None,
    ) -> None:
        given = model_for_views(model, prompts, gradient_step)
        super().__init__(given, cfg, keys.VIEWS, self.row_factor(prompts))
        self.prompts, self.combine, self.gradient_step = tuple(prompts), combine, gradient_step
        for index, prompt in enumerate(prompts):
            # each view gets its own copy of the negative: the host gives every copy its own uuid
            positive, negative = tagged_prompt(prompt)
            self.inner_set_conds({f"positive {index}": positive, f"negative {index}": negative})

    @staticmethod
    def row_factor(prompts: Sequence[ViewPrompt]) -> int:
        """The rows of one step divided by those the host expects."""
        return row_factor(prompts)

    def sample(
        self, noise: torch.Tensor, latent_image: torch.Tensor, sampler: Sampler, *args: object, **kwargs: object
    ) -> torch.Tensor:
        for prompt in self.prompts:
            check_view(prompt.view, self.model_patcher, latent_image)
        return super().sample(noise, latent_image, sampler, *args, **kwargs)

    def begin(self, sampling: Sampling) -> AnagramRun:
        views = [self._view_conds(index, sampling) for index in range(len(self.prompts))]
        use = (sampling.sampler, sampling.sigmas, sampling.denoise_mask)
        return begin_run(self.inner_model, self.prompts, views, self.combine, self.gradient_step, use)

    def _view_conds(self, index: int, sampling: Sampling) -> ViewConds:
        """One view with its processed conditionings, which the host finds in ``conds`` and cleans up at the end."""
        unprocessed = {name: sampling.unprocessed[f"{name} {index}"] for name in PROMPT_TYPES}
        conds = sampling.process(unprocessed)
        self.conds |= {f"{name} {index}": conds[name] for name in PROMPT_TYPES}
        return conds_of_view(
            self.inner_model, self.prompts[index], conds["positive"], conds["negative"], sampling.noise
        )

    def panels(self, run: AnagramRun, x0: torch.Tensor, paint: Painter) -> list[Panel]:
        """The first picture of the batch in every view."""
        picture = paint(x0).movedim(-1, 0)
        return [Panel(prompt.view.show(picture).movedim(0, -1), prompt.view.name) for prompt in self.prompts]

    def predict(
        self, run: AnagramRun, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions, seed: int | None
    ) -> torch.Tensor:
        """The denoised picture in the canonical frame."""
        check_own_cfg(self.prompts, self.cfg, options)
        x = run.edited_latent(x, sigma, options)
        # what the host hands on to patches, which may evaluate it again
        positive = list(chain.from_iterable(view.positive for view in run.views))
        negative = list(chain.from_iterable(view.negative or () for view in run.views))
        return self.guided(x, sigma, run.guided_options(self.cfg, options), seed, positive, negative)
