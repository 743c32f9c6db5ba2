"""The bundled model as the host's own nodes meet it."""

from __future__ import annotations

import logging

import comfy.lora
import comfy.sd
import comfy.utils
import nodes as host_nodes
import pytest
import torch
from comfyui_concepts.demo import vocabulary
from comfyui_concepts.demo.autoencoder import Autoencoder
from comfyui_concepts.demo.files import FOLDER, LORAS
from comfyui_concepts.demo.judge import Judge
from comfyui_concepts.demo.loader import KINDS, load_demo_model

SYMMETRIES = [(turns, mirrored) for turns in range(4) for mirrored in (False, True)]


def _move(x: torch.Tensor, turns: int, mirrored: bool) -> torch.Tensor:
    x = x.rot90(turns, (-2, -1))
    return x.flip(-1) if mirrored else x


def _encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def _paint(parts, prompt, *, seed=1, steps=20, size=(16, 16), batch=1):
    model, clip, vae = parts
    latent = {"samples": torch.zeros(batch, 4, *size)}
    (out,) = host_nodes.common_ksampler(
        model, seed, steps, 3.0, "euler", "normal", _encode(clip, prompt), _encode(clip, ""), latent
    )
    return vae.decode(out["samples"])


def test_it_is_a_real_member_of_the_hosts_family(demo_model):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    model, clip, vae = demo_model
    assert isinstance(model.model.diffusion_model, UNetModel)
    assert isinstance(clip, comfy.sd.CLIP)
    assert isinstance(vae, comfy.sd.VAE)
    assert model.get_model_object("model_sampling").sigma_max > 14


def test_the_same_seed_draws_the_same_picture_and_another_another(demo_model):
    first = _paint(demo_model, "a cat", steps=4)
    assert torch.equal(_paint(demo_model, "a cat", steps=4), first)
    assert not torch.equal(_paint(demo_model, "a cat", steps=4, seed=2), first)
    assert not torch.equal(_paint(demo_model, "a dog", steps=4), first)


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (8, 8), (20, 12)])
def test_canvases_it_takes(demo_model, size):
    assert _paint(demo_model, "a cat", steps=2, size=size, batch=2).shape == (2, size[0] * 8, size[1] * 8, 3)


@pytest.mark.parametrize("size", [(4, 16), (64, 64)])
def test_canvases_it_refuses(demo_model, size):
    with pytest.raises(ValueError, match="128 × 128"):
        _paint(demo_model, "a cat", steps=1, size=size)


def test_its_weights_are_ordinary_tensors_though_the_host_loads_under_inference_mode():
    model, clip, vae = load_demo_model()
    for module in (model.model, clip.cond_stage_model, vae.first_stage_model):
        assert not any(p.is_inference() for p in module.parameters())


def test_a_prompt_can_be_weighted_and_long(demo_model):
    _, clip, _ = demo_model
    assert _encode(clip, "(a cat:1.3), blue background")[0][0].shape == (1, 77, 128)
    assert _encode(clip, "a cat and " * 60)[0][0].shape[1] % 77 == 0


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_follows_every_symmetry_exactly(kind):
    picture = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    autoencoder = Autoencoder(kind).double()
    for symmetry in SYMMETRIES:
        torch.testing.assert_close(
            autoencoder.encode(_move(picture, *symmetry)), _move(autoencoder.encode(picture), *symmetry)
        )


def test_decoding_follows_every_symmetry_nearly(demo_model):
    """decode(turned latent) is the turned picture, closer than the decoder is to the truth: what anagrams stand on."""
    vae = demo_model[2]
    latent = vae.encode(_paint(demo_model, "a cat, blue background"))
    upright = vae.decode(latent).movedim(-1, 1)
    for symmetry in SYMMETRIES:
        turned = vae.decode(_move(latent, *symmetry)).movedim(-1, 1)
        error = (turned - _move(upright, *symmetry)).square().mean()
        assert -10 * torch.log10(error + 1e-12) > 25, f"{symmetry}: {-10 * torch.log10(error):.1f} dB"


def test_encode_and_decode_are_near_each_other(demo_model):
    vae = demo_model[2]
    picture = _paint(demo_model, "a star, blue background")
    again = vae.decode(vae.encode(picture))
    assert -10 * torch.log10((again - picture).square().mean()) > 20


@pytest.mark.parametrize("concept", vocabulary.LORA_CONCEPTS)
def test_the_hosts_loader_takes_every_key_of_a_lora(demo_model, concept, caplog):
    model, clip, _ = demo_model
    state = comfy.utils.load_torch_file(str(LORAS / f"concepts-demo-{concept}.safetensors"), safe_load=True)
    assert any(k.startswith("lora_unet_") for k in state)
    assert any(k.startswith("lora_te_") for k in state)
    with caplog.at_level(logging.WARNING):
        patched, patched_clip = comfy.sd.load_lora_for_models(model, clip, state, 1.0, 1.0)
    assert "not loaded" not in caplog.text
    assert len(patched.patches) + len(patched_clip.patcher.patches) == sum(k.endswith("lora_up.weight") for k in state)


def test_a_lora_at_strength_0_is_the_plain_model(demo_model):
    model, clip, vae = demo_model
    state = comfy.utils.load_torch_file(str(LORAS / "concepts-demo-lion.safetensors"), safe_load=True)
    plain = _paint(demo_model, "a lion", steps=3)
    assert torch.equal(
        _paint((*comfy.sd.load_lora_for_models(model, clip, state, 0.0, 0.0), vae), "a lion", steps=3), plain
    )
    assert not torch.equal(
        _paint((*comfy.sd.load_lora_for_models(model, clip, state, 1.0, 1.0), vae), "a lion", steps=3), plain
    )


def test_the_files_are_safetensors_and_small():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".webp"}
    assert sum(p.stat().st_size for p in files) <= 54e6
    assert len(list(LORAS.glob("*.safetensors"))) >= 6


def _copy_weights(folder):
    for path in FOLDER.glob("*.safetensors"):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("name", ["unet", "text", "decoder", "judge"])
@pytest.mark.parametrize("fault", ["missing", "cut short", "not safetensors", "of another version"])
def test_faulty_weights_get_a_sentence(tmp_path, name, fault):
    from safetensors.torch import save_file

    folder = _copy_weights(tmp_path)
    path = folder / f"{name}.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if fault == "cut short":
        path.write_bytes(whole[: len(whole) // 2])
    elif fault == "not safetensors":
        path.write_bytes(b"hello")
    elif fault == "of another version":
        save_file({"something.weight": torch.zeros(2)}, path)
    with pytest.raises(RuntimeError, match=rf"{name}\.safetensors .*git checkout -- demo/weights"):
        Judge.load(path) if name == "judge" else load_demo_model(folder)


@pytest.mark.parametrize("rows", [torch.zeros(2, 64), torch.zeros(3, 128)])
def test_token_rows_of_another_version_get_a_sentence(tmp_path, rows):
    from safetensors.torch import load_file, save_file

    folder = _copy_weights(tmp_path)
    weights = load_file(folder / "text.safetensors") | {"token_ids": torch.tensor([1, 2]), "token_rows": rows}
    (folder / "text.safetensors").unlink()
    save_file(weights, folder / "text.safetensors")
    with pytest.raises(RuntimeError, match=r"text\.safetensors does not fit this version"):
        load_demo_model(folder)


def _lora(up: int, down: int) -> dict:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    return {f"{name}.lora_down.weight": torch.ones(4, down), f"{name}.lora_up.weight": torch.ones(up, 4)}


def test_a_lora_of_a_large_model_is_refused_in_a_sentence(demo_model):
    """Its layers have the same names; the host takes it, and would only log that the shapes are wrong."""
    model, clip, vae = demo_model
    foreign, _ = comfy.sd.load_lora_for_models(model, clip, _lora(320, 768), 1.0, 0.0)
    with pytest.raises(
        ValueError, match="made for another model: it changes 320 × 768.*which has 64 × 128.*concepts-demo-"
    ):
        _paint((foreign, clip, vae), "a cat", steps=1)
    fitting, _ = comfy.sd.load_lora_for_models(model, clip, _lora(64, 128), 1.0, 0.0)
    _paint((fitting, clip, vae), "a cat", steps=1)
    _paint(demo_model, "a cat", steps=1)  # and the plain model is as before


@pytest.mark.parametrize("concept", vocabulary.LORA_CONCEPTS)
def test_diffusers_reads_every_key_of_a_lora(concept):
    """Another library's reader of kohya files knows the names."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from safetensors.torch import load_file

    state = load_file(LORAS / f"concepts-demo-{concept}.safetensors")
    layers = sum(key.endswith(".lora_up.weight") for key in state)
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(dict(state))
    assert len(converted) == 2 * layers
    assert len(alphas) == layers
    assert all(key.startswith(("unet.", "text_encoder.")) for key in converted)
