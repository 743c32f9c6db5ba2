"""Training an erasure on the host's loaded models: what the loop in ``methods/erase/train.py`` needs of the host."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

import comfy.model_management
import comfy.utils
import torch

from ...methods.erase.train import Ending, LayerFactors, LoopHooks, Outcome, copied, joined, new_factors, train
from ...methods.erase.trained.context import (
    ConceptPrompts,
    Pictures,
    PreservedPrompts,
    TextEncoderContext,
    TrainingContext,
    TrainingTexts,
    Trajectories,
    UNetContext,
)
from ...methods.erase.trained.plan import Plan
from ...methods.erase.trained.prompts import EncodedPrompts
from ...methods.erase.trained.trajectories import TrajectoryBank
from ..engine.gradients import differentiable, differentiable_options, loss_scale, temporarily_set
from ..engine.preview import preview_message, small_picture
from ..lora.adapters import Layers, attached, layers_named, shapes_of, unet_layers
from ..types import CLIP, BaseModel, ModelPatcher, TextEncoder
from . import predictions
from .text_encoder import encode_texts, text_layers
from .trajectories import noise_for, sampler_of

log = logging.getLogger(__name__)

Cancelled = comfy.model_management.InterruptProcessingException
PREVIEW_STEPS = 8
ContextT = TypeVar("ContextT", bound=TrainingContext)
STEPS_PER_ITERATION = 8  # sampling steps that cost about as much as one iteration


class Trained(NamedTuple):
    """The outcome of the loop, and small pictures of the concept's prompt along the way, (n, h, w, 3) in 0..1 (or
    None)."""

    outcome: Outcome
    previews: torch.Tensor | None


def _encoded(clip: CLIP, texts: TrainingTexts) -> ConceptPrompts:
    concept, anchor, empty = (predictions.prompts_of(clip, some) for some in (texts.concept, texts.anchor, ("",)))
    return ConceptPrompts(concept, anchor, empty, texts.concepts, texts.replaced)


class Session(ABC, Generic[ContextT]):
    """One training while it runs.

    Args:
        layers: what gets adapters, of the UNet or of the text encoder.
        others: the patcher of the text encoder, if its layers are trained. It is loaded with the model.
    """

    def __init__(
        self, model: ModelPatcher, clip: CLIP, plan: Plan[ContextT], layers: Layers, others: Sequence[ModelPatcher] = ()
    ) -> None:
        self.plan, self.clip, self.layers, self.others = plan, clip, layers, others
        self.prompts = _encoded(clip, plan.texts)
        self.model = predictions.loaded(model, *others)[0]
        self.base, self.device = self.model.model, self.model.load_device
        self.factor_device = [self.model, *others][-1].load_device
        self.factors = self._new_factors()
        self.bar, self.done = comfy.utils.ProgressBar(self.progress_total()), 0.0
        self.previews: list[torch.Tensor] = []

    @abstractmethod
    def context(self, pictures: Pictures) -> ContextT:
        """What the method gets. ``pictures`` are as the model sees them."""

    @abstractmethod
    def start(self) -> LayerFactors:
        """The factors to continue from."""

    @abstractmethod
    def first_prompt(self) -> EncodedPrompts:
        """The concept's first prompt, as it is encoded now."""

    def progress_total(self) -> int:
        """Length of the progress bar, in iterations."""
        return self.plan.schedule.iterations

    def networks(self) -> list[BaseModel | TextEncoder]:
        """The networks that gradients go through."""
        return [self.base]

    def run(self, pictures: Pictures | None) -> Trained:
        """Trains, and shows pictures along the way."""
        plan, options = self.plan, self.plan.options
        context = self.context(self._as_the_model_sees(pictures))
        with self._region():
            losses_of = plan.recipe.method(context, plan.settings)
        cancel_errors = Cancelled if options.keep_on_cancel else ()
        hooks = LoopHooks(self._region, self._after_iteration, cancel_errors, context.loss_scale)
        outcome = train(self.factors, losses_of, plan.schedule, options.seed, hooks)
        self._last_preview(outcome)
        return Trained(outcome, torch.stack(self.previews) if self.previews else None)

    def _new_factors(self) -> LayerFactors:
        start = self.start()
        fresh = new_factors(shapes_of(self.layers), self.plan.options.rank, self.plan.options.seed)
        with torch.inference_mode(False):
            return copied(joined(start, fresh) if start else fresh, self.factor_device)

    def _as_the_model_sees(self, pictures: Pictures | None) -> Pictures:
        if pictures is None:
            return Pictures()
        with torch.inference_mode(False):
            latents = self.base.process_latent_in(pictures.latents.clone()).to(self.device, torch.float32)
        return Pictures(latents, pictures.concept_of)

    def _prompts_on_device(self) -> ConceptPrompts:
        prompts, moved = self.prompts, self.on_device
        concept, anchor = moved(prompts.concept), moved(prompts.anchor)
        return replace(prompts, concept=concept, anchor=anchor, empty=moved(prompts.empty))

    def on_device(self, prompt: EncodedPrompts) -> EncodedPrompts:
        """The prompt on the model's device, in float32, as ordinary tensors."""
        with torch.inference_mode(False):
            pooled = None if prompt.pooled is None else prompt.pooled.to(self.device, torch.float32)
            return EncodedPrompts(prompt.context.to(self.device, torch.float32), pooled)

    @contextlib.contextmanager
    def _region(self) -> Iterator[None]:
        if getattr(self.base, "model_lowvram", False):  # something else needed memory in between
            predictions.loaded(self.model, *self.others)
        patcher = temporarily_set(self.base, "current_patcher", self.model)
        with patcher, differentiable(*self.networks(), in_place=bool(self.others)):
            yield

    def outputs(self, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[EncodedPrompts]) -> torch.Tensor:
        """The model's own output for each prompt at each row.

        Raises:
            InterruptProcessingException: the user cancels.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        options = differentiable_options(self.model.model_options)
        return predictions.outputs(self.base, prompts, x, sigma, options)

    def adapters(self, on: bool) -> contextlib.AbstractContextManager[None]:
        """A context with the adapters attached, if they are ``on``."""
        return attached(self.layers, self.factors) if on else contextlib.nullcontext()

    def progress(self, share: float, picture: torch.Tensor | None = None) -> None:
        """Moves the progress bar by a share of an iteration."""
        self.done += share
        self.bar.update_absolute(int(self.done), self.bar.total, None if picture is None else preview_message(picture))

    def _after_iteration(self, iteration: int, so_far: Outcome) -> None:
        every, picture = self.plan.options.preview_every, None
        if every and iteration % every == 0:
            picture = self._preview()
        self.progress(1, picture)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _last_preview(self, outcome: Outcome) -> None:
        """A picture of the final state, unless it was shown already or the user waits for the end."""
        every = self.plan.options.preview_every
        shown_already = (len(outcome.erase) - 1) % max(every, 1) == 0
        if not every or shown_already or outcome.ending is Ending.CANCELLED:
            return
        self.factors = copied(outcome.factors, self.factor_device)
        with contextlib.suppress(Cancelled):  # a finished training is not lost for a picture
            self._preview()

    def _preview(self) -> torch.Tensor | None:
        """Keeps and returns a picture of the concept's first prompt by the model with its adapter, always from one
        noise.

        None if there is no memory for it.
        """
        options = self.plan.options
        sampler = replace(sampler_of(self.model, self.prompts.empty, self.plan), steps=PREVIEW_STEPS)
        try:
            with torch.no_grad(), self.adapters(True):
                noise = noise_for(self.model, [options.seed], options.size)
                picture = small_picture(self.model, sampler.sample(self.first_prompt(), noise))
        except comfy.model_management.OOM_EXCEPTION:
            log.warning("There was no memory for a preview picture; the training goes on without.")
            return None
        if picture is not None:
            self.previews.append(picture)
        return picture


class UNetSession(Session[UNetContext]):
    """The adapters are the UNet's.

    Raises:
        ValueError: the model is not a UNet, or lacks the layers.
    """

    def __init__(self, model: ModelPatcher, clip: CLIP, plan: Plan[UNetContext]) -> None:
        options = plan.options
        layers = unet_layers(model.model, options.target_modules) | layers_named(model.model, options.start.on_model())
        texts = plan.texts.preserved
        self.preserved = predictions.prompts_of(clip, texts) if texts else None  # before the model is loaded
        super().__init__(model, clip, plan, layers)

    def start(self) -> LayerFactors:
        return self.plan.options.start.on_model()

    def first_prompt(self) -> EncodedPrompts:
        return self.prompts.concept.at(slice(0, 1))

    def progress_total(self) -> int:
        return super().progress_total() + self.plan.sampled_steps // STEPS_PER_ITERATION

    def context(self, pictures: Pictures) -> UNetContext:
        trajectories = self._trajectories()
        with torch.inference_mode(False):
            return UNetContext(
                predict=self._predict,
                prompts=self._prompts_on_device(),
                noise=predictions.noise_process(self.base.model_sampling, self.device),
                pictures=pictures,
                loss_scale=loss_scale(self.base),
                device=self.device,
                trajectories=trajectories,
            )

    def _trajectories(self) -> Trajectories:
        plan, prompts, preserved = self.plan.trajectories, self.prompts, None
        concept = self._bank(prompts.concept, plan.count)
        if self.preserved is not None:
            bank = self._bank(self.preserved, len(self.preserved.context))
            preserved = PreservedPrompts(self.on_device(self.preserved), bank)
        if not plan.of_anchor:
            return Trajectories(concept, preserved=preserved)
        return Trajectories(concept, self._bank(prompts.anchor, plan.count), preserved)

    def _bank(self, prompts: EncodedPrompts, count: int) -> TrajectoryBank:
        rows = [i % len(prompts.context) for i in range(count)]
        sampler = sampler_of(self.model, self.prompts.empty, self.plan)
        share = 1 / STEPS_PER_ITERATION
        return sampler.sample_trajectories(prompts, rows, self.plan.options.seed, lambda n: self.progress(n * share))

    def _predict(
        self, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[EncodedPrompts], *, adapted: bool
    ) -> torch.Tensor:
        with self.adapters(adapted):
            return self.outputs(x, sigma, prompts)


class TextEncoderSession(Session[TextEncoderContext]):
    """The adapters are the text encoder's.

    Raises:
        ValueError: the text encoder is not of the CLIP kind, or lacks the layers.
    """

    def __init__(self, model: ModelPatcher, clip: CLIP, plan: Plan[TextEncoderContext]) -> None:
        layers = text_layers(clip) | layers_named(clip.cond_stage_model, plan.options.start.on_clip())
        super().__init__(model, clip, plan, layers, [clip.patcher])

    def start(self) -> LayerFactors:
        return self.plan.options.start.on_clip()

    def first_prompt(self) -> EncodedPrompts:
        return encode_texts(self.clip, self.plan.texts.concept[:1])

    def networks(self) -> list[BaseModel | TextEncoder]:
        return [self.base, self.clip.cond_stage_model]

    def context(self, pictures: Pictures) -> TextEncoderContext:
        with torch.inference_mode(False):
            return TextEncoderContext(
                predict=self._predict,
                prompts=self._prompts_on_device(),
                noise=predictions.noise_process(self.base.model_sampling, self.device),
                pictures=pictures,
                loss_scale=loss_scale(self.base),
                device=self.device,
                encode=self._encode,
                texts=self.plan.texts,
            )

    def _predict(
        self, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[EncodedPrompts], *, adapted: bool
    ) -> torch.Tensor:
        return self.outputs(x, sigma, prompts)

    def _encode(self, texts: Sequence[str], *, adapted: bool) -> EncodedPrompts:
        with self.adapters(adapted):
            return encode_texts(self.clip, texts)
