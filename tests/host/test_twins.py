"""The graphs for transformers of a person's own, run on small random models of the same class."""

from __future__ import annotations

from graphlib import TopologicalSorter

import nodes as host_nodes
import pytest
import torch
from comfy_extras import nodes_custom_sampler, nodes_flux, nodes_model_advanced, nodes_sd3
from comfyui_concepts.boards.random_transformers import random_lora
from comfyui_concepts.host.lora.concept import Concept
from comfyui_concepts.nodes import NODES
from comfyui_concepts.nodes.concept import ConceptList
from comfyui_concepts.workbench.twin import twin_graph
from comfyui_concepts.workbench.twins import TWINS

from .tiny_transformers import conditioning, names, tiny_transformer

CLASSES = {
    f"{graph}_transformer_{model}": family
    for graph in ("anagram", "compose")
    for model, family in (("z_image", "zimage"), ("flux", "flux"), ("qwen_image", "qwen"))
}
CLASSES |= {
    f"compose_transformer_{model}": family
    for model, family in (("klein", "flux2"), ("krea_2", "krea2"), ("anima", "anima"))
}
LAST = "SamplerCustomAdvanced"
SIDE = 64  # px


def _classes():
    """Every class by its name in a graph."""
    extras = {
        name: kind
        for module in (nodes_custom_sampler, nodes_flux, nodes_model_advanced, nodes_sd3)
        for name, kind in vars(module).items()
    }
    ours = {node.GET_SCHEMA().node_id: node for node in NODES}
    return host_nodes.NODE_CLASS_MAPPINGS | extras | ours


def _run(kind, inputs):
    """What a node returns, of either of the host's two kinds of node."""
    if hasattr(kind, "define_schema"):
        return kind.execute(**inputs).args
    return getattr(kind(), kind.FUNCTION)(**inputs)


def _concept(family, model, number, inputs, made):
    """A concept with a random LoRA in place of the person's."""
    words, phrase = conditioning(family, 12, seed=number), inputs["phrase"]
    previous = made[inputs["concepts"][0]][0] if "concepts" in inputs else None
    return ConceptList(Concept(phrase, phrase, random_lora(model.model, number), 1.0, words, words), previous)


@pytest.mark.parametrize(("name", "family"), CLASSES.items())
def test_a_twin_for_a_transformer_draws_with_a_small_model_of_its_class(name, family):
    if family not in names(every=True):
        pytest.skip(f"this host has no {TWINS[name].model.nodes['1']['inputs']['unet_name']}")
    graph, classes = twin_graph(TWINS[name]), _classes()
    end = next(identity for identity, node in graph.items() if node["class_type"] == LAST)
    links = {i: [v[0] for v in node["inputs"].values() if isinstance(v, list)] for i, node in graph.items()}
    needed = [end]
    for identity in needed:
        needed += [source for source in links[identity] if source not in needed]
    made, model = {}, tiny_transformer(family)
    for identity in TopologicalSorter({i: links[i] for i in needed}).static_order():
        kind, inputs = graph[identity]["class_type"], dict(graph[identity]["inputs"])
        if kind == "UNETLoader":
            made[identity] = (model,)
        elif kind == "CLIPTextEncode":  # the prompts of these models are as long as their text
            made[identity] = (conditioning(family, 10 + len(inputs["text"]) % 5),)
        elif kind == "ConceptsConcept":
            made[identity] = (_concept(family, model, int(identity), inputs, made),)
        elif "CLIPLoader" in kind:
            made[identity] = (None,)
        else:
            smaller = {"width": SIDE, "height": SIDE, "steps": 2}
            given = {k: made[v[0]][v[1]] if isinstance(v, list) else smaller.get(k, v) for k, v in inputs.items()}
            made[identity] = _run(classes[kind], given)
    latent = made[end][0]["samples"]
    cell = 16 if family == "flux2" else 8  # px
    assert latent.shape[-2:] == (SIDE // cell, SIDE // cell)
    assert latent.shape[1] == model.model.latent_format.latent_channels
    assert torch.isfinite(latent).all()
