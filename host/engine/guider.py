"""The base of the pack's guiders: the host's signatures, room for more rows, previews, and one typed object per
sampling.

A guider of a verb says what a run is, how it begins, and how to predict with it::

    @dataclass
    class MyRun:
        conds: Conds

    class MyGuider(RunGuider[MyRun]):
        def begin(self, sampling: Sampling) -> MyRun:
            return MyRun(self.conds["positive"])

        def predict(self, run, x, sigma, options, seed):
            return self.guided(x, sigma, options, seed, positive=run.conds)

        def panels(self, run, x0, paint):
            return [Panel(paint(x0))]

The host's ``predict_noise`` returns the denoised latent; its name is historical.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch

from ...methods.panels import Panel
from ..types import BaseModel, Conds, Executor, ModelOptions, ModelPatcher, Options, Sampler, StepCallback, Wrapper
from .preview import Painter, with_previews

Run = TypeVar("Run")


class Sampling(NamedTuple):
    """What a sampling starts with; the model is loaded by then.

    ``noise`` and ``latent`` are (batch, channels, …, height, width) on the model's device, ``latent`` as the model sees
    clean latents. ``options`` are those of the first prediction. ``unprocessed`` and ``process`` serve guiders that
    process their conditionings themselves (``RunGuider.host_processes``).
    """

    model: BaseModel
    sampler: Sampler
    sigmas: torch.Tensor
    noise: torch.Tensor
    latent: torch.Tensor
    denoise_mask: torch.Tensor | None
    options: ModelOptions
    seed: int | None
    unprocessed: dict[str, Conds]
    further: Options
    """More arguments of the host for ``process_conds``; newer hosts have some."""

    def process(self, conds: dict[str, Conds]) -> dict[str, Conds]:
        """The conditionings as the host processes those that it samples together. The names mean what they do there."""
        device = self.model.current_patcher.load_device
        return comfy.samplers.process_conds(
            self.model, self.noise, conds, device, self.latent, self.denoise_mask, self.seed, **self.further
        )


class RunGuider(comfy.samplers.CFGGuider, Generic[Run]):
    """A guider with one run object per sampling.

    ``run`` is made by ``begin`` and dropped at the end, also after an error or a cancel. Where ``is_plain`` says so,
    the host's own guider samples, bit for bit.

    Args:
        key: of ``host.keys``, for the guider's wrappers.
        row_factor: how many times the rows that the host expects; it makes room for them.
    """

    model_options: ModelOptions
    inner_model: BaseModel  # the host's, during a sampling
    conds: dict[str, Conds]  # the host's, during a sampling: by name. It cleans up whatever is in it at the end
    run: Run | None = None
    shows_panels: bool = True
    """Whether previews are ``panels``; otherwise they are the host's."""
    host_processes: bool = True
    """Whether the host processes all conditionings together. If not, ``begin`` does: it gets them in
    ``sampling.unprocessed`` and writes the processed ones into ``self.conds``, under the same names."""

    def __init__(self, model: ModelPatcher, cfg: float, key: str, row_factor: int = 1) -> None:
        super().__init__(model)
        self.set_cfg(cfg)
        self.key = key
        if row_factor > 1:
            kind = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
            self.model_options = _with_wrapper(self.model_options, kind, key, asking_for_room(row_factor))

    def is_plain(self) -> bool:
        """Whether this guider has nothing to add."""
        return False

    def begin(self, sampling: Sampling) -> Run:
        """The run of one sampling. ``self.conds`` holds the processed conditionings by now."""
        raise NotImplementedError

    def first_noise(self, run: Run, sampling: Sampling) -> torch.Tensor:
        """The noise to start from; here, the one that was given."""
        return sampling.noise

    def predict(
        self, run: Run, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions, seed: int | None
    ) -> torch.Tensor:
        """The denoised latent for the noisy latent ``x``, of the same shape."""
        raise NotImplementedError

    def panels(self, run: Run, x0: torch.Tensor, paint: Painter) -> Sequence[Panel]:
        """The preview of a step, of its clean latents ``x0``."""
        return [Panel(paint(x0))]

    def finish(self, run: Run) -> None:
        """Follows a complete sampling; not after an error or a cancel."""

    def guided(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        options: ModelOptions,
        seed: int | None,
        positive: Conds | None = None,
        negative: Conds | None = None,
    ) -> torch.Tensor:
        """The host's guided prediction: its batched evaluation, its cfg function, and the patches around both.

        Args:
            positive, negative: instead of the conditionings of those names.
        """
        positive = self.conds.get("positive") if positive is None else positive
        negative = self.conds.get("negative") if negative is None else negative
        return comfy.samplers.sampling_function(
            self.inner_model, x, sigma, negative, positive, self.cfg, model_options=options, seed=seed
        )

    def predict_noise(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: ModelOptions | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """The denoised latent, as the host calls it."""
        if self.run is None:
            return super().predict_noise(x, timestep, model_options or {}, seed)
        return self.predict(self.run, x, timestep, model_options or {}, seed)

    def inner_sample(self, *args: object, **kwargs: object) -> torch.Tensor:
        """One sampling, as the host calls it."""
        if self.is_plain():
            return super().inner_sample(*args, **kwargs)
        options, unprocessed = self.model_options, {} if self.host_processes else self.conds
        kind, around = comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, partial(self._run, unprocessed, kwargs)
        self.model_options = _with_wrapper(options, kind, self.key, around)
        self.conds = self.conds if self.host_processes else {}
        try:
            return super().inner_sample(*args, **kwargs)
        finally:
            self.run, self.model_options, self.conds = None, options, {**unprocessed, **self.conds}

    def _run(
        self,
        unprocessed: dict[str, Conds],
        further: Options,
        executor: Executor,
        guider: object,
        sigmas: torch.Tensor,
        extra_args: Options,
        callback: StepCallback | None,
        noise: torch.Tensor,
        latent: torch.Tensor,
        denoise_mask: torch.Tensor | None,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        """Around the sampler: the host has loaded the model and processed the conditionings."""
        start = (sigmas, noise, latent, denoise_mask, extra_args["model_options"], extra_args.get("seed"))
        sampling = Sampling(self.inner_model, executor.class_obj, *start, unprocessed, further)
        self.run = run = self.begin(sampling)
        if self.shows_panels:
            callback = with_previews(callback, self.model_patcher, partial(self.panels, run))
        noise = self.first_noise(run, sampling)
        out = executor(guider, sigmas, extra_args, callback, noise, latent, denoise_mask, *args, **kwargs)
        self.finish(run)
        return out


def asking_for_room(row_factor: int) -> Wrapper:
    """A wrapper of the host's ``PREPARE_SAMPLING`` that has the model loaded with room for more rows.

    Without that room the host splits the batch.

    Args:
        row_factor: how many times the rows that the host expects.
    """

    def wrapper(executor: Executor, model: object, noise_shape: torch.Size, *args: object, **kwargs: object) -> object:
        return executor(model, [row_factor * noise_shape[0], *noise_shape[1:]], *args, **kwargs)

    return wrapper


def _with_wrapper(model_options: ModelOptions, kind: str, key: str, wrapper: Wrapper) -> ModelOptions:
    options = comfy.model_patcher.create_model_options_clone(model_options)
    comfy.patcher_extension.add_wrapper_with_key(kind, key, wrapper, options, is_model_options=True)
    return options
