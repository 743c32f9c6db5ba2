"""Anagrams for the stock KSampler: a model that knows its views, and one conditioning that carries all their prompts.

The views' prompts travel as one combined CONDITIONING whose entries say which view they belong to. A keyed wrapper of
the model's predictions sorts them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.patcher_extension
import torch

from ...methods.anagram.overlap import GradientStep
from ...methods.anagram.prediction import Combine
from .. import keys
from ..engine.guider import asking_for_room
from ..types import Conditioning, Conds, Executor, Guider, ModelOptions, ModelPatcher, Options, StepCallback
from .guidance import AnagramRun, begin_run, check_own_cfg, check_view, model_for_views, row_factor
from .views import ViewConds, ViewPrompt, conds_of_view, own_controls, tagged_prompt


def with_views(
    model: ModelPatcher, prompts: Sequence[ViewPrompt], combine: Combine, gradient_step: GradientStep | None = None
) -> tuple[ModelPatcher, Conditioning, Conditioning]:
    """A clone of the model that samples the views, and the positive and negative to sample it with.

    Raises:
        ValueError: no view, an empty conditioning, or an area or mask in one, which the host would hand to the other
            views; a gradient step and a prompt without a phrase.
    """
    patched = model_for_views(model, prompts, gradient_step).clone()
    positive, negative = _joined_prompts(prompts)
    kinds = comfy.patcher_extension.WrappersMP
    patch = _ViewsPatch(tuple(prompts), combine, gradient_step)
    patched.add_wrapper_with_key(kinds.PREDICT_NOISE, keys.VIEWS, patch.predict)
    patched.add_wrapper_with_key(kinds.PREPARE_SAMPLING, keys.VIEWS, asking_for_room(row_factor(prompts)))
    patched.add_wrapper_with_key(kinds.SAMPLER_SAMPLE, keys.VIEWS, patch.sample)
    return patched, positive, negative


def _joined_prompts(prompts: Sequence[ViewPrompt]) -> tuple[Conditioning, Conditioning]:
    """All views' positives and all their negatives, each entry with the number of its view."""
    positive: Conditioning = []
    negative: Conditioning = []
    for index, prompt in enumerate(prompts):
        pair = tagged_prompt(own_controls(prompt), **{keys.VIEW_INDEX: index})
        for joined, entries in zip((positive, negative), pair, strict=True):
            _refuse_areas(prompt, entries)
            joined.extend(entries)
    return positive, negative


def _refuse_areas(prompt: ViewPrompt, entries: Conditioning) -> None:
    for _, values in entries:
        part = next((key for key in ("area", "mask", "gligen") if values.get(key) is not None), None)
        if part:
            raise ValueError(
                f"The prompt of view '{prompt.view.name}' is bound to a part of the canvas ({part}), which the host "
                "would share out among all views here; use Anagram Guider with SamplerCustomAdvanced for that."
            )


@dataclass(frozen=True)
class _ViewsPatch:
    """The wrappers around a sampling and around each of its predictions.

    It keeps nothing of a sampling: the conditionings are in the host's guider, and the run is in the options of that
    sampling. It does not keep the model that keeps it either: the host takes a model for leaked that goes in a circle.
    """

    prompts: tuple[ViewPrompt, ...]
    combine: Combine
    gradient_step: GradientStep | None

    def sample(
        self,
        executor: Executor,
        guider: Guider,
        sigmas: torch.Tensor,
        extra_args: Options,
        callback: StepCallback | None,
        noise: torch.Tensor,
        latent: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        """A whole sampling, with a run in its options."""
        use = (executor.class_obj, sigmas, denoise_mask)
        self._check_views(guider, noise)  # before the size of a reference, which says nothing about a packed latent
        views = _views_of(guider, self.prompts, noise)
        run = begin_run(guider.inner_model, self.prompts, views, self.combine, self.gradient_step, use)
        options = {**extra_args["model_options"], keys.ANAGRAM_RUN: run}
        own_args = {**extra_args, "model_options": options}
        return executor(guider, sigmas, own_args, callback, noise, latent, denoise_mask, *args, **kwargs)

    def predict(
        self,
        executor: Executor,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: ModelOptions | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """One prediction, of all views. Outside of a sampling it makes its own run, without a gradient step."""
        guider: Guider = executor.class_obj
        options = model_options or {}
        self._check_views(guider, x)
        check_own_cfg(self.prompts, guider.cfg, options)
        run: AnagramRun | None = options.get(keys.ANAGRAM_RUN)
        if run is None:
            run = AnagramRun(guider.inner_model, tuple(_views_of(guider, self.prompts, x)), self.combine)
        x = run.edited_latent(x, timestep, options)
        return executor(x, timestep, run.guided_options(guider.cfg, options), seed)

    def _check_views(self, guider: Guider, x: torch.Tensor) -> None:
        for prompt in self.prompts:
            check_view(prompt.view, guider.model_patcher, x)


def _views_of(guider: Guider, prompts: Sequence[ViewPrompt], noise: torch.Tensor) -> list[ViewConds]:
    """The views with the conditionings of this sampling, sorted out of those the host's guider holds."""
    return [
        conds_of_view(
            guider.inner_model,
            prompt,
            _conds_at(guider.conds.get("positive"), index, "positive"),
            _conds_at(guider.conds.get("negative"), index, "negative"),
            noise,
        )
        for index, prompt in enumerate(prompts)
    ]


def _conds_at(conds: Conds | None, index: int, prompt_type: str) -> Conds:
    """The entries of one view.

    Raises:
        ValueError: the sampler was given another conditioning.
    """
    own = [entry for entry in conds or () if entry.get(keys.VIEW_INDEX) == index]
    if not own:
        raise ValueError(
            f"The sampler's {prompt_type} holds no prompt for view {index + 1}; connect the {prompt_type} that comes "
            "out of Anagram for KSampler, together with its model."
        )
    return own
