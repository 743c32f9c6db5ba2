"""A LoRA in a region of a transformer: the weight of each token by the layer's kind, and what the network makes."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.host.lora.branches import Branch, TokensByKind, low_rank, prepared
from comfyui_concepts.host.lora.factors import network_factors
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.host.registry import architecture_of

from ..tiny_transformers import names, noise, predict, shared_transformer
from .test_lora_transformers import CPU, file_of, layers_of

SIZE, TEXT = (8, 6), 10
ALL = slice(None)
OWN = torch.arange(TEXT) < 4


def tokens(name, image, text, **more):
    """``image`` and ``text``: one weight for all, or their own."""
    architecture = architecture_of(shared_transformer(name).model)
    count, _ = architecture.image_tokens(SIZE)
    image = torch.full((count,), image) if isinstance(image, float) else image
    text = torch.full((TEXT,), text) if isinstance(text, float) else text
    return TokensByKind(architecture, SIZE, image, text, **more)


def test_a_joint_layer_has_words_and_region_and_the_mean_in_what_fills_them_up():
    region = torch.tensor([1.0, 0, 0] * 4)
    weights = tokens("zimage", region, OWN.float()).at("layers.0.attention.qkv", (2, 64), ALL).weights
    assert weights[:TEXT].tolist() == OWN.tolist()
    assert torch.allclose(weights[TEXT:32], torch.tensor(0.4))
    assert weights[32:44].tolist() == region.tolist()
    assert torch.allclose(weights[44:], torch.tensor(1 / 3))
    by_row = torch.stack([region, 1 - region])
    weights = tokens("flux", by_row, OWN.float()).at("single_blocks.0.linear1", (2, 22), slice(1, 3)).weights
    assert weights[:, :TEXT].tolist() == [OWN.tolist()] * 2
    assert weights[:, TEXT:].tolist() == by_row.tolist()


def test_references_get_nothing_of_it_and_words_behind_zeros_are_found():
    weights = tokens("flux", 1.0, 1.0, references=[(4, 4)]).at("single_blocks.0.linear1", (1, 26), ALL).weights
    assert weights.tolist() == [1] * 22 + [0] * 4
    weights = tokens("flux2", 0.0, OWN.float()).at("double_blocks.0.txt_mlp.0", (1, 512), ALL).weights
    assert weights[-TEXT:].tolist() == OWN.tolist()


def test_the_picture_keeps_its_form_where_the_layer_does():
    region = torch.arange(12.0)
    place = tokens("cosmos", region, 1.0).at("blocks.0.mlp.layer1", (1, 1, 4, 3), ALL)
    assert place.weights.tolist() == region.reshape(1, 4, 3).tolist()


@pytest.mark.skipif("krea2" not in names(), reason="this host has no Krea 2")
@pytest.mark.parametrize(("rows", "found"), [(slice(1, 3), slice(10, 30)), (ALL, slice(0, 30))])
def test_text_in_rows_of_its_own_has_the_words_weights(rows, found):
    """The text is folded into the batch, to attend over an encoder's layers; the projector keeps it apart."""
    at = tokens("krea2", 1.0, OWN.float()).at
    folded = at("txtfusion.layerwise_blocks.0.attn.wq", (30, 3), rows)
    assert folded.rows == found
    assert folded.weights.flatten().tolist() == OWN.tolist() * ((found.stop - found.start) // TEXT)
    beside = at("txtfusion.projector", (3, TEXT, 16), rows)
    assert beside.rows == rows
    assert beside.weights.flatten().tolist() == OWN.tolist()


def test_layers_without_tokens_are_left_alone_unless_they_are_wanted():
    layer = "distilled_guidance_layer.layers.0.in_layer"  # Chroma's has an axis that looks like tokens
    assert not tokens("chroma", 1.0, 1.0).acts_on(layer)
    wanted = tokens("chroma", 1.0, 1.0, everywhere=True)
    assert wanted.acts_on(layer)
    assert wanted.at(layer, (3, 344), slice(1, 2)) == (slice(1, 2), None)


def test_another_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match=r"works on 7 image tokens, and the regions are known for \[12\]"):
        tokens("qwen", 1.0, 1.0).at("img_in", (2, 7), ALL)


@pytest.mark.parametrize("name", names())
def test_a_region_over_everything_is_the_whole_lora_and_one_over_nothing_is_the_plain_model(name):
    """Every layer answers; with the picture's half and the words, it is neither. Afterwards nothing is left."""
    patcher = shared_transformer(name)
    network, latent = patcher.model.diffusion_model, noise(patcher, *SIZE)
    tensors, _ = file_of(network, layers_of(name)[0], "host")
    factors = prepared(network_factors(LoraFile("tried", tensors), patcher.model), CPU, torch.float32)

    def picture(image, text):
        with low_rank(network, [Branch(factors, 0.5, tokens=tokens(name, image, text))]) as silent:
            out = predict(patcher, name, latent, length=TEXT)
        assert not silent
        return out

    plain = predict(patcher, name, latent, length=TEXT)
    with low_rank(network, [Branch(factors, 0.5)]):
        whole = predict(patcher, name, latent, length=TEXT)
    moved = (whole - plain).norm()
    assert (picture(1.0, 1.0) - whole).norm() < 1e-5 * moved
    assert torch.equal(picture(0.0, 0.0), plain)
    count = tokens(name, 1.0, 1.0).image.numel()
    half = picture((torch.arange(count) < count // 2).float(), OWN.float())
    assert min((half - plain).norm(), (half - whole).norm()) > 0.01 * moved
    assert torch.equal(predict(patcher, name, latent, length=TEXT), plain)
