"""Every fact about a network's layers and tokens, against the network itself."""

import math

import comfy.lora
import pytest
import torch
from comfyui_concepts.host.architecture import Layout, Part, image_layout, text_layout
from comfyui_concepts.host.registry import FAMILIES, architecture_of

from ..conftest import TINY_UNET, tiny_model
from ..tiny_transformers import names, noise, predict, shared_transformer, tiny_transformer

TEXT = 37
"""Rows of the prompt: with 5 × 4 image tokens no two sequences are of one length, after filling up to 32 neither."""
ODD, EVEN = (9, 7), (10, 8)


def size_of(name):
    return EVEN if name == "cosmos" else ODD  # older hosts refuse odd sizes there


def layers_of(network):
    """Every layer whose weight a LoRA may change: linear ones and convolutions."""
    linear = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    return {path: module for path, module in network.named_modules() if isinstance(module, linear)}


def outputs_of(patcher, name, latent, length=TEXT, **values):
    """The shape of what each layer makes in one call, without the last axis of a linear layer: (batch, tokens, …)."""
    network, seen = patcher.model.diffusion_model, {}
    handles = []
    for path, module in layers_of(network).items():

        def hook(module, inputs, output, path=path):
            shape = tuple(output.shape)
            seen[path] = shape[:-1] if isinstance(module, torch.nn.Linear) else (shape[0], *shape[2:])

        handles.append(module.register_forward_hook(hook))
    predict(patcher, name, latent, length=length, **values)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(scope="module", params=names())
def called(request):
    """(name, architecture, what each layer makes) of one call of two rows at an odd size."""
    patcher = shared_transformer(request.param)
    shapes = outputs_of(patcher, request.param, noise(patcher, *size_of(request.param), batch=2))
    return request.param, architecture_of(patcher.model), shapes


def test_every_layer_has_a_kind(called):
    _, architecture, _ = called
    weighted = [n for n, m in architecture.network.named_modules() if getattr(m, "weight", None) is not None]
    assert len(weighted) > 20
    kinds = {architecture.kind(layer) for layer in weighted}
    assert {"image", "text", "global"} <= kinds


def test_the_layout_of_every_layer_has_as_many_tokens_as_the_layer_makes(called):
    name, architecture, shapes = called
    assert set(shapes) == set(layers_of(architecture.network))
    for layer, (batch, *tokens) in shapes.items():
        kind = architecture.kind(layer)
        if kind == "rows":
            assert batch in (2, 2 * TEXT)
        elif kind != "global":
            assert math.prod(tokens) == architecture.layout(layer, TEXT, size_of(name)).length, layer


def test_pictures_behind_the_image_are_where_the_layout_says(called):
    """In every family that takes them; the others refuse them."""
    name, architecture, shapes = called
    sizes = [(6, 6), (4, 8)]
    if not architecture.takes_references:
        layer = next(layer for layer in shapes if architecture.kind(layer) == "image")
        with pytest.raises(ValueError, match="remove the reference latents"):
            architecture.layout(layer, TEXT, size_of(name), sizes)
        return
    patcher = shared_transformer(name)
    given = {"reference_latents": [noise(patcher, *size, seed=size[0]) for size in sizes]}
    if name == "krea2":  # without one it passes them over
        given["reference_latents_method"] = "index"
    latent = noise(patcher, *size_of(name), batch=2)
    for layer, (_, *tokens) in outputs_of(patcher, name, latent, **given).items():
        if architecture.kind(layer) not in ("global", "rows"):
            assert math.prod(tokens) == architecture.layout(layer, TEXT, size_of(name), sizes).length, layer


def test_flux_qwen_and_krea_take_pictures_behind_the_image():
    taking = {name for name in names() if architecture_of(shared_transformer(name).model).takes_references}
    assert taking == {"flux", "flux_schnell", "flux2", "qwen", "krea2"} & set(names())


def test_a_layer_without_tokens_makes_no_sequence_of_text_or_image(called):
    name, architecture, shapes = called
    kinds = {layer: architecture.kind(layer) for layer in shapes}
    counts = {architecture.layout(la, TEXT, size_of(name)).length for la, kind in kinds.items() if kind != "global"}
    for layer, (_, *tokens) in shapes.items():
        if kinds[layer] == "global":
            assert math.prod(tokens) not in counts, layer
            with pytest.raises(ValueError, match="no tokens"):
                architecture.layout(layer, TEXT, size_of(name))


def test_a_layer_of_another_model_has_no_kind(called):
    _, architecture, _ = called
    with pytest.raises(ValueError, match="not one of a"):
        architecture.kind("a_layer.of_another_model")


_NO_REFINERS = {"n_refiner_layers": 0}


@pytest.mark.parametrize("name", [n for n in names() if n not in ("wan", "cosmos", "sd3", "qwen")])
def test_in_a_joint_sequence_the_image_is_where_the_layout_says(name):
    """Only rows of the image change with the latent, in the first layer that sees both, with nothing before it."""
    patcher = tiny_transformer(name, more={"depth": 0} if name.startswith(("flux", "chroma")) else _NO_REFINERS)
    architecture = architecture_of(patcher.model)
    layer = next(la for la in layers_of(architecture.network) if architecture.kind(la) == "joint")
    found = []
    handle = architecture.network.get_submodule(layer).register_forward_pre_hook(
        lambda m, x: found.append(x[0].clone())
    )
    for seed in (1, 2):
        predict(patcher, name, noise(patcher, *size_of(name), seed=seed), length=TEXT)
    handle.remove()
    differs = (found[0] != found[1]).any(-1)[0]
    layout = architecture.layout(layer, TEXT, size_of(name))
    image = torch.zeros_like(differs)
    image[layout.image] = True
    assert torch.equal(differs, image)
    assert layout.text.stop <= layout.image.start


@pytest.mark.parametrize("name", names())
def test_the_spans_of_a_fused_layer_tile_it(name):
    architecture = architecture_of(shared_transformer(name).model)
    fused = {layer: spans for layer in layers_of(architecture.network) if (spans := architecture.spans(layer))}
    assert bool(fused) == (name not in ("qwen", "wan", "cosmos", "krea2"))
    for layer, spans in fused.items():
        end = 0
        for start, length in spans.values():
            assert start == end
            end += length
        assert end == architecture.network.get_submodule(layer).out_features
        assert list(spans)[:3] == ["q", "k", "v"]


@pytest.mark.parametrize(
    ("name", "layer", "norms"),
    [
        ("flux", "double_blocks.1.img_attn.qkv", "double_blocks.1.img_attn.norm.{}_norm"),
        ("flux2", "single_blocks.1.linear1", "single_blocks.1.norm.{}_norm"),
        ("lumina2", "layers.1.attention.qkv", "layers.1.attention.{}_norm"),
        ("zimage", "noise_refiner.0.attention.qkv", "noise_refiner.0.attention.{}_norm"),
        ("sd3", "joint_blocks.0.context_block.attn.qkv", "joint_blocks.0.context_block.attn.ln_{}"),
    ],
)
def test_queries_and_keys_are_in_the_spans_of_that_name(name, layer, norms):
    """The norms of queries and keys get the very numbers of these spans. Where a host fuses the norm, they get none."""
    patcher = shared_transformer(name)
    network, architecture, seen = patcher.model.diffusion_model, architecture_of(patcher.model), {}
    long = {"q": "query", "k": "key"} if "flux" in name else {"q": "q", "k": "k"}
    handles = [network.get_submodule(layer).register_forward_hook(lambda m, x, y: seen.update(out=y.clone()))]
    for short, word in long.items():
        module = network.get_submodule(norms.format(word))
        handles.append(module.register_forward_pre_hook(lambda m, x, short=short: seen.update({short: x[0].clone()})))
    predict(patcher, name, noise(patcher))
    for handle in handles:
        handle.remove()
    for short in set(seen) - {"out"}:
        start, length = architecture.spans(layer)[short]
        part = seen["out"][..., start : start + length]
        assert torch.equal(part.flatten().sort()[0], seen[short].flatten().sort()[0])
    assert len(seen) == 3 or len(seen) == 1


def test_grouped_queries_have_shorter_keys():
    architecture = architecture_of(shared_transformer("lumina2").model)
    assert architecture.spans("layers.0.attention.qkv") == {"q": (0, 96), "k": (96, 48), "v": (144, 48)}


def test_the_gated_mlp_of_flux2_has_twice_the_rows():
    architecture = architecture_of(shared_transformer("flux2").model)
    assert architecture.spans("single_blocks.0.linear1")["mlp"] == (192, 2 * 3 * 64)


@pytest.mark.parametrize("name", names())
def test_other_names_are_those_the_host_knows(name):
    """What the host calls ``transformer.…`` leads to the same layer and rows, where the host's rows are right."""
    model = shared_transformer(name).model
    architecture = architecture_of(model)
    ours = {
        n: (f"diffusion_model.{p.layer}.weight", architecture.span(p)) for n, p in architecture.other_names().items()
    }
    wrong = {"lumina2": ("to_k", "to_v"), "flux2": ("proj_mlp",)}.get(name, ())
    for theirs, target in comfy.lora.model_lora_keys_unet(model, {}).items():
        bare = theirs.removeprefix("transformer.")
        weight, rows = (target, None) if isinstance(target, str) else target[:2]
        # left out: functions that change the weight, norms whose weight has another name, what the network lacks
        swapped = not isinstance(target, str) and rows is None
        lacking = swapped or weight not in model.state_dict() or not weight.endswith(".weight")
        if bare == theirs or lacking or theirs.endswith(wrong) or weight == f"diffusion_model.{bare}.weight":
            continue
        assert ours[bare] == (weight, None if rows is None else rows[1:]), theirs


def test_a_fused_part_is_a_run_of_spans():
    architecture = architecture_of(shared_transformer("flux").model)
    part = architecture.other_names()["single_blocks.1.linear1_qkv"]
    assert part == Part("single_blocks.1.linear1", ("q", "k", "v"))
    assert architecture.span(part) == (0, 192)
    assert architecture.span(Part("img_in")) is None


def test_a_unet_has_the_grid_of_each_layer():
    patcher = tiny_model("EPS", unet=TINY_UNET)
    architecture = architecture_of(patcher.model)
    network, seen = patcher.model.diffusion_model, {}
    handles = [
        module.register_forward_hook(lambda m, x, y, p=path: seen.update({p: y.shape}))
        for path, module in layers_of(network).items()
    ]
    network(torch.randn(1, 4, 10, 6), torch.tensor([3.0]), torch.randn(1, TEXT, 32))
    for handle in handles:
        handle.remove()
    assert len(seen) == len(layers_of(network))
    for layer, shape in seen.items():
        kind = architecture.kind(layer)
        if kind != "global":
            tokens = math.prod(shape[2:]) if len(shape) == 4 else shape[1]
            assert architecture.layout(layer, TEXT, (10, 6)).length == tokens, layer
    assert architecture.grid(9, 7, "middle_block.1.proj_in") == (5, 4)


def test_references_lie_behind_the_image():
    architecture = architecture_of(shared_transformer("flux").model)
    layout = architecture.layout("single_blocks.0.linear1", 10, ODD, [(4, 4), (2, 6)])
    assert layout == Layout(10 + 20 + 7, slice(0, 10), slice(10, 30), slice(30, 37))
    for name, layer in (("zimage", "x_embedder"), ("wan", "blocks.0.ffn.0"), ("cosmos", "blocks.0.self_attn.q_proj")):
        with pytest.raises(ValueError, match=r"beside the latent.*remove the reference"):
            architecture_of(shared_transformer(name).model).layout(layer, 10, EVEN, [(4, 4)])


def test_two_sequences_join():
    joint = image_layout(6, length=8).after(text_layout(3, 4))
    assert joint == Layout(12, slice(0, 3), slice(4, 10))


def test_an_unknown_network_is_named_with_what_would_work():
    class Strange(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match=r"a Strange is not known.*SDXL.*Flux.*Krea 2"):
        architecture_of(Strange())


def test_a_class_of_another_pack_counts_as_the_host_s_and_one_of_the_host_s_own_does_not():
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    theirs = type("Theirs", (UNetModel,), {"__module__": "custom_nodes.some"})
    own = type("ControlledUnetModel", (UNetModel,), {"__module__": "comfy.cldm.cldm"})
    assert architecture_of(theirs.__new__(theirs)).title == FAMILIES[0].title
    with pytest.raises(ValueError, match="a ControlledUnetModel is not known"):
        architecture_of(own.__new__(own))
