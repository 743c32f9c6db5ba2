"""Changes besides a pair of factors: biases, norms, whole differences, flat factors, and factors of eight bits."""

from __future__ import annotations

import comfy.weight_adapter
import pytest
import torch
from comfyui_concepts.host.lora.factors import network_factors
from comfyui_concepts.host.lora.files import LoraFile

from .lora_cases import CONV, LINEAR, ONE_BY_ONE, OUT, SPELLINGS, beside, check, image_tokens, into, random_tensor

NORM = "input_blocks.1.0.in_layers.0"
LAYER_NORM = "input_blocks.1.1.transformer_blocks.0.norm1"


@pytest.fixture(scope="module")
def patcher(new_model):
    return new_model("EPS", torch.float64, sd15=True)


def _differences(patcher, layers, weight="diff", bias="diff_b"):
    tensors = {}
    for layer in layers:
        module = patcher.model.diffusion_model.get_submodule(layer)
        tensors[f"diffusion_model.{layer}.{weight}"] = random_tensor(*module.weight.shape, seed=3)
        tensors[f"diffusion_model.{layer}.{bias}"] = random_tensor(*module.bias.shape, seed=4)
    return tensors


def test_whole_differences_of_weights_biases_and_norms_are_what_the_host_would_merge(patcher):
    """As LyCORIS writes them for 'full' and 'norm', and the host's trainer for biases and norms."""
    layers = (OUT, CONV, NORM, LAYER_NORM)
    check(patcher, _differences(patcher, layers), 0.7, layers)
    check(patcher, _differences(patcher, (NORM, LAYER_NORM), "w_norm", "b_norm"), -0.7, (NORM, LAYER_NORM))


def test_a_bias_beside_a_pair_is_added_with_it(patcher):
    layers = (OUT, CONV)
    biases = {key: t for key, t in _differences(patcher, layers).items() if key.endswith("diff_b")}
    check(patcher, SPELLINGS["the host's own names"](patcher) | biases, 1.3, layers)


@pytest.mark.parametrize("layer", [OUT, CONV, NORM, LAYER_NORM])
def test_a_masked_branch_changes_biases_and_norms_at_its_tokens(patcher, layer):
    lora = LoraFile("tried", _differences(patcher, [layer]))
    x, module = into(patcher, layer), patcher.model.diffusion_model.get_submodule(layer)
    tokens = (lambda y: y) if x.ndim == 3 else lambda y: y.flatten(2).transpose(1, 2)
    count = 5 if x.ndim == 3 else 48
    half = torch.arange(count) < count // 2
    out = tokens(beside(patcher, lora, 1.0, layer, x, tokens=image_tokens(patcher, {count: half})))
    assert torch.equal(out[:, ~half], tokens(module(x))[:, ~half])
    torch.testing.assert_close(out[:, half], tokens(beside(patcher, lora, 1.0, layer, x))[:, half])
    row = beside(patcher, lora, 1.0, layer, x, rows=slice(1, 2))
    assert torch.equal(row[0], module(x)[0])
    assert not torch.equal(row[1], module(x)[1])


@pytest.mark.parametrize("algorithm", sorted(set(comfy.weight_adapter.adapter_maps) & {"LoRA", "LoHa", "LoKr"}))
def test_what_the_hosts_own_trainer_writes_is_what_it_would_merge(patcher, algorithm):
    """Its factors of convolutions are flat."""
    layers = (LINEAR, ONE_BY_ONE, CONV)
    tensors, weights = {}, patcher.model.state_dict()
    for layer in layers:
        name = f"diffusion_model.{layer}"
        with torch.inference_mode(False):
            weight = weights[f"{name}.weight"].float()
            trained = comfy.weight_adapter.adapter_maps[algorithm].create_train(weight, rank=4, alpha=1.0)
        for part, parameter in trained.named_parameters():
            whole = random_tensor(*parameter.shape) if parameter.ndim else parameter.detach().double()
            tensors[f"{name}.{part}"] = whole
    check(patcher, tensors, 0.7, layers)


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_up.weight": (32, 4), "lora_down.weight": (4, 32)},
        {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)},
        {"hada_w1_a": (32, 8), "hada_w1_b": (8, 32), "hada_w2_a": (32, 8), "hada_w2_b": (8, 32)},
        {"lokr_w1": (4, 4), "lokr_w2": (8, 8)},
        {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
        {"diff": (32, 32)},
        {"lora_up.weight": (32, 3, 1, 1), "lora_mid.weight": (3, 3, 3, 3), "lora_down.weight": (3, 32, 1, 1)},
    ],
)
def test_factors_of_eight_bits_are_widened_before_arithmetic(patcher, parts):
    name = f"diffusion_model.{CONV if 'lora_mid.weight' in parts else LINEAR}"
    small = {f"{name}.{part}": random_tensor(*shape).to(torch.float8_e4m3fn) for part, shape in parts.items()}
    ((made,),) = network_factors(LoraFile("small", small), patcher.model).values()
    ((wide,),) = network_factors(LoraFile("wide", {k: t.float() for k, t in small.items()}), patcher.model).values()
    assert made.scale == wide.scale
    for ours, theirs in ((made.down, wide.down), (made.up, wide.up)):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours.float(), theirs)
    assert wide.down.abs().max() > 0


def test_a_bias_of_another_size_is_of_another_model(patcher):
    with pytest.raises(ValueError, match="made for another model"):
        network_factors(LoraFile("other", {f"diffusion_model.{OUT}.diff_b": random_tensor(7)}), patcher.model)
