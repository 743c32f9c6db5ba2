"""What the trainers do, as far as it can be checked without the art."""

from __future__ import annotations

from random import Random

import comfy.sd1_clip
import pytest
import torch
from comfyui_concepts.demo import vocabulary
from comfyui_concepts.demo.training import adapters, batches, unet_loss
from comfyui_concepts.demo.training.networks import Tokenizer, build_text, build_unet


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


def _scenes():
    rng = Random(1)
    for objects in (1, 2, 3):
        for style in vocabulary.STYLES:
            yield vocabulary.scene_of(tuple(rng.sample(vocabulary.CONCEPTS, objects)), "blue", style)


def test_a_caption_puts_the_place_before_the_noun():
    scene = vocabulary.scene_of(("cat", "owl"), "blue", "sketch")
    assert scene.caption() == "a sketch of on the left a cat and on the right an owl, blue background"
    assert scene.caption(name_background=False).endswith("an owl")
    with pytest.raises(ValueError, match="1 to 3 objects, not 4"):
        vocabulary.scene_of(("cat",) * 4, "blue")


def test_the_cached_tokenizer_is_the_hosts(tokenizer):
    theirs = comfy.sd1_clip.SDTokenizer()
    for scene in _scenes():
        caption = scene.caption()
        ids, at = tokenizer(caption, scene.concepts)
        assert ids == [t[0] for t in theirs.tokenize_with_weights(caption)[0]]
        assert [ids[i] for i in at] == [tokenizer.word(c)[-1] for c in scene.concepts]


def test_every_caption_uses_trained_tokens_only(tokenizer):
    used = set(batches.used_tokens(tokenizer))
    for scene in _scenes():
        assert set(tokenizer(scene.caption())[0]) <= used
    assert not set(tokenizer("zebra")[0][1:2]) & used


def test_the_schedule_is_the_hosts(demo_model):
    alphas, sigmas = unet_loss.alphas_and_sigmas()
    torch.testing.assert_close(
        sigmas / alphas, demo_model[0].get_model_object("model_sampling").sigmas, rtol=1e-4, atol=1e-4
    )


def test_a_fresh_unet_predicts_zero():
    unet = build_unet()
    with torch.no_grad():
        out = unet(torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 77, 128))
    assert not out.any()


def test_attention_loss_is_zero_inside_and_one_outside():
    maps = unet_loss.AttentionMaps(torch.tensor([[3]]))
    attention = torch.zeros(1, 1, 64)
    attention[..., :8] = 1 / 8
    maps.maps = [attention]
    top = torch.zeros(1, 1, 16, 16)
    top[:, :, :2] = 1
    assert maps.loss(top).item() == pytest.approx(0)
    assert maps.loss(top.flip(-2)).item() == pytest.approx(1)


@pytest.mark.slow
def test_a_few_steps_of_training_lower_the_loss(tokenizer):
    torch.manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        unet, text = build_unet(), build_text(batches.used_tokens(tokenizer))
        ids, at = tokenizer("a cat", ("cat",))
        batch = (
            torch.full((1, 3, 128, 128), 0.4),
            torch.tensor([ids]),
            torch.tensor([at]),
            torch.ones(1, 1, 16, 16),
        )
        optimiser = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3)
        encode = lambda x: torch.full((len(x), 4, 16, 16), 0.5)  # noqa: E731
        losses = []
        for _ in range(8):
            generator = torch.Generator().manual_seed(1)
            loss = unet_loss.training_loss(unet, text, encode, batch, unet_loss.alphas_and_sigmas(), generator)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_kohya_names_are_the_ordinary_ones(demo_model):
    unet, text = adapters.kohya_names(demo_model[0], demo_model[1])
    assert (
        unet["input_blocks.1.1.transformer_blocks.0.attn1.to_q"]
        == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    )
    assert text["text_model.encoder.layers.1.mlp.fc1"] == "lora_te_text_model_encoder_layers_1_mlp_fc1"
