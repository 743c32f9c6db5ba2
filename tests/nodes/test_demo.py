"""The node of the demo models."""

from __future__ import annotations

import pytest
from comfyui_concepts.nodes.demo import ARCHITECTURES, ConceptsDemoModel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_demo_model_comes_with_its_own_empty_canvas(architecture):
    model, clip, vae, latent = ConceptsDemoModel.execute(architecture).args
    assert latent["samples"].shape[1] == model.model.latent_format.latent_channels
    assert not latent["samples"].any()
    assert vae.decode(latent["samples"]).shape == (1, 128, 128, 3)
    assert clip.encode_from_tokens(clip.tokenize("a cat")).shape[-1] == 128


def test_a_file_from_before_the_choice_gets_the_unet():
    assert type(ConceptsDemoModel.execute().args[0].model.diffusion_model).__name__ == "UNetModel"


def test_an_unknown_architecture_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="UNet.*diffusion transformer"):
        ConceptsDemoModel.execute("mixture of experts")
