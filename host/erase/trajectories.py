"""Pictures and trajectories of the host's own sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.sample
import comfy.samplers
import torch

from ...methods.erase.trained.context import ContextT, Pictures
from ...methods.erase.trained.plan import Plan
from ...methods.erase.trained.prompts import EncodedPrompts
from ...methods.erase.trained.trajectories import TrajectoryBank
from ..types import CLIP, ModelPatcher, StepCallback
from .predictions import conditioning, prompts_of

SAMPLER, SCHEDULER = "euler", "normal"
BATCH = 8  # pictures sampled at once
OWN_PICTURES = 4  # per concept, sampled by the model itself if none are given
OWN_SEED_OFFSET = 1000  # so own pictures and trajectories do not start from the same noise


def noise_for(model: ModelPatcher, seeds: Sequence[int], size: tuple[int, int]) -> torch.Tensor:
    """Noise for latents of height × width cells, one seed per row."""
    channels = model.get_model_object("latent_format").latent_channels
    return torch.cat([torch.randn((1, channels, *size), generator=torch.Generator().manual_seed(s)) for s in seeds])


@dataclass(frozen=True)
class TrajectorySampler:
    """Samples a model for prompts, against the prompt ''.

    Attributes:
        empty: the prompt ''.
        size: height and width in latent cells.
    """

    model: ModelPatcher
    empty: EncodedPrompts
    size: tuple[int, int]
    steps: int
    cfg: float

    def sample(
        self, prompts: EncodedPrompts, noise: torch.Tensor, callback: StepCallback | None = None
    ) -> torch.Tensor:
        """Clean latents for the prompts, one per row of the noise."""
        return comfy.sample.sample(
            self.model,
            noise,
            self.steps,
            self.cfg,
            SAMPLER,
            SCHEDULER,
            conditioning(prompts),
            conditioning(self.empty),
            torch.zeros_like(noise),
            callback=callback,
            disable_pbar=True,
            seed=0,
        )

    def sample_trajectories(
        self,
        prompts: EncodedPrompts,
        rows: Sequence[int],
        seed: int,
        step_done: Callable[[int], None] = lambda count: None,
    ) -> TrajectoryBank:
        """One trajectory per entry of ``rows`` (a row of the prompts): the state before every step.

        Args:
            step_done: called with the number of trajectories that have made a step, for progress.
        """
        parts = []
        for first in range(0, len(rows), BATCH):
            batch = torch.tensor(rows[first : first + BATCH])
            noise = noise_for(self.model, [seed + first + i for i in range(len(batch))], self.size)
            parts.append(self._trajectories(prompts.at(batch), noise, step_done))
        with torch.inference_mode(False):
            return TrajectoryBank(torch.cat(parts).clone(), self._sigmas()[:-1].clone(), torch.tensor(rows))

    def _trajectories(
        self, prompts: EncodedPrompts, noise: torch.Tensor, step_done: Callable[[int], None]
    ) -> torch.Tensor:
        """States (rows, steps, channels, h, w) on the CPU in float16."""
        states: list[torch.Tensor] = []

        def keep_state(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
            states.append(x.detach().to("cpu", torch.float16, copy=True))
            step_done(len(noise))

        self.sample(prompts, noise, keep_state)
        return torch.stack(states, 1)

    def _sigmas(self) -> torch.Tensor:
        sampling = self.model.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, SCHEDULER, self.steps).float()


def sampler_of(model: ModelPatcher, empty: EncodedPrompts, plan: Plan[ContextT]) -> TrajectorySampler:
    """The sampler of a training's trajectories. ``empty``: the prompt ''."""
    return TrajectorySampler(model, empty, plan.options.size, plan.trajectories.steps, plan.trajectories.cfg)


def own_pictures(model: ModelPatcher, clip: CLIP, plan: Plan[ContextT]) -> Pictures:
    """Clean latents of every concept as the model draws it, sentence after sentence."""
    texts, options = plan.texts, plan.options
    count = OWN_PICTURES * texts.concepts
    prompts = prompts_of(clip, [texts.concept[i % len(texts.concept)] for i in range(count)])
    noise = noise_for(model, [options.seed + OWN_SEED_OFFSET + i for i in range(count)], options.size)
    sampler = sampler_of(model, prompts_of(clip, [""]), plan)
    return Pictures(sampler.sample(prompts, noise), tuple(i % texts.concepts for i in range(count)))
