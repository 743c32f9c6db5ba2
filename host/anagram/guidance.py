"""One sampling of an anagram: what the views guider and the model patch for the stock KSampler share.

Under its options one evaluation of the host evaluates every view and returns one combined prediction.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import comfy.model_patcher
import comfy.patcher_extension
import torch

from ...methods.anagram.overlap import GradientStep
from ...methods.anagram.prediction import Combine, Predictions, ScoreMemory
from ...methods.anagram.views import View
from .. import keys
from ..engine.cond_or_uncond import with_cond_or_uncond
from ..engine.gradients import plain_patcher
from ..engine.model_call import evaluate, with_evaluation
from ..engine.sampling import percent_of, signal_and_noise, step_of
from ..engine.vae import PIXEL_CHANNELS
from ..registry import known_architecture, refused_size
from ..types import BaseModel, Conds, EvaluationArguments, Executor, ModelOptions, ModelPatcher
from .anti_segregation import AntiSegregator, SamplerUse, anti_segregator_for
from .views import (
    ViewConds,
    ViewPrompt,
    check_latent,
    extent_of,
    frames_of,
    in_canonical_frame,
    in_frames,
    in_one_call,
    needs_own_frame,
    predict_views,
)

log = logging.getLogger(__name__)
_IDLE = (
    "Contrast does nothing at cfg 1, because no negative is evaluated there; set the sampler's cfg above 1, or leave "
    "the contrast out."
)


def model_for_views(
    model: ModelPatcher, prompts: Sequence[ViewPrompt], gradient_step: GradientStep | None
) -> ModelPatcher:
    """The MODEL to sample these views with; for a gradient step, in a form that has gradients. Some hosts load another.

    Raises:
        ValueError: no view; or, with a gradient step, a prompt that does not say which of its words are the concept, or
            a model without such a form.
    """
    if not prompts:
        raise ValueError("An anagram needs at least one view; connect an Anagram View to 'views'.")
    weighty = [prompt for prompt in prompts if prompt.has_weight]
    for prompt in weighty if gradient_step is not None else ():
        has_phrase = all(values.get(keys.PHRASE_POSITIONS) for _, values in prompt.positive)
        if prompt.reference_latent is not None or not has_phrase:
            raise ValueError(
                f"Anti-segregation must know which words of the prompt of view '{prompt.view.name}' are its concept; "
                "encode every view's prompt with 'Encode Concept Phrase' instead of CLIP Text Encode, or choose "
                "another preset."
            )
    return plain_patcher(model) if gradient_step is not None and len(weighty) > 1 else model


def check_view(view: View, model_patcher: ModelPatcher, latent: torch.Tensor) -> None:
    """Refuses a view that this model's latents or this canvas cannot take.

    Raises:
        ValueError: pixels only, resampled, not square, or parts that do not divide.
    """
    if view.latent == "finished pixels":
        raise ValueError(
            f"The view '{view.name}' resamples what it turns, and resampled noise is not noise the model knows; use "
            "Anagram Pixel Guider, which turns finished pixels, or 'inner_circle' and 'rings', which are exact."
        )
    channels = model_patcher.get_model_object("latent_format").latent_channels
    if view.latent == "pixels only" and channels != PIXEL_CHANNELS:
        raise ValueError(
            f"The view '{view.name}' moves single pixels, their brightness or their colour, which has no meaning on "
            f"the {channels} channels of this model's latents; use Anagram Pixel Guider, a model that works on "
            "pixels, or a view such as 'rotate_180' or 'patch_permute'."
        )
    check_latent(latent)
    view.check(*latent.shape[-2:])
    architecture = known_architecture(model_patcher.model)
    if architecture is not None:
        view.check_patches(*latent.shape[-2:], architecture.patch)


def check_own_cfg(prompts: Sequence[ViewPrompt], cfg: float, model_options: ModelOptions) -> None:
    """Refuses a view's own guidance scale where the sampler's leaves nothing to guide with.

    At 1 the host evaluates no negative (some samplers make it do so all the same), and at 0 no positive counts.

    Raises:
        ValueError: which view, and what to do.
    """
    skipped = math.isclose(cfg, 1.0) and not model_options.get("disable_cfg1_optimization", False)
    silenced = next((p for p in prompts if p.cfg not in (None, cfg)), None)
    if silenced is not None and (skipped or cfg == 0):
        raise ValueError(
            f"The view '{silenced.view.name}' has its own cfg, {silenced.cfg:g}, and the sampler's is {cfg:g}, at "
            f"which {'the positive prompts count for nothing' if cfg == 0 else 'the negative is not evaluated'}; set "
            "the sampler's cfg to another number, such as 1.1 or 5, or the view's to 0."
        )


def row_factor(prompts: Sequence[ViewPrompt]) -> int:
    """The rows of all views divided by those the host expects, a positive and a negative per picture; at least 1."""
    return max(1, math.ceil(sum(len(p.positive) + len(p.negative) for p in prompts) / 2))


@dataclass(frozen=True)
class AnagramRun:
    """One sampling of an anagram.

    Attributes:
        segregator: takes the gradient step before a prediction, if there is one.
        memory: the scores of the views so far.
        contrasted: whether a negative holds the other views' prompts.
        said: what the user was told in this sampling.
    """

    model: BaseModel
    views: tuple[ViewConds, ...]
    combine: Combine
    segregator: AntiSegregator | None = None
    memory: ScoreMemory = field(default_factory=ScoreMemory)
    contrasted: bool = False
    said: set[str] = field(default_factory=set)

    def edited_latent(self, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions) -> torch.Tensor:
        """The latent to predict at."""
        return x if self.segregator is None else self.segregator(x, sigma, options)

    def guided_options(self, cfg: float, model_options: ModelOptions) -> ModelOptions:
        """A copy of the options under which one evaluation of the host covers all views, combined.

        Positive and negative are combined apart in the canonical frame. The host's own cfg function then runs once,
        with every patch that hangs on it.
        """
        moment = _Moment(self, cfg, model_options)
        return with_evaluation(moment.options_for_repeated_calls(), moment.evaluate_views)

    def say_without_negative(self) -> None:
        """Tells once per sampling that a contrast does nothing where no negative is evaluated."""
        if self.contrasted and _IDLE not in self.said:
            self.said.add(_IDLE)
            log.warning(_IDLE)


def begin_run(
    model: BaseModel,
    prompts: Sequence[ViewPrompt],
    views: Sequence[ViewConds],
    combine: Combine,
    step: GradientStep | None,
    sampling: SamplerUse,
) -> AnagramRun:
    """The run of one sampling, with a new memory.

    Raises:
        ValueError: a gradient step, and a sampler or a model it cannot work with.
    """
    weighty = [v for v, prompt in zip(views, prompts, strict=True) if prompt.has_weight]
    segregator = None if step is None else anti_segregator_for(model, weighty, step, sampling)
    return AnagramRun(model, tuple(views), combine, segregator, contrasted=any(p.contrasted for p in prompts))


@dataclass(frozen=True)
class _Moment:
    """The evaluations of one prediction of a run: the host's, and those that patches make again after guidance."""

    run: AnagramRun
    cfg: float
    options: ModelOptions

    def evaluate_views(self, args: EvaluationArguments) -> list[torch.Tensor]:
        """All views, combined, in place of the host's positive and negative."""
        x, sigma = args["input"], args["sigma"]
        skip_negative = args["conds"][1] is None
        views = [replace(v, negative=None) for v in self.run.views] if skip_negative else self.run.views

        if skip_negative:
            self.run.say_without_negative()

        def evaluate_one(conds: list[Conds | None], z: torch.Tensor, options: ModelOptions) -> list[torch.Tensor]:
            conds, options = in_one_call(self.run.model, self.run.views, conds, z, sigma, options)
            with refused_size(self.run.model, z):
                return evaluate(self.run.model, conds, z, sigma, options)

        positive, negative = predict_views(evaluate_one, views, x, self.options)
        return self.combined(x, sigma, positive, None if skip_negative else negative)

    def combined(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        positive: Sequence[torch.Tensor],
        negative: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """One positive and one negative prediction; without a negative the host expects zeros."""
        model_sampling, highest = self.run.model.model_sampling, float(sigma.max())
        signal, noise = signal_and_noise(model_sampling, highest)
        cond, uncond = self.run.combine(
            Predictions(
                x=x,
                signal=signal,
                sigma=noise,
                percent=percent_of(model_sampling, highest),
                step=step_of(self.options.get("transformer_options", {}), highest),
                positive=tuple(positive),
                negative=None if negative is None else tuple(negative),
                cfg=self.cfg,
                extents=tuple(self._extent(view, x, sigma) for view in self.run.views),
                memory=self.run.memory,
            )
        )
        return [cond, torch.zeros_like(cond) if uncond is None else uncond]

    @staticmethod
    def _extent(view: ViewConds, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor | None:
        """Where the view acts at this noise level, in the canonical frame; None is everywhere."""
        where = extent_of(view, view.view.forward(x), sigma)
        return None if where is None else in_canonical_frame(view.view, where)

    def options_for_repeated_calls(self) -> ModelOptions:
        """A copy of the options for patches that evaluate again after guidance, with the conditioning of all views.

        Each view is then evaluated with its own entries in its own frame, and the predictions are combined. A
        rectification or a view's own cfg gets no negative then, since none is evaluated.
        """
        options = comfy.model_patcher.create_model_options_clone(self.options)
        kind = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
        comfy.patcher_extension.add_wrapper_with_key(
            kind, keys.VIEWS, self._evaluate_again, options, is_model_options=True
        )
        return options

    def _evaluate_again(
        self,
        executor: Executor,
        model: BaseModel,
        conds: list[Conds | None],
        x: torch.Tensor,
        sigma: torch.Tensor,
        options: ModelOptions,
    ) -> list[torch.Tensor]:
        """The host's batched evaluation as such a patch meets it."""
        views = self.run.views

        def evaluate_one(conds: list[Conds | None], z: torch.Tensor, options: ModelOptions) -> list[torch.Tensor]:
            conds, options = in_one_call(self.run.model, self.run.views, conds, z, sigma, options)
            return executor(model, conds, z, sigma, options)

        def prediction_of(number: int, cond: Conds | None) -> torch.Tensor:
            own, numbers = _by_view(cond, views), {entry["uuid"]: number for entry in cond or ()}
            if not own:
                alone, own_options = with_cond_or_uncond([cond], in_frames(options, frames_of(views)), numbers)
                return evaluate_one(alone, x, own_options)[0]
            return self.combined(x, sigma, predict_views(evaluate_one, own, x, options, numbers)[0])[0]

        if len(views) == 1 and not any(needs_own_frame(cond) for cond in conds):  # one call, as it would be without us
            return evaluate_one(conds, x, in_frames(options, frames_of(views)))
        return [prediction_of(number, cond) for number, cond in enumerate(conds)]  # the host's own numbers


def _by_view(cond: Conds | None, views: Sequence[ViewConds]) -> list[ViewConds]:
    """A conditioning sorted by view. Empty unless it belongs to all of them and to nothing else."""
    own = [[entry for entry in cond or () if entry["uuid"] in frames_of([v])] for v in views]
    if not all(own) or sum(map(len, own)) < len(cond or ()):
        return []
    return [replace(v, positive=entries, negative=None) for v, entries in zip(views, own, strict=True)]
