"""What is known of a sampling against what the host itself does."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_base
import pytest
import torch
from comfyui_concepts.host.engine.sampling import signal_and_noise


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
def test_a_latent_has_the_signal_and_the_noise_that_the_host_mixes(kind, scale):
    """A host that knows no scale of the noise leaves it at one, and so do we."""
    settings = SimpleNamespace(sampling_settings={"shift": 3.0, "noise_scale": scale})
    sampling = comfy.model_base.model_sampling(settings, getattr(comfy.model_base.ModelType, kind))
    sigma = float(sampling.percent_to_sigma(0.4))
    clean, noise = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    mixed = sampling.noise_scaling(torch.tensor([sigma]), noise.clone(), clean, False)
    signal, level = signal_and_noise(sampling, sigma)
    assert torch.allclose(signal * clean + level * noise, mixed, atol=1e-5)
