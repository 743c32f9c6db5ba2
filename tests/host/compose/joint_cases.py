"""Concepts with random LoRAs in regions of a random transformer whose text and picture attend together."""

from __future__ import annotations

import functools

import comfy.patcher_extension
import comfy.samplers
import torch
from comfyui_concepts.host.compose.joint import JointGuider
from comfyui_concepts.host.engine.base_prompts import BasePrompts
from comfyui_concepts.host.lora.concept import Concept
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.host.registry import architecture_of
from comfyui_concepts.methods.compose.settings import Compose
from comfyui_concepts.methods.lora import layer_shape

from ..lora.transformer_names import NAMES
from ..tiny_transformers import conditioning, names, noise, shared_transformer

JOINT = [name for name in names() if name not in ("wan", "cosmos", "anima", "flux_schnell")]
FAST = [name for name in JOINT if name != "flux2"]
"""Flux.2's prompts have 512 rows each."""
SIZE = (9, 7)
DEFAULTS = Compose()


@functools.cache
def changes(name: str, seed: int = 0, kinds: tuple[str, ...] = ()) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Factors of rank 2 on layers of these kinds, or of every kind with tokens: down and up by layer."""
    architecture = architecture_of(shared_transformer(name).model)
    generator, made = torch.Generator().manual_seed(seed), {}
    for layer in dict.fromkeys(rows.layer for rows in NAMES[name].values()):
        module = architecture.network.get_submodule(layer)
        kind = architecture.kind(layer)
        if (kind in kinds if kinds else kind != "global") and isinstance(module, torch.nn.Linear):
            out, wide = layer_shape(module)
            made[layer] = tuple(0.15 * torch.randn(s, generator=generator) for s in ((2, wide), (out, 2)))
    return made


def patched(name: str, seed: int = 0, kinds: tuple[str, ...] = ()):
    """The model with these changes in its weights."""
    clone = shared_transformer(name).clone()
    factors = changes(name, seed, kinds)
    clone.add_patches(
        {f"diffusion_model.{layer}.weight": ("diff", (up @ down,)) for layer, (down, up) in factors.items()}
    )
    return clone


def prompt(name: str, length: int, seed: int, **values):
    """A prompt with the pooled embedding that all prompts here have: there is one per picture."""
    pooled = conditioning(name, 1)[0][1]["pooled_output"]
    return conditioning(name, length, seed=seed, pooled_output=pooled, **values)


def concept(name: str, seed: int = 0, strength: float = 1.0, lengths=(13, 8), kinds=()) -> Concept:
    tensors = {}
    for layer, (down, up) in changes(name, seed, kinds).items():
        tensors |= {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
    words = (prompt(name, length, seed=20 + 2 * seed + n) for n, length in enumerate(lengths))
    return Concept(f"c{seed}", f"thing {seed}", LoraFile(f"c{seed}", tensors), strength, *words)


def base(name: str, lengths=(10, 10), cfg: float = 1.0, **values) -> BasePrompts:
    return BasePrompts(*(prompt(name, length, seed=n, **values) for n, length in enumerate(lengths)), cfg)


def guider(name: str, concepts, covered, settings=DEFAULTS, *, model=None, prompts=None, soft=False) -> JointGuider:
    """``covered`` is (concepts, h, w) of the latent's size."""
    return JointGuider(
        model or shared_transformer(name), prompts or base(name), concepts, lambda h, w: covered, settings, soft
    )


def plain(model, prompts: BasePrompts) -> comfy.samplers.CFGGuider:
    """The host's own guider."""
    made = comfy.samplers.CFGGuider(model)
    made.set_conds(prompts.positive, prompts.negative)
    made.set_cfg(prompts.cfg)
    return made


def sample(made, *, size=SIZE, batch=1, steps=1, callback=None) -> torch.Tensor:
    start = noise(made.model_patcher, *size, batch=batch)
    sigmas = comfy.samplers.calculate_sigmas(made.model_patcher.get_model_object("model_sampling"), "simple", steps)
    sampler = comfy.samplers.sampler_object("euler")
    return made.sample(start, torch.zeros_like(start), sampler, sigmas, None, callback, disable_pbar=True, seed=1)


def everywhere(concepts=1, size=SIZE) -> torch.Tensor:
    return torch.ones(concepts, *size)


def halves(size=SIZE) -> torch.Tensor:
    """Left and right, with a column in both."""
    covered = torch.zeros(2, *size)
    covered[0, :, :4], covered[1, :, 2:] = 1, 1
    return covered


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def masked_by_another(model):
    """Another node's function around the attention, which gives it a mask."""

    def around(executor, *args, **kwargs):
        options = next(a for a in (*args, kwargs.get("transformer_options")) if isinstance(a, dict))
        ours = options["optimized_attention_override"]

        def theirs(attention, q, k, v, heads, *_, **others):
            return ours(attention, q, k, v, heads, **others | {"mask": torch.zeros(q.shape[-2], k.shape[-2])})

        options["optimized_attention_override"] = theirs
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("diffusion_model", "theirs", around)
