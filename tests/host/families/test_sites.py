"""Attentions, merge points, positions, text entries and training targets, against the networks themselves."""

import re

import pytest
import torch
from comfyui_concepts.host.registry import architecture_of

from ..conftest import TINY_UNET, tiny_model
from ..tiny_transformers import conditioning, names, noise, predict, shared_transformer

SIZE, TEXT = (10, 8), 37


def watched(name, layers, seed=1):
    """What goes into each of these layers in one call, and what comes out."""
    patcher, seen = shared_transformer(name), {}
    handles = []
    for path in layers:

        def hook(module, inputs, output, path=path):
            seen[path] = (inputs, output)

        handles.append(patcher.model.diffusion_model.get_submodule(path).register_forward_hook(hook))
    predict(patcher, name, noise(patcher, *SIZE, seed=seed), length=TEXT)
    for handle in handles:
        handle.remove()
    return seen


def of(name):
    return architecture_of(shared_transformer(name).model)


@pytest.mark.parametrize("name", names())
def test_the_sites_run_in_their_order_and_have_their_keys(name):
    architecture, order = of(name), []
    sites = architecture.sites()
    assert [s.start for s in sites] == sorted(s.start for s in sites)
    assert sites[0].start == 0
    assert 0.5 <= sites[-1].start < 1
    handles = [
        architecture.network.get_submodule(site.keys.layer).register_forward_hook(
            lambda m, x, y, layer=site.keys.layer: order.append(layer)
        )
        for site in sites
    ]
    predict(shared_transformer(name), name, noise(shared_transformer(name), *SIZE), length=TEXT)
    for handle in handles:
        handle.remove()
    assert order == [site.keys.layer for site in sites]
    for site in sites:
        assert site.keys.spans == (("k",) if architecture.spans(site.keys.layer) else ())


@pytest.mark.parametrize("name", names())
def test_what_an_attention_attends_to_is_what_its_keys_see(name):
    architecture = of(name)
    sees = {"self": {"image"}, "cross": {"text"}, "text": {"text"}, "joint": {"joint", "image"}}
    for site in architecture.sites():
        assert architecture.kind(site.keys.layer) in sees[site.attention.kind]


@pytest.mark.parametrize("name", names())
def test_blocks_return_and_projections_see_what_the_sites_say(name):
    architecture = of(name)
    sites = architecture.sites()
    seen = watched(name, {s.block for s in sites} | {s.after for s in sites if s.after})
    for site in sites:
        output = seen[site.block][1]
        parts = output if isinstance(output, tuple) else (output,)
        assert len(parts) == len(site.attention.output)
        for part, kind in zip(parts, site.attention.output, strict=True):
            if part is not None:  # the text of SD3's last block
                assert part.shape[1:-1].numel() == _length(architecture, site, kind)
        if site.after:
            assert torch.is_tensor(seen[site.after][1])


def _length(architecture, site, kind):
    """Tokens of a sequence as the blocks of that stage see it."""
    inside = [n for n, m in architecture.network.named_modules() if isinstance(m, torch.nn.Linear)]
    layer = next(n for n in inside if n.startswith(f"{site.block}.") and architecture.kind(n) == kind)
    return architecture.layout(layer, TEXT, SIZE).length


@pytest.mark.parametrize("name", [n for n in names() if n not in ("sd3", "wan", "cosmos")])
def test_text_positions_are_those_the_embedder_gets(name):
    architecture, found = of(name), []
    embedder = architecture.network.get_submodule(architecture.position_embedder)
    handle = embedder.register_forward_pre_hook(lambda m, x: found.append(x[0].clone()))
    predict(shared_transformer(name), name, noise(shared_transformer(name), *SIZE), length=TEXT)
    handle.remove()
    ours = architecture.text_positions(TEXT, SIZE)
    assert torch.equal(found[0][0, : len(ours)].float(), ours)


@pytest.mark.parametrize("name", ["sd3", "wan", "cosmos"])
def test_elsewhere_text_has_no_positions(name):
    assert of(name).position_embedder is None
    assert of(name).text_positions(TEXT, SIZE) is None


@pytest.mark.parametrize("name", names())
def test_the_text_enters_where_it_says_through_what_it_says(name):
    """The first layer's input is the prompt, or its rows each on their own, or a mixture of rows."""
    entry = of(name).text_entry()
    assert entry.layers
    (inputs, _), *_ = watched(name, entry.layers[:1]).values()
    rows = inputs[0][:1].flatten(1, -2)[:, -TEXT:]
    prompt = conditioning(name, TEXT)[0][0]
    assert (entry.through == "nothing") == (rows.shape == prompt.shape and torch.equal(rows, prompt))
    if entry.through == "norm":
        directions = torch.nn.functional.cosine_similarity(rows, prompt, dim=-1)
        assert directions.min() > 0.95
    assert (entry.pooled is not None) == (name in ("flux", "flux_schnell", "sd3"))
    if entry.pooled:
        assert of(name).kind(entry.pooled) == "global"


@pytest.mark.parametrize("name", names())
def test_what_is_trained_are_linear_layers_of_blocks(name):
    architecture = of(name)
    linear = {n for n, m in architecture.network.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = {choice: architecture.trained(choice) for choice in architecture.targets}
    found = {choice: {layer for layer in linear if re.search(pattern, layer)} for choice, pattern in targets.items()}
    assert found["text"] < found["attention"] < found["all"]
    assert {architecture.kind(layer) for layer in found["text"]} == {"text"}
    assert "global" not in {architecture.kind(layer) for layer in found["all"]}
    with pytest.raises(ValueError, match=r"'cross k/v' does not work on .*choose one of text, attention, all"):
        architecture.trained("cross k/v")


def test_how_prompts_become_equally_long():
    ways = {name: of(name).equal_lengths for name in names()}
    assert {name for name, way in ways.items() if way.by == "host"} == {"flux2"}
    assert {name for name, way in ways.items() if way.by == "token"} == {"zimage"}
    assert {name for name, way in ways.items() if way.shifts} == {"lumina2", "zimage"}
    network, way = of("zimage").network, ways["zimage"]
    assert dict(network.named_parameters())[way.token].shape[-1] == network.get_submodule(way.after)[1].out_features
    assert way.multiple == 32


def test_a_unet_answers_too():
    architecture = architecture_of(tiny_model("EPS", unet=TINY_UNET).model)
    sites = architecture.sites()
    assert [s.attention.kind for s in sites[:2]] == ["self", "cross"]
    assert {s.attention.stage for s in sites} == {"input", "middle", "output"}
    assert all(architecture.network.get_submodule(s.after) for s in sites)
    assert len(architecture.text_entry().layers) == len(sites)
    assert architecture.equal_lengths.by == "host"
    assert architecture.trained("cross k/v")
