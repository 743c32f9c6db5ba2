"""A loaded model's own output for encoded prompts, through the host's batched evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch

from ...methods.erase.trained.context import NoiseProcess
from ...methods.erase.trained.prompts import EncodedPrompts, stacked
from ..engine.cond_or_uncond import cond_or_uncond_of, with_cond_or_uncond
from ..engine.gradients import plain_patcher
from ..types import CLIP, BaseModel, Conditioning, ModelOptions, ModelPatcher, ModelSampling


def conditioning(prompt: EncodedPrompts) -> Conditioning:
    """The prompt as the host's CONDITIONING."""
    return [[prompt.context, {} if prompt.pooled is None else {"pooled_output": prompt.pooled}]]


def prompts_of(clip: CLIP, texts: Sequence[str]) -> EncodedPrompts:
    """Texts encoded by the host, one per row, as ordinary tensors. Brackets are part of the words.

    Raises:
        ValueError: a text is longer than one section of the encoder, or the CLIP has a schedule.
    """
    conditionings = [clip.encode_from_tokens_scheduled(clip.tokenize(text, disable_weights=True)) for text in texts]
    tokens = conditionings[0][0][0].shape[1]
    for text, entries in zip(texts, conditionings, strict=True):
        if len(entries) != 1:
            raise ValueError(
                "The CLIP has a schedule (Set CLIP Hooks), and a training has one text encoder throughout; connect the "
                "checkpoint's CLIP."
            )
        if entries[0][0].shape[1] != tokens:
            raise ValueError(f"The prompt '{text}' is longer than one section of the text encoder; shorten it.")
    with torch.inference_mode(False):
        rows = [(entries[0][0].clone(), entries[0][1].get("pooled_output")) for entries in conditionings]
        return stacked([EncodedPrompts(c, None if pooled is None else pooled.clone()) for c, pooled in rows])


def loaded(*patchers: ModelPatcher) -> list[ModelPatcher]:
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
                "start ComfyUI with --highvram or close other programs, train at a smaller size, or use a closed-form "
                "edit."
            )
    return plain


def outputs(
    model: BaseModel,
    prompts: Sequence[EncodedPrompts],
    x: torch.Tensor,
    sigma: torch.Tensor,
    model_options: ModelOptions,
) -> torch.Tensor:
    """The model's own output (noise, velocity, …) for each prompt at each row, (prompts, rows, channels, h, w).

    Args:
        model: loaded, with its ``current_patcher`` set.
        prompts: each of one row, or of as many rows as ``x``.
        x: (rows, channels, h, w) in the model's latent space; ``sigma``: (rows,).
    """
    conds = [comfy.sampler_helpers.convert_cond(conditioning(prompt)) for prompt in prompts]
    for cond in conds:
        comfy.samplers.encode_model_conds(model.extra_conds, cond, x, x.device, "positive")
    positives, options = with_cond_or_uncond(conds, model_options, cond_or_uncond_of(conds))
    clean = torch.stack(comfy.samplers.calc_cond_batch(model, positives, x, sigma, options))
    return output_of(model.model_sampling, x, sigma, clean)


def output_of(model_sampling: ModelSampling, x: torch.Tensor, sigma: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """The network's output that the host turns into ``clean`` at ``x``.

    For every parameterisation the host's formula is affine in the output, so two evaluations of it invert it.
    """
    nothing = model_sampling.calculate_denoised(sigma, torch.zeros_like(x), x)
    slope = model_sampling.calculate_denoised(sigma, torch.ones_like(x), x) - nothing
    return (clean - nothing) / slope


def clean_of(model_sampling: ModelSampling, x: torch.Tensor, sigma: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The clean latents that a network's output means."""
    return model_sampling.calculate_denoised(sigma, output, x)


def noised(
    model_sampling: ModelSampling, clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """Clean latents at noise levels ``sigma``, one per row."""
    return model_sampling.noise_scaling(sigma, noise, clean, False)


def target_of(
    model_sampling: ModelSampling, clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The output of a network that knows the clean latents."""
    x = noised(model_sampling, clean, noise, sigma)
    return output_of(model_sampling, x, sigma, clean)


def noise_levels(model_sampling: ModelSampling, count: int = 200) -> torch.Tensor:
    """Noise levels evenly spaced in percent, without the ends, (count,) in float32."""
    percents = [(i + 0.5) / count for i in range(count)]
    return torch.tensor([float(model_sampling.percent_to_sigma(p)) for p in percents])


def noise_process(model_sampling: ModelSampling, device: torch.device) -> NoiseProcess:
    """How the model is noised, with its noise levels on the device."""
    return NoiseProcess(
        noise_levels(model_sampling).to(device),
        lambda clean, noise, sigma: noised(model_sampling, clean, noise, sigma),
        lambda clean, noise, sigma: target_of(model_sampling, clean, noise, sigma),
        lambda x, sigma, output: clean_of(model_sampling, x, sigma, output),
    )
