"""Edits on layers whose weights are packed: the layer itself reads them, and the host patches them as LoRAs (A28)."""

from __future__ import annotations

import json
import logging

import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.quant_ops
import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_concepts.host.erase import weights as erase_weights
from comfyui_concepts.host.erase.apply import AUTOMATIC, FULL, WEIGHTS, apply_edit, apply_to_clip
from comfyui_concepts.methods.erase.edit import KEYS_AND_VALUES, Edit
from comfyui_concepts.methods.erase.lowrank import LowRank


class Packed(torch.nn.Module):
    """Stands in for a layer of a quantised file, such as GGUF: two weights a byte, of another shape than the layer's.

    Real ones need a loader of another pack. What they have in common: only the layer can read its bytes, and patches of
    the host come on top of what it unpacks, which is not packed again.
    """

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max() / 7
        steps = (linear.weight / self.scale).round().add(8).to(torch.uint8)
        self.weight = torch.nn.Parameter(steps[:, ::2] * 16 + steps[:, 1::2], requires_grad=False)
        self.bias = torch.nn.Parameter(torch.ones(linear.out_features), requires_grad=False)

    def convert_weight(self, weight, inplace=False, **kwargs):
        packed = weight.to(torch.uint8)
        steps = torch.stack([packed // 16, packed % 16], -1).flatten(1).float()
        return (steps - 8) * self.scale

    def set_weight(self, weight, inplace_update=False, seed=None, **kwargs):
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def whole(self):
        return self.convert_weight(self.weight) if self.weight.dtype == torch.uint8 else self.weight

    def forward(self, x):
        return torch.nn.functional.linear(x, self.whole().to(x), self.bias.to(x))


def _of_the_host(linear):
    """A layer that the host itself keeps quantised: fp8 with a scale of its own.

    Older hosts take the format of each layer from a table, newer ones from the layer's part of the file.
    """
    kept = {"format": "float8_e4m3fn"}
    made = comfy.ops.mixed_precision_ops({"layer": kept}, torch.float32, full_precision_mm=True).Linear(
        linear.in_features, linear.out_features, bias=False
    )
    scale = linear.weight.abs().max() / 448
    stored = {"layer.weight": (linear.weight / scale).to(torch.float8_e4m3fn), "layer.weight_scale": scale}
    stored["layer.comfy_quant"] = torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)
    made._load_from_state_dict(stored, "layer.", {}, True, [], [], [])
    made.whole = lambda: made.weight.dequantize()
    return made


KINDS = {"packed bytes": Packed, "the host's fp8": _of_the_host}


@pytest.fixture(params=KINDS)
def packed_model(request, new_model):
    """A tiny model of which every key and value of the text is packed, and what they weigh, by key."""
    model, weights = new_model(), {}
    with torch.inference_mode():  # as the host loads them
        for key in erase_weights.text_keys(model, KEYS_AND_VALUES):
            place, name = key.rsplit(".", 1)[0].rsplit(".", 1)
            parent = comfy.utils.get_attr(model.model, place)
            setattr(parent, name, KINDS[request.param](getattr(parent, name)))
            weights[key] = getattr(parent, name).whole().float().clone()
    return model, weights


def _layer(model, key):
    return comfy.utils.get_attr(model.model, key.rsplit(".", 1)[0])


def an_edit(scale: float = 0.3) -> Edit:
    g = torch.Generator().manual_seed(2)
    return Edit(LowRank(torch.randn(32, 2, generator=g) * scale, torch.randn(2, 32, generator=g) * scale))


def _bytes(model):
    """What every weight is stored as; newer hosts list the scales of quantised ones too."""
    stored = {
        key: value._qdata if isinstance(value, comfy.quant_ops.QuantizedTensor) else value
        for key, value in model.model.state_dict().items()
    }
    return {key: value.flatten().view(torch.uint8).clone() for key, value in stored.items()}


def test_weights_only_their_layer_can_read_are_read_by_asking_it(packed_model):
    model, weights = packed_model
    read = dict(erase_weights.effective_weights(model, list(weights)))
    for key, expected in weights.items():
        torch.testing.assert_close(read[key], expected, rtol=1e-6, atol=1e-6)
    assert erase_weights.low_precision(model, list(weights))


@pytest.mark.parametrize("delivery", [WEIGHTS, FULL])
def test_the_host_patches_them_with_the_edit_and_takes_it_off_again(packed_model, delivery, caplog):
    model, weights = packed_model
    before, edit, x = _bytes(model), an_edit(), torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    with caplog.at_level(logging.WARNING):
        edited = apply_edit(model, edit, 1.0, delivery)
    assert "fp8 or quantised" in caplog.text
    assert set(edited.patches) == set(weights)
    comfy.model_management.load_models_gpu([edited])
    for key, weight in weights.items():
        layer, wanted = _layer(model, key), weight + weight @ edit.text.matrix()
        answer, bias = layer(x), 0.0 if layer.bias is None else layer.bias
        off = (answer - bias - x @ wanted.T).norm() / (x @ wanted.T).norm()
        assert off <= (
            1e-6 if isinstance(layer, Packed) else 0.05
        )  # the host rounds to fp8 again, the packed one does not
    comfy.model_management.load_models_gpu([model])
    edited.unpatch_model()
    after = _bytes(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_an_edit_solved_under_a_patch_reads_the_patched_weight(packed_model):
    model, weights = packed_model
    key = list(weights)[3]
    g = torch.Generator().manual_seed(7)
    lora = 0.1 * torch.randn(weights[key].shape, generator=g)
    patched = model.clone()
    patched.add_patches({key: ("diff", (lora,))}, 1.0)
    ((_, read),) = erase_weights.effective_weights(patched, [key])
    wanted = weights[key] + lora
    assert (read - wanted).norm() <= (1e-6 if isinstance(_layer(model, key), Packed) else 0.05) * wanted.norm()


@pytest.mark.parametrize(
    ("dtype", "coarse"), [(torch.float8_e4m3fn, True), (torch.float8_e5m2, True), (torch.float16, False)], ids=str
)
def test_weights_that_are_made_coarse_on_their_way_in_are_coarse(new_model, dtype, coarse, caplog):
    """Newer hosts keep a weight as the file has it, note its dtype beside it, and cast it each time, patched."""
    model, edit = new_model(), an_edit()
    keys = erase_weights.text_keys(model, KEYS_AND_VALUES)
    for key in keys:
        _layer(model, key).weight_comfy_model_dtype = dtype
    assert erase_weights.low_precision(model, keys) == coarse
    assert bool(apply_edit(model, edit, 1.0, AUTOMATIC).patches) != coarse
    apply_edit(model, Edit(layers={keys[0]: edit.text}), 1.0, WEIGHTS)
    assert ("fp8 or quantised" in caplog.text) == coarse


@pytest.mark.parametrize(("dtype", "coarse"), [(torch.float8_e4m3fn, True), (torch.float16, False)], ids=str)
def test_a_coarse_text_encoder_is_told_apart_too(demo_model, monkeypatch, dtype, coarse, caplog):
    clip = demo_model[1]
    key = next(key for key in clip.patcher.model_state_dict() if key.endswith("mlp.fc1.weight"))
    layer = comfy.utils.get_attr(clip.patcher.model, key.removesuffix(".weight"))
    monkeypatch.setattr(layer, "weight_comfy_model_dtype", dtype, raising=False)
    apply_to_clip(
        clip, Edit(layers={key: LowRank(torch.zeros(len(layer.weight), 1), torch.zeros(1, layer.in_features))})
    )
    assert ("text encoder is stored in fp8" in caplog.text) == coarse


@pytest.mark.parametrize("kind", sorted(getattr(comfy.quant_ops, "QUANT_ALGOS", {})))
def test_every_quantised_form_of_the_host_is_coarse(new_model, kind):
    layout = comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
    model = new_model()
    key = erase_weights.text_keys(model, KEYS_AND_VALUES)[0]
    place, name = key.rsplit(".", 1)[0].rsplit(".", 1)
    made = comfy.ops.mixed_precision_ops({"layer": {"format": kind}}, torch.float32).Linear(32, 32, bias=False)
    try:
        packed = comfy.quant_ops.QuantizedTensor.from_float(_layer(model, key).weight.detach().bfloat16(), layout)
    except (RuntimeError, NotImplementedError, ValueError, AssertionError, ImportError) as error:
        pytest.skip(f"this form cannot be made here: {error}")
    made.quant_format, made.layout_type = kind, layout
    made.weight = torch.nn.Parameter(packed, requires_grad=False)
    setattr(comfy.utils.get_attr(model.model, place), name, made)
    assert erase_weights.low_precision(model, [key])


def _injected(model, key, lora):
    """As Load LoRA (Bypass) of newer hosts does it: the layer's forward is replaced while the model is loaded."""
    layer, plain = _layer(model, key), []

    def inject(_):
        plain.append(layer.forward)
        layer.forward = lambda x: plain[0](x) + x @ lora.matrix().T

    def eject(_):
        layer.forward = plain.pop()
        del layer.forward

    patched = model.clone()
    patched.set_injections("beside", [comfy.patcher_extension.PatcherInjection(inject, eject)])
    return patched


def _bypassed(model, key, lora):
    load = getattr(comfy.sd, "load_bypass_lora_for_models", None)
    if load is None:
        pytest.skip("this host has no Load LoRA (Bypass)")
    name = key.removesuffix(".weight")
    file = {f"{name}.lora_up.weight": lora.up, f"{name}.lora_down.weight": lora.down}
    return load(model, None, file, 1.0, 0.0)[0]


@pytest.mark.parametrize("beside", [_injected, _bypassed])
def test_a_lora_beside_a_layer_is_erased_with_it(new_model, beside):
    model, edit = new_model(), an_edit()
    first, *others = erase_weights.text_keys(model, KEYS_AND_VALUES)
    weight = _layer(model, first).weight.detach().clone()
    g = torch.Generator().manual_seed(9)
    lora = LowRank(torch.randn(len(weight), 2, generator=g) * 0.3, torch.randn(2, 32, generator=g) * 0.3)
    plain, found = erase_weights.weight_deltas(model, edit), beside(model, first, lora)
    found = erase_weights.weight_deltas(found, edit)
    wanted = (weight + lora.matrix()) @ edit.text.matrix()
    torch.testing.assert_close(found[first].matrix(), wanted, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(found[key].up, plain[key].up) for key in others)
    comfy.model_management.load_models_gpu([model])
    assert torch.equal(_layer(model, first).weight, weight)


def test_automatic_leaves_packed_weights_alone(packed_model):
    model, _ = packed_model
    before = _bytes(model)
    edited = apply_edit(model, an_edit(), 1.0, AUTOMATIC)
    assert not edited.patches
    comfy.model_management.load_models_gpu([edited])
    assert all(torch.equal(value, before[key]) for key, value in _bytes(model).items())
