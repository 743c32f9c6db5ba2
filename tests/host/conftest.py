"""Tiny random models of every parameterisation, for what does not depend on a model that draws."""

from __future__ import annotations

import pytest
import torch

TINY_UNET = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "num_head_channels": 16, "num_heads": -1, "context_dim": 32,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None,
    "use_temporal_attention": False, "legacy": False,
}  # fmt: skip


SD15_SHAPED = TINY_UNET | {
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 24,
}  # fmt: skip
"""The blocks of SD 1.5 under the same numbers, with 32 channels instead of 320."""


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, unet: dict = TINY_UNET, *, native: bool = False):
    """A ModelPatcher around a random UNet of that type: EPS, V_PREDICTION or FLOW (the host's CONST sampling).

    ``native``: it computes in ``dtype`` as on a GPU, else half precision is only how the weights are stored.
    """
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base

    class Tiny(comfy.supported_models_base.BASE):
        unet_config = unet
        unet_extra_config = {"num_heads": -1, "num_head_channels": 16}
        latent_format = comfy.latent_formats.SD15
        memory_usage_factor = 1.0
        sampling_settings = {"shift": 3.0} if kind == "FLOW" else {}

        def model_type(self, state_dict, prefix=""):
            return getattr(comfy.model_base.ModelType, kind)

    with torch.inference_mode(False), torch.no_grad():
        config = Tiny(dict(unet))
        config.set_inference_dtype(dtype, None if native or dtype in (torch.float32, torch.float64) else torch.float32)
        model = config.get_model({}, "", device="cpu")
        generator = torch.Generator().manual_seed(5)
        for parameter in model.diffusion_model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.08).to(dtype))
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_models():
    return {name: tiny_model(name) for name in ("EPS", "V_PREDICTION", "FLOW")}


@pytest.fixture(scope="session")
def new_model():
    """Makes a tiny model: kind, dtype, ``SD15_SHAPED`` for the block numbers of SD 1.5, ``more`` of the UNet's config,
    and whether it computes in that dtype."""

    def make(
        kind: str = "EPS", dtype: torch.dtype = torch.float32, *, sd15: bool = False, more: dict | None = None,
        native: bool = False,
    ):  # fmt: skip
        return tiny_model(kind, dtype, (SD15_SHAPED if sd15 else TINY_UNET) | (more or {}), native=native)

    return make


@pytest.fixture(scope="session")
def control_net():
    """A ControlNet of the tiny UNet's shape with random weights, as a loader node makes it: of inference tensors."""
    import comfy.cldm.cldm
    import comfy.controlnet

    with torch.inference_mode():
        parts = {k: v for k, v in TINY_UNET.items() if k not in ("out_channels", "transformer_depth_output")}
        network = comfy.cldm.cldm.ControlNet(**parts, hint_channels=3, dtype=torch.float32, device="cpu")
        generator = torch.Generator().manual_seed(6)
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
        control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
        return control.copy().set_cond_hint(torch.rand(1, 3, 64, 64, generator=generator), 0.7)


@pytest.fixture
def drawn(monkeypatch) -> list[torch.Tensor]:
    """The noise that samplers draw while they sample, in order."""
    import comfy.k_diffusion.sampling

    found: list[torch.Tensor] = []
    default = comfy.k_diffusion.sampling.default_noise_sampler

    def watched(*args, **kwargs):
        draw = default(*args, **kwargs)
        return lambda *levels: (found.append(draw(*levels)), found[-1])[1]

    monkeypatch.setattr(comfy.k_diffusion.sampling, "default_noise_sampler", watched)
    return found
