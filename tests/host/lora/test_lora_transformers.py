"""LoRAs of transformers: every spelling of every family changes the outputs that the host's patch would."""

from __future__ import annotations

import contextlib

import comfy.lora
import pytest
import torch
from comfyui_concepts.host.lora.branches import Branch, low_rank, prepared
from comfyui_concepts.host.lora.factors import layer_names, network_factors
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.methods.lora import LoraFactors, Span, layer_shape
from comfyui_concepts.methods.lora_file import is_text

from ..tiny_transformers import names, noise, predict, shared_transformer
from .transformer_names import NAMES, Rows

CPU = torch.device("cpu")

KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")


def flat(prefix):
    return lambda name: prefix + name.replace(".", "_")


def dotted(prefix):
    return lambda name: prefix + name


SPELLINGS = {
    "host": (dotted("diffusion_model."), PEFT),
    "diffusers": (dotted("transformer."), PEFT),
    "bare": (dotted(""), KOHYA),
    "peft": (dotted("base_model.model."), PEFT),
    "simpletuner, peft": (dotted("transformer.base_model.model."), ("lora.down.weight", "lora.up.weight")),
    "kohya, musubi": (flat("lora_unet_"), KOHYA),
    "onetrainer": (flat("lora_transformer_"), KOHYA),
    "lycoris": (flat("lycoris_"), KOHYA),
}


def tensor(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator) * 0.3


def whole(module, rows):
    """The rows with their length, and the shape of the weight that a file has for them."""
    shape = layer_shape(module)
    length = shape[0] if rows.length is None else rows.length
    return rows._replace(length=length), (length, *shape[1:])


def file_of(network, layers, spelling, rank=3):
    """A LoRA on these layers, (name, rows) each, and the change of each layer's weight that it stands for."""
    spelled, ends = SPELLINGS[spelling]
    tensors, changes = {}, {}
    for seed, (name, rows) in enumerate(layers):
        module = network.get_submodule(rows.layer)
        rows, shape = whole(module, rows)
        down, up = tensor(rank, *shape[1:], seed=seed), tensor(shape[0], rank, seed=seed)
        key = spelled(name)
        tensors |= {f"{key}.{ends[0]}": down, f"{key}.{ends[1]}": up, f"{key}.alpha": torch.tensor(2.0)}
        change = changes.setdefault(rows.layer, torch.zeros(layer_shape(module)))
        change[rows.start : rows.start + rows.length] += 2 / rank * (up @ down.flatten(1)).reshape(shape)
    return tensors, changes


def ours(tensors, network, model):
    """The change of each layer's weight by our factors."""
    changes = {}
    for layer, factors in network_factors(LoraFile("tried", tensors), model).items():
        change = changes.setdefault(layer, torch.zeros(layer_shape(network.get_submodule(layer))))
        for f in factors:
            matrix = f.down if f.up is None else (f.up @ f.down.flatten(1)).reshape(-1, *f.down.shape[1:])
            part = change if f.span is None else change.narrow(0, *f.span)
            part += f.scale * matrix
    return changes


def layers_of(name):
    """What trainers call some layers, and the host's own names of the same layers."""
    theirs = NAMES[name]
    return [list(theirs.items()), [(layer, Rows(layer)) for layer in dict.fromkeys(r.layer for r in theirs.values())]]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", names())
def test_every_spelling_changes_the_outputs_that_it_names(name, spelling, caplog):
    caplog.set_level("INFO")
    model = shared_transformer(name).model
    for layers in layers_of(name):
        tensors, wanted = file_of(model.diffusion_model, layers, spelling)
        changes = ours(tensors, model.diffusion_model, model)
        assert changes.keys() == wanted.keys()
        for layer, change in changes.items():
            torch.testing.assert_close(change, wanted[layer], atol=1e-6, rtol=0)
        assert f"matched {len(tensors)} of {len(tensors)} keys" in caplog.messages[-1]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", names())
def test_where_the_host_knows_the_spelling_its_own_patches_are_the_same(name, spelling):
    """But for the keys and values of grouped heads and the two halves of a gated MLP, which the host places wrongly."""
    model = shared_transformer(name).model
    hosts = comfy.lora.model_lora_keys_unet(model, {})
    spelled, _ = SPELLINGS[spelling]
    for layers in layers_of(name):
        known = [(n, r) for n, r in layers if spelled(n) in hosts and not _misplaced(name, n)]
        tensors, wanted = file_of(model.diffusion_model, known, spelling)
        keys = {spelled(n): hosts[spelled(n)] for n, _ in known}
        loaded = comfy.lora.load_lora(dict(tensors), keys, log_missing=False)
        for layer, change in wanted.items():
            weight = f"diffusion_model.{layer}.weight"
            patches = [(1.0, p, 1.0, k[1] if isinstance(k, tuple) else None, None)
                       for k, p in loaded.items() if weight in (k, k[0])]  # fmt: skip
            merged = comfy.lora.calculate_weight(patches, torch.zeros_like(change), weight)
            torch.testing.assert_close(change, merged, atol=1e-6, rtol=0)


def _misplaced(name, layer):
    gated = name == "flux2" and layer.endswith("proj_mlp")
    return gated or (name == "lumina2" and layer.endswith(("to_k", "to_v")))


@contextlib.contextmanager
def merged(network, changes):
    """The network with these changes in its weights."""
    weights = {layer: network.get_submodule(layer).weight for layer in changes}
    before = {layer: weight.detach().clone() for layer, weight in weights.items()}
    with torch.no_grad():
        for layer, change in changes.items():
            weights[layer] += change
        yield
        for layer, weight in before.items():
            weights[layer].copy_(weight)


@pytest.mark.parametrize("name", names())
def test_a_split_lora_beside_the_network_is_the_one_merged_into_it(name):
    """All of its layers answer, and afterwards nothing is left of it."""
    patcher = shared_transformer(name)
    network, latent = patcher.model.diffusion_model, noise(patcher)
    tensors, changes = file_of(network, layers_of(name)[0], "host")
    factors = prepared(network_factors(LoraFile("tried", tensors), patcher.model), CPU, torch.float32)
    plain = predict(patcher, name, latent)
    with merged(network, changes):
        expected = predict(patcher, name, latent)
    with low_rank(network, [Branch(factors)]) as silent:
        out = predict(patcher, name, latent)
    assert not silent
    assert (out - expected).norm() < 1e-5 * (expected - plain).norm()
    with low_rank(network, [Branch(factors, 0.0)]):
        assert torch.equal(predict(patcher, name, latent), plain)
    assert torch.equal(predict(patcher, name, latent), plain)


def test_xlabs_processors_are_read(caplog):
    """They name no projection, but the processor of an attention: 1 is the picture's, 2 the text's."""
    caplog.set_level("INFO")
    model = shared_transformer("flux").model
    processors = {
        "double_blocks.0.processor.qkv_lora1": Rows("double_blocks.0.img_attn.qkv"),
        "double_blocks.0.processor.proj_lora2": Rows("double_blocks.0.txt_attn.proj"),
        "single_blocks.1.processor.qkv_lora": Rows("single_blocks.1.linear1", 0, 192),
        "single_blocks.1.processor.proj_lora": Rows("single_blocks.1.linear2"),
    }
    bare, wanted = file_of(model.diffusion_model, list(processors.items()), "bare")
    tensors = {
        key.replace(".lora_down.", ".down.").replace(".lora_up.", ".up."): value
        for key, value in bare.items() if not key.endswith("alpha")
    }  # fmt: skip
    changes = ours(tensors, model.diffusion_model, model)
    assert changes.keys() == wanted.keys()
    for layer, change in changes.items():
        torch.testing.assert_close(change * 2 / 3, wanted[layer], atol=1e-6, rtol=0)
    assert "matched 8 of 8 keys" in caplog.messages[-1]


def test_lumina_s_own_diffusers_names_are_read():
    model = shared_transformer("lumina2").model
    split = {
        "layers.0.attn.to_k": Rows("layers.0.attention.qkv", 96, 48),
        "noise_refiner.0.attn.to_out.0": Rows("noise_refiner.0.attention.out"),
        "layers.1.feed_forward.linear_3": Rows("layers.1.feed_forward.w3"),
    }
    tensors, wanted = file_of(model.diffusion_model, list(split.items()), "diffusers")
    changes = ours(tensors, model.diffusion_model, model)
    assert changes.keys() == wanted.keys()
    assert all(torch.allclose(change, wanted[layer], atol=1e-6, rtol=0) for layer, change in changes.items())


def test_the_halves_of_a_last_modulation_are_in_the_models_order():
    """diffusers keeps scale and shift the other way round."""
    model = shared_transformer("flux").model
    layer = "final_layer.adaLN_modulation.1"
    tensors, wanted = file_of(model.diffusion_model, [("norm_out.linear", Rows(layer))], "diffusers")
    change = ours(tensors, model.diffusion_model, model)[layer]
    assert torch.allclose(change, torch.cat(wanted[layer].chunk(2)[::-1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "key", "rows"),
    [("lumina2", "layers.0.attention.to_k", 96), ("flux2", "single_transformer_blocks.0.proj_mlp", 256)],
)
def test_rows_of_another_size_are_refused_with_the_layer_and_the_part(name, key, rows):
    """As many as the host takes there: it would change other outputs, or end with an error while sampling."""
    model = shared_transformer(name).model
    width = 96 if name == "lumina2" else 64
    tensors = {
        f"transformer.{key}.{end}": tensor(*shape)
        for end, shape in zip(PEFT, ((3, width), (rows, 3)), strict=True)
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"changes {rows} × .* values of '.*' \((k|mlp)\), which has (48|384) × "):
        network_factors(LoraFile("wrong", tensors), model)


def test_a_file_without_a_fitting_layer_is_an_error_and_a_missing_layer_is_named(caplog):
    model = shared_transformer("qwen").model
    other, _ = file_of(shared_transformer("wan").model.diffusion_model, layers_of("wan")[1], "host")
    with pytest.raises(ValueError, match=r"'wan' matched 0 of 15 keys: none of its layers has a counterpart"):
        network_factors(LoraFile("wan", other), model)
    tensors, _ = file_of(model.diffusion_model, layers_of("qwen")[0], "host")
    more = {f"diffusion_model.transformer_blocks.7.attn.to_q.{end}": tensor(3, 3) for end in PEFT}
    network_factors(LoraFile("deep", tensors | more), model)
    assert "LoRA 'deep': matched 15 of 17 keys of the model" in caplog.messages
    assert "'diffusion_model.transformer_blocks.7.attn.to_q.lora_A.weight' and others" in caplog.text


@pytest.mark.parametrize("name", names())
def test_no_name_of_a_transformer_s_layer_is_taken_for_a_text_encoder_s(name):
    assert not [n for n in layer_names(shared_transformer(name).model) if is_text(n)]


def test_a_layer_whose_weight_is_stored_in_another_shape_has_its_own_sizes():
    """As four-bit layers keep two numbers in one: the branch acts on what the layer takes and gives."""
    layer = Packed(8, 6)
    network = torch.nn.ModuleDict({"layer": layer})
    assert layer_shape(layer) == (6, 8)
    down, up, x = tensor(2, 8), tensor(2, 2), tensor(1, 5, 8)
    factors = LoraFactors(down, up, 0.5, span=Span(3, 2))
    with low_rank(network, [Branch({"layer": (factors,)}, 2.0)]):
        out = layer(x)
    added = x @ down.T @ up.T
    torch.testing.assert_close(out - layer(x), torch.nn.functional.pad(added, (3, 1)), atol=1e-6, rtol=0)


class Packed(torch.nn.Module):
    """A linear layer whose stored weight has half as many columns."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = torch.nn.Parameter(torch.ones(out_features, in_features // 2, dtype=torch.uint8), False)

    def forward(self, x):
        return x @ self.weight.repeat(1, 2).to(x).T
