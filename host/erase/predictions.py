"""A loaded model's own output for encoded prompts, through the host's batched evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch

from ...methods.erase.trained.ground import Encoded, stacked
from ..engine.gradients import plain_patcher


def conditioning(prompt: Encoded) -> list:
    """The prompt as the host's CONDITIONING."""
    return [[prompt.context, {} if prompt.pooled is None else {"pooled_output": prompt.pooled}]]


def prompts_of(clip: Any, texts: Sequence[str]) -> Encoded:
    """Texts encoded by the host, one a row, as ordinary tensors.

    Raises:
        ValueError: a text is longer than one section of the encoder.
    """
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts]
    for text, entries in zip(texts, encoded, strict=True):
        if len(entries) != 1 or entries[0][0].shape[1] != encoded[0][0][0].shape[1]:
            raise ValueError(f"The prompt '{text}' is longer than one section of the text encoder; shorten it.")
    with torch.inference_mode(False):
        rows = [(entry[0][0].clone(), entry[0][1].get("pooled_output")) for entry in encoded]
        return stacked([Encoded(c, None if pooled is None else pooled.clone()) for c, pooled in rows])


def loaded(*patchers: Any) -> list[Any]:
    """The patchers with their models wholly on the device, in a form whose weights autograd can see.

    Raises:
        ValueError: a model does not fit.
    """
    plain = [plain_patcher(patcher) for patcher in patchers]
    comfy.model_management.load_models_gpu(plain, force_full_load=True)
    for patcher in plain:
        if getattr(patcher.model, "model_lowvram", False):
            raise ValueError(
                "This model does not fit into the graphics memory as a whole, and training cannot work on parts of it; "
                "start ComfyUI with --highvram or close other programs, train at a smaller size, or use a closed-form edit."
            )
    return plain


def outputs(
    model: Any, prompts: Sequence[Encoded], x: torch.Tensor, sigma: torch.Tensor, model_options: dict[str, Any]
) -> torch.Tensor:
    """The model's own output (noise, velocity, …) for each prompt at each row, (prompts, rows, channels, h, w).

    Args:
        model: the host's BaseModel, loaded, with its ``current_patcher`` set.
        prompts: each of one row, or of as many rows as ``x``.
        x: (rows, channels, h, w) in the model's latent space; ``sigma``: (rows,).
    """
    conds = [comfy.sampler_helpers.convert_cond(conditioning(prompt)) for prompt in prompts]
    for cond in conds:
        comfy.samplers.encode_model_conds(model.extra_conds, cond, x, x.device, "positive")
    clean = torch.stack(comfy.samplers.calc_cond_batch(model, conds, x, sigma, model_options))
    return output_of(model.model_sampling, x, sigma, clean)


def output_of(model_sampling: Any, x: torch.Tensor, sigma: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """The network's output that the host turns into ``clean`` at ``x``: its formula is affine in the output, for every
    parameterisation, so two evaluations of it are enough to invert it."""
    nothing = model_sampling.calculate_denoised(sigma, torch.zeros_like(x), x)
    slope = model_sampling.calculate_denoised(sigma, torch.ones_like(x), x) - nothing
    return (clean - nothing) / slope


def clean_of(model_sampling: Any, x: torch.Tensor, sigma: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The clean latents a network's output stands for."""
    return model_sampling.calculate_denoised(sigma, output, x)


def noised(model_sampling: Any, clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Clean latents at a noise level, one a row."""
    return model_sampling.noise_scaling(sigma, noise, clean, False)


def target_of(model_sampling: Any, clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The output of a network that knows the clean latents."""
    x = noised(model_sampling, clean, noise, sigma)
    return output_of(model_sampling, x, sigma, clean)


def noise_levels(model_sampling: Any, count: int = 200) -> torch.Tensor:
    """Noise levels evenly spaced in sampling percent, the ends left out, (count,) in float32."""
    percents = [(i + 0.5) / count for i in range(count)]
    return torch.tensor([float(model_sampling.percent_to_sigma(p)) for p in percents])
