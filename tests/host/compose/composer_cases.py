"""Concepts with random LoRAs in regions of a random UNet; model calls and whole samplings with them."""

from __future__ import annotations

import comfy.samplers
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.compose.guider import ComposeGuider
from comfyui_concepts.host.compose.injection import Injection
from comfyui_concepts.host.compose.projections import ConceptPrompts, PreparedConcept
from comfyui_concepts.host.engine.base_prompts import BasePrompts
from comfyui_concepts.host.lora.concept import Concept
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.host.registry import unet_of
from comfyui_concepts.methods.lora import LoraFactors
from comfyui_concepts.methods.masks import MaskPyramid

SIZE = (16, 24)
FULL = torch.ones(1, *SIZE)


def halves(left=12, right=12):
    covered = torch.zeros(2, *SIZE)
    covered[0, :, :left] = 1
    covered[1, :, right:] = 1
    return covered


def randn(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def lora(patcher, seed, pattern=("attn1.", "attn2.", "ff.net.2", "proj_in")):
    unet, factors = unet_of(patcher.model), {}
    for path, module in unet.named_modules():
        if any(p in f"{path}." for p in pattern) and getattr(module, "weight", None) is not None and "norm" not in path:
            shape = module.weight.shape
            if len(shape) == 2 or shape[-1] == 1:
                down = randn(2, *shape[1:], seed=seed, scale=0.3)
                factors[path] = (LoraFactors(down, randn(shape[0], 2, seed=seed, scale=0.3), 1.0),)
    assert factors
    return factors


def prepared_concept(patcher, seed, tokens=5):
    contexts = [randn(1, tokens, 24, seed=seed), randn(1, tokens, 24, seed=seed + 50)]
    return PreparedConcept(ConceptPrompts(*contexts, (1, 2)), lora(patcher, seed))


def injection(patcher, concepts, covered, **more):
    made = Injection(
        patcher.model,
        concepts,
        MaskPyramid(covered, more.pop("soft", False), overlapping=True),
        {"p": 0, "n": 1},
        **more,
    )
    made.projected.fill()
    return made


def call(patcher, options=None, sides=("p", "n"), x=None, contexts=None, batch=1, sigma=2.0):
    x = randn(batch, 4, *SIZE, seed=3) if x is None else x
    contexts = contexts or {"p": randn(1, 7, 24, seed=1), "n": randn(1, 7, 24, seed=2)}
    transformer_options = (options or {}).get("transformer_options", {}) | {
        "uuids": list(sides),
        "cond_or_uncond": [int(s == "n") for s in sides],
    }
    context = torch.cat([contexts[s].expand(len(x), -1, -1) for s in sides])
    rows = torch.cat([x] * len(sides))
    return patcher.model.apply_model(
        rows,
        torch.full((len(rows),), sigma, dtype=torch.float64),
        c_crossattn=context,
        transformer_options=transformer_options,
    ).split(len(x))


def original(attend):
    """A function in the place of the original attention (``Attend``)."""
    attend.foreign = attend.later = False
    return attend


def concept(seed, strength=1.0, model=None):
    tensors = {}
    for path, (f,) in lora(model, seed).items():
        tensors[f"diffusion_model.{path}.lora_down.weight"] = f.down.float()
        tensors[f"diffusion_model.{path}.lora_up.weight"] = f.up.float().reshape(f.up.shape + (1,) * (f.down.ndim - 2))
    entry = [[randn(1, 5, 24, seed=seed).float(), {keys.PHRASE_POSITIONS: (1, 2)}]]
    return Concept(f"c{seed}", "it", LoraFile(f"c{seed}", tensors), strength, entry, [[entry[0][0] * 0.5, {}]])


def prompt(seed, words=7, **values):
    return [[randn(1, words, 24, seed=seed).float(), values]]


def guider_of(model, concepts, covered, settings, *, cfg=3.0, positive=None):
    coverage_at = None if covered is None else (lambda h, w: covered)
    base = BasePrompts(positive or prompt(1), prompt(2), cfg)
    return ComposeGuider(model, base, concepts, coverage_at, settings)


def run(guider, *, steps=4, sampler="euler", batch=1, seeds=None, mask=None, noise=None, latent=None, callback=None):
    """The picture of a guider. ``sampler`` is a name of the host's or a sampler of one's own."""
    if noise is None:
        seeds = seeds or range(batch)
        noise = torch.cat([torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(s)) for s in seeds])
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", steps)
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    latent = torch.zeros_like(noise) if latent is None else latent
    return guider.sample(noise, latent, sampler, sigmas, mask, callback, disable_pbar=True, seed=1)


def sample(model, concepts, covered, settings, *, positive=None, **settings_of_run):
    """The picture, and the guider that made it."""
    guider = guider_of(model, concepts, covered, settings, positive=positive)
    return run(guider, **settings_of_run), guider
