"""Drawing with a demo model through the host's own sampler, outside of a server: for scores and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import comfy.sample
import comfy.sd
import comfy.utils
import torch

from .architecture import LATENTS
from .loader import load_demo_model


class Settings(NamedTuple):
    """What the host's sampler is asked for."""

    steps: int
    cfg: float
    sampler: str
    scheduler: str


SETTINGS = {"unet": Settings(20, 3.0, "euler", "normal"), "dit": Settings(12, 3.0, "euler", "simple")}
"""By the kind of demo model."""
STEPS, CFG, SAMPLER, SCHEDULER = SETTINGS["unet"]


def encode(clip: Any, prompt: str) -> list:
    """A prompt as CONDITIONING."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def noise_for(seeds: list[int], width: int = 128, height: int = 128, kind: str = "unet") -> torch.Tensor:
    """Noise (b, 4, h/f, w/f), each picture from its own seed: it does not depend on its batch."""
    channels, factor = LATENTS[kind]
    shape = (1, channels, height // factor, width // factor)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class DemoSampler:
    """A demo model with everything needed to turn a prompt into pictures."""

    def __init__(self, lora: Path | None = None, strength: float = 1.0, kind: str = "unet") -> None:
        self.model, self.clip, self.vae = load_demo_model(kind=kind)
        self.kind, self.settings = kind, SETTINGS[kind]
        if lora is not None:
            state = comfy.utils.load_torch_file(str(lora), safe_load=True)
            self.model, self.clip = comfy.sd.load_lora_for_models(self.model, self.clip, state, strength, strength)

    @torch.inference_mode()
    def sample(
        self, prompt: str, seeds: list[int], width: int = 128, height: int = 128, steps: int = 0
    ) -> torch.Tensor:
        """Pictures (b, h, w, 3) in 0..1, one per seed. ``steps``: 0 is the model's own number."""
        noise = noise_for(seeds, width, height, self.kind)
        settings = self.settings._replace(steps=steps or self.settings.steps)
        conditionings = encode(self.clip, prompt), encode(self.clip, "")
        start = torch.zeros_like(noise)
        latents = comfy.sample.sample(
            self.model, noise, *settings, *conditionings, start, disable_pbar=True, seed=seeds[0]
        )
        return self.vae.decode(latents).float()
