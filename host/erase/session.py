"""Training an erasure on the host's loaded models: what the loop in ``methods/erase/train.py`` needs of the host."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
import comfy.utils
import torch

from ...methods.erase.train import Factors, Outcome, Schedule, copied, joined, new_factors, train
from ...methods.erase.trained.ground import Bank, Encoded, Ground, Method, Settings
from ..engine.gradients import (
    check_differentiable,
    check_patcher,
    differentiable,
    differentiable_options,
    loss_scale,
    temporarily_set,
)
from ..engine.preview import preview_message, small_picture
from ..lora.adapters import Layers, attached, layers_named, shapes_of, unet_layers
from . import predictions
from .text_encoder import encoded, text_layers
from .trajectories import draw_bank, noise_for, paint
from .weights import check_clip_width

log = logging.getLogger(__name__)

Cancelled = comfy.model_management.InterruptProcessingException
PREVIEW_STEPS = 8
STATES = 8  # steps of a trajectory that cost about as much as an iteration


@dataclass(frozen=True)
class Plan:
    """One training.

    Attributes:
        concept, anchor: texts in corresponding pairs: with the concept, and with what it becomes. They go round ``concepts``
            concepts: pair i is of number i mod ``concepts``.
        replaced: for each pair, whether the anchor names something or is the rest of the text; empty: all name something.
        kept: texts whose pictures must not change.
        method: what computes the losses.
        place, rank: which layers of the UNet are trained (a name of ``PLACES``), and the rank of their change.
        size: height and width of the training's latents in cells.
        trajectories, steps, cfg: how the states to train at are sampled; ``anchor_states`` has the anchor's sampled as well.
        start: factors to go on from.
        keep_on_cancel: whether a cancel keeps what has been learned, or goes on to the host.
    """

    concept: tuple[str, ...]
    anchor: tuple[str, ...]
    method: Method
    schedule: Schedule
    settings: Settings = field(default_factory=Settings)
    kept: tuple[str, ...] = ()
    place: str = "cross k/v"
    rank: int = 16
    seed: int = 0
    size: tuple[int, int] = (64, 64)
    trajectories: int = 16
    anchor_states: bool = False
    steps: int = 20
    cfg: float = 3.0
    start: Factors = field(default_factory=dict)
    preview_every: int = 50
    keep_on_cancel: bool = True
    concepts: int = 1
    replaced: tuple[bool, ...] = ()

    def states(self) -> int:
        """How many steps of trajectories are sampled before the training."""
        return (self.trajectories * (2 if self.anchor_states else 1) + len(self.kept)) * self.steps


class Pictures(NamedTuple):
    """Clean latents of the concept, as a VAE gives them, and the number of the concept each shows (empty: not known)."""

    latents: torch.Tensor
    shown: tuple[int, ...] = ()


class Trained(NamedTuple):
    """The outcome of the loop and small pictures of the concept's prompt along the way, (n, h, w, 3) in 0..1 (or None)."""

    outcome: Outcome
    previews: torch.Tensor | None


def train_unet(model: Any, clip: Any, plan: Plan, images: Pictures | None = None) -> Trained:
    """Trains factors for the UNet's layers.

    Args:
        images: of the concept, for the methods that use pictures.

    Raises:
        ValueError: the model cannot be trained (compiled, quantised, too large to be loaded as a whole, no UNet), or the text
            encoder is not one it reads.
    """
    check_trainable(model, clip)
    layers = unet_layers(model.model, plan.place) | layers_named(model.model, plan.start)
    concept, anchor, empty = (predictions.prompts_of(clip, t) for t in (plan.concept, plan.anchor, ("",)))
    kept = predictions.prompts_of(clip, plan.kept) if plan.kept else None
    return _Session(model, layers, plan).run(concept, anchor, empty, kept, images)


def train_text_encoder(model: Any, clip: Any, plan: Plan, images: Pictures) -> Trained:
    """Trains factors for the layers of the text encoder, through the model.

    Raises:
        ValueError: as ``train_unet``; the text encoder is of another kind.
    """
    check_trainable(model, clip)
    layers = text_layers(clip) | layers_named(clip.cond_stage_model, plan.start)
    concept, anchor, empty = (predictions.prompts_of(clip, t) for t in (plan.concept, plan.anchor, ("",)))
    return _Session(model, layers, plan, clip).run(concept, anchor, empty, None, images)


def check_trainable(model: Any, clip: Any) -> None:
    """Refuses what cannot be trained, before any work is done.

    Raises:
        ValueError: what stands in the way.
    """
    check_patcher(model)
    check_differentiable(model.model)
    check_clip_width(model, predictions.prompts_of(clip, [""]).context.shape[-1])


class _Session:
    """One training while it runs. With ``clip`` given the adapters are the text encoder's, else the UNet's."""

    def __init__(self, model: Any, layers: Layers, plan: Plan, clip: Any = None) -> None:
        self.layers, self.plan, self.clip = layers, plan, clip
        self.model = predictions.loaded(*[model] if clip is None else [model, clip.patcher])[0]
        self.base, self.device = self.model.model, self.model.load_device
        fresh = new_factors(shapes_of(layers), plan.rank, plan.seed)
        self.trained_on = self.device if clip is None else clip.patcher.load_device
        with torch.inference_mode(False):
            self.factors = copied(joined(plan.start, fresh) if plan.start else fresh, self.trained_on)
        states = plan.states() if clip is None else 0
        self.bar, self.done = comfy.utils.ProgressBar(plan.schedule.iterations + states // STATES), 0.0
        self.previews: list[torch.Tensor] = []

    def run(
        self, concept: Encoded, anchor: Encoded, empty: Encoded, kept: Encoded | None, images: Pictures | None
    ) -> Trained:
        plan = self.plan
        ground = self._ground(concept, anchor, empty, kept, images)
        with self._region():
            terms_of = plan.method(ground, plan.settings)
        outcome = train(
            self.factors, terms_of, plan.schedule, plan.seed, region=self._region,
            watch=lambda iteration, so_far: self._watch(iteration, concept, empty),
            cancelled=Cancelled if plan.keep_on_cancel else (), loss_scale=ground.loss_scale,
        )  # fmt: skip
        self._last_preview(outcome, concept, empty)
        return Trained(outcome, torch.stack(self.previews) if self.previews else None)

    def _ground(
        self, concept: Encoded, anchor: Encoded, empty: Encoded, kept: Encoded | None, images: Pictures | None
    ) -> Ground:
        plan, sampling = self.plan, self.base.model_sampling
        bank = self._bank(concept, empty, plan.trajectories) if plan.trajectories else None
        kept_bank = self._bank(kept, empty, len(plan.kept)) if kept else None
        anchors = self._bank(anchor, empty, plan.trajectories) if plan.anchor_states else None
        with torch.inference_mode(False):
            latents = None
            if images is not None:
                latents = self.base.process_latent_in(images.latents.clone()).to(self.device, torch.float32)
            return Ground(
                self._predict,
                *(self._moved(p) for p in (concept, anchor, empty)),
                bank=bank,
                anchor_bank=anchors,
                preserved=self._moved(kept) if kept else None,
                kept=kept_bank,
                encode=self._encode,
                texts=plan.concept,
                anchor_texts=plan.anchor,
                kept_texts=plan.kept,
                concepts=plan.concepts,
                replaced=plan.replaced,
                images=latents,
                pictured=images.shown if images is not None else (),
                loss_scale=loss_scale(self.base),
                sigmas=predictions.noise_levels(sampling).to(self.device),
                noised=partial(predictions.noised, sampling),
                target=partial(predictions.target_of, sampling),
                clean_of=partial(predictions.clean_of, sampling),
                device=self.device,
            )

    @contextlib.contextmanager
    def _region(self) -> Iterator[None]:
        if getattr(self.base, "model_lowvram", False):  # something else wanted memory in between
            predictions.loaded(*[self.model] if self.clip is None else [self.model, self.clip.patcher])
        models = [self.base] if self.clip is None else [self.base, self.clip.cond_stage_model]
        patcher = temporarily_set(self.base, "current_patcher", self.model)
        with patcher, differentiable(*models, in_place=self.clip is not None):
            yield

    def _predict(
        self, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[Encoded], *, adapted: bool
    ) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        options = differentiable_options(self.model.model_options)
        with self._adapters(adapted and self.clip is None):
            return predictions.outputs(self.base, prompts, x, sigma, options)

    def _encode(self, texts: Sequence[str], *, adapted: bool) -> Encoded:
        with self._adapters(adapted):
            return encoded(self.clip, texts)

    def _adapters(self, on: bool) -> contextlib.AbstractContextManager:
        return attached(self.layers, self.factors) if on else contextlib.nullcontext()

    def _last_preview(self, outcome: Outcome, concept: Encoded, empty: Encoded) -> None:
        """The state the training ended with, unless it was shown already or somebody waits for the end."""
        shown_already = (len(outcome.erase) - 1) % max(self.plan.preview_every, 1) == 0
        if not self.plan.preview_every or shown_already or outcome.reason.startswith("cancelled"):
            return
        self.factors = copied(outcome.factors, self.trained_on)
        with contextlib.suppress(Cancelled):  # a finished training is not lost for a picture
            if (picture := self._painted(concept, empty)) is not None:
                self.previews.append(picture)

    def _moved(self, prompt: Encoded) -> Encoded:
        pooled = None if prompt.pooled is None else prompt.pooled.to(self.device, torch.float32)
        return Encoded(prompt.context.to(self.device, torch.float32), pooled)

    def _bank(self, prompts: Encoded, empty: Encoded, count: int) -> Bank:
        which = [i % len(prompts.context) for i in range(count)]
        plan, share = self.plan, 1 / STATES
        return draw_bank(
            self.model, prompts, empty, which, plan.seed, plan.size, plan.steps, plan.cfg,
            lambda rows: self._progress(rows * share),
        )  # fmt: skip

    def _progress(self, share: float, picture: torch.Tensor | None = None) -> None:
        self.done += share
        self.bar.update_absolute(int(self.done), self.bar.total, None if picture is None else preview_message(picture))

    def _watch(self, iteration: int, concept: Encoded, empty: Encoded) -> None:
        picture = None
        if self.plan.preview_every and iteration % self.plan.preview_every == 0:
            picture = self._painted(concept, empty)
            if picture is not None:
                self.previews.append(picture)
        self._progress(1, picture)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _painted(self, concept: Encoded, empty: Encoded) -> torch.Tensor | None:
        """The concept's first prompt as the model with its adapter draws it now, from the same noise every time; None where
        there is no memory for it."""
        try:
            with torch.no_grad(), self._adapters(True):
                prompt = concept.at(slice(0, 1))
                if self.clip is not None:
                    prompt = encoded(self.clip, self.plan.concept[:1])
                noise = noise_for(self.model, [self.plan.seed], *self.plan.size)
                return small_picture(self.model, paint(self.model, prompt, empty, noise, PREVIEW_STEPS, self.plan.cfg))
        except comfy.model_management.OOM_EXCEPTION:
            log.warning("There was no memory for a preview picture; the training goes on without.")
            return None
