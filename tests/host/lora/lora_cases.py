"""LoRA files of layers of every kind, and what the host makes of them by merging."""

from __future__ import annotations

import comfy.lora
import torch
from comfyui_concepts.host.lora.branches import Branch, low_rank, prepared
from comfyui_concepts.host.lora.factors import layer_names, network_factors
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.host.registry import architecture_of
from comfyui_concepts.methods.lora_names import Target
from comfyui_concepts.methods.lora_tokens import ImageTokens

LINEAR = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
OUT = "output_blocks.3.1.transformer_blocks.0.attn2.to_out.0"
ONE_BY_ONE = "input_blocks.1.1.proj_in"
CONV = "input_blocks.1.0.in_layers.2"
STRIDED = "input_blocks.3.0.op"
DIFFUSERS = {
    LINEAR: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    OUT: "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    ONE_BY_ONE: "down_blocks.0.attentions.0.proj_in",
    CONV: "down_blocks.0.resnets.0.conv1",
    STRIDED: "down_blocks.0.downsamplers.0.conv",
}


def random_tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64) * 0.3


def pair_for(module, rank=3):
    shape = module.weight.shape
    return random_tensor(rank, *shape[1:]), random_tensor(shape[0], rank, *[1] * (len(shape) - 2))


def file_of(patcher, name_of, ends=("lora_down.weight", "lora_up.weight"), alpha=2.0, layers=DIFFUSERS):
    tensors = {}
    for layer in layers:
        down, up = pair_for(patcher.model.diffusion_model.get_submodule(layer))
        name = name_of(layer)
        tensors |= {f"{name}{ends[0]}": down, f"{name}{ends[1]}": up}
        if alpha is not None:
            tensors[f"{name}alpha"] = torch.tensor(alpha)
    return tensors


def by_host(patcher, tensors, strength, layer, x):
    """What the layer answers with the file merged into its weight and bias by the host's own arithmetic."""
    weight, bias = (f"diffusion_model.{layer}.{part}" for part in ("weight", "bias"))
    names = {n: weight for n, target in layer_names(patcher.model).items() if target == Target(layer)}
    loaded = comfy.lora.load_lora(dict(tensors), names, log_missing=False)
    module = patcher.model.diffusion_model.get_submodule(layer)
    parameters = {name: value.detach().clone() for name, value in module.named_parameters()}
    for key, name in ((weight, "weight"), (bias, "bias")):
        if key in loaded:
            patch = [(strength, loaded[key], 1.0, None, None)]
            parameters[name] = comfy.lora.calculate_weight(patch, parameters[name], key, torch.float64)
    return torch.func.functional_call(module, parameters, (x,))


def into(patcher, layer):
    """Something that the layer takes: (3 rows, 5 tokens, in) or (3 rows, in, 8, 6), by its kind."""
    module = patcher.model.diffusion_model.get_submodule(layer)
    if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm)):
        return random_tensor(3, 5, module.weight.shape[-1])
    channels = module.weight.shape[1] if module.weight.ndim == 4 else len(module.weight)
    return random_tensor(3, channels, 8, 6)


def beside(patcher, lora, strength, layer, x, **where):
    """What the layer answers with the file's branch beside it."""
    factors = prepared(network_factors(lora, patcher.model), torch.device("cpu"), torch.float64)
    unet = patcher.model.diffusion_model
    with torch.no_grad(), low_rank(unet, [Branch(factors, strength, **where)]):
        return unet.get_submodule(layer)(x)


def image_tokens(patcher, weights):
    """Weights of image tokens, by how many a layer of the patcher's UNet has."""
    return ImageTokens(architecture_of(patcher.model).kind, weights)


def check(patcher, tensors, strength, layers):
    """Each layer with the branch beside it answers as with the file merged into it, and not as without."""
    for layer in layers:
        x, module = into(patcher, layer), patcher.model.diffusion_model.get_submodule(layer)
        expected = by_host(patcher, tensors, strength, layer, x)
        assert (expected - module(x)).abs().max() > 0.01
        assert (beside(patcher, LoraFile("tried", tensors), strength, layer, x) - expected).abs().max() < 1e-12


SPELLINGS = {
    "kohya": lambda p: file_of(p, lambda n: f"lora_unet_{DIFFUSERS[n].replace('.', '_')}."),
    "kohya, the host's blocks": lambda p: file_of(p, lambda n: f"lora_unet_{n.replace('.', '_')}."),
    "diffusers": lambda p: file_of(p, lambda n: f"unet.{DIFFUSERS[n]}.", ("lora_A.weight", "lora_B.weight"), None),
    "diffusers, old": lambda p: file_of(
        p, lambda n: f"unet.{DIFFUSERS[n]}.", ("lora.down.weight", "lora.up.weight"), None
    ),
    "ED-LoRA": lambda p: file_of(p, lambda n: f"unet.{DIFFUSERS[n]}.", alpha=None),
    "ED-LoRA, older": lambda p: file_of(
        p, lambda n: f"unet.{DIFFUSERS[n]}", ("_lora.down.weight", "_lora.up.weight"), None
    ),
    "the host's own names": lambda p: file_of(p, lambda n: f"diffusion_model.{n}."),
    "lycoris": lambda p: file_of(p, lambda n: f"lycoris_{DIFFUSERS[n].replace('.', '_')}."),
}
