"""A reference picture at every noise level, on models that add noise and on those that fade the picture."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_sampling
import pytest
import torch
from comfyui_concepts.host.conduct import layout
from comfyui_concepts.host.engine.sampling import signal_and_noise

SPREAD = 0.8
"""Of pictures from a normal distribution: what the best denoiser predicts is known, and so is where each goes."""


class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    pass


class Eps(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    pass


class Normal:
    """The best denoiser of such pictures, as a model under a prompt."""

    def __init__(self, kind):
        self.model, self.seen = SimpleNamespace(model_sampling=kind()), []

    def __call__(self, x, sigma):
        self.seen.append(x)
        signal, noise = signal_and_noise(self.model.model_sampling, sigma)
        return x * signal * SPREAD**2 / (signal**2 * SPREAD**2 + noise**2)

    def there(self, clean, sigma):
        """Where the flow of probability takes a clean picture."""
        signal, noise = signal_and_noise(self.model.model_sampling, sigma)
        return clean * (signal**2 * SPREAD**2 + noise**2) ** 0.5 / SPREAD


@pytest.fixture
def clean():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * SPREAD


def _levels(kind, count):
    highest = 1.0 if kind is Flow else 14.0
    return [highest * (number / count) ** 2 for number in range(1, count + 1)]


@pytest.mark.parametrize("kind", [Eps, Flow])
def test_inversion_takes_a_picture_where_the_flow_of_probability_does(kind, clean):
    gaps = []
    for count in (50, 200):
        denoiser, levels = Normal(kind), _levels(kind, count)
        latents = layout._inverted(denoiser, levels, clean)
        gaps.append((latents[levels[-1]] / denoiser.there(clean, levels[-1]) - 1).abs().max().item())
    assert gaps[1] < 0.01
    assert gaps[1] < gaps[0] / 3  # of first order: a quarter with steps of a quarter


def test_a_flow_model_sees_the_latent_itself_and_others_one_of_the_next_levels_size(clean):
    for kind in (Eps, Flow):
        denoiser, levels = Normal(kind), _levels(kind, 4)
        latents = layout._inverted(denoiser, levels, clean)
        before, after = levels[1:3]
        size = ((1 + after**2) / (1 + before**2)) ** 0.5 if kind is Eps else 1.0
        torch.testing.assert_close(denoiser.seen[2], latents[before] * size)


@pytest.mark.parametrize("kind", [Eps, Flow])
def test_forward_noise_mixes_as_the_model_was_trained(kind, clean):
    denoiser, levels = Normal(kind), _levels(kind, 3)
    latents = layout._noised(denoiser, levels, clean)
    noise = (latents[levels[0]] - signal_and_noise(denoiser.model.model_sampling, levels[0])[0] * clean) / levels[0]
    for sigma, x in latents.items():
        signal, share = signal_and_noise(denoiser.model.model_sampling, sigma)
        torch.testing.assert_close(x, signal * clean + share * noise)
    assert not denoiser.seen


def test_further_passes_find_the_step_that_sampling_takes_back(clean):
    gaps = {}
    for passes in (0, 2):
        denoiser, levels = Normal(Flow), _levels(Flow, 10)
        latents = layout._inverted(denoiser, levels, clean, passes)
        x = latents[levels[-1]]
        for sigma, after in zip(levels[::-1], [*levels[-2::-1], 0.0], strict=True):
            x = x + (after - sigma) * (x - denoiser(x, sigma)) / sigma
        gaps[passes] = float((x - clean).norm() / clean.norm())
        assert len(denoiser.seen) == len(levels) * (1 + passes) + len(levels)
    assert gaps[2] < gaps[0] / 3
