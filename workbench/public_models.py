"""Public models as a graph loads them, in place of the demo model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

DEMO, DEMO_SIDE = "1", 128
"""The number of the demo model's node in every graph, and the side of its canvas in px."""
Link = tuple[str, int]


class PublicModel(NamedTuple):
    """A public model as a graph loads it.

    Attributes:
        side: px, what it was trained at.
        nodes: by number, in place of the demo model's.
        outputs: the links that stand for the demo model's MODEL, CLIP, VAE and, of models in parts, LATENT.
        newer: choices in its nodes that the oldest hosts of the pack do not offer yet.
    """

    side: int
    nodes: Mapping[str, dict[str, Any]]
    outputs: tuple[Link, ...]
    newer: tuple[str, ...] = ()


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _clip(name: str, kind: str) -> dict[str, Any]:
    return _node("CLIPLoader", clip_name=name, type=kind, device="default")


def _checkpoint(name: str, side: int) -> PublicModel:
    nodes = {DEMO: _node("CheckpointLoaderSimple", ckpt_name=name)}
    return PublicModel(side, nodes, ((DEMO, 0), (DEMO, 1), (DEMO, 2)))


def _in_parts(
    side: int,
    network: str,
    clip: dict[str, Any],
    vae: str,
    shift: float | None = None,
    latent: str = "EmptySD3LatentImage",
    newer: tuple[str, ...] = (),
) -> PublicModel:
    """A model whose network, text encoder and VAE are files of their own.

    Args:
        shift: of its noise levels.
        latent: the node that makes its empty latent.
    """
    nodes = {
        DEMO: _node("UNETLoader", unet_name=network, weight_dtype="default"),
        "101": clip,
        "102": _node("VAELoader", vae_name=vae),
        "103": _node(latent, width=side, height=side, batch_size=1),
    }
    if shift is not None:
        nodes["104"] = _node("ModelSamplingAuraFlow", model=[DEMO, 0], shift=shift)
    outputs = ((DEMO if shift is None else "104", 0), ("101", 0), ("102", 0), ("103", 0))
    return PublicModel(side, nodes, outputs, newer)


SD15 = _checkpoint("v1-5-pruned-emaonly-fp16.safetensors", 512)
SDXL = _checkpoint("sd_xl_base_1.0.safetensors", 1024)
Z_IMAGE = _in_parts(
    1024,
    "z_image_bf16.safetensors",
    _clip("qwen_3_4b.safetensors", "lumina2"),
    "ae.safetensors",
    shift=3.0,
)
FLUX = _in_parts(
    1024,
    "flux1-dev.safetensors",
    _node(
        "DualCLIPLoader",
        clip_name1="clip_l.safetensors",
        clip_name2="t5xxl_fp16.safetensors",
        type="flux",
        device="default",
    ),
    "ae.safetensors",
)
QWEN_IMAGE = _in_parts(
    1328,
    "qwen_image_fp8_e4m3fn.safetensors",
    _clip("qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image"),
    "qwen_image_vae.safetensors",
    shift=3.1,
)
KLEIN = _in_parts(
    1024,
    "flux-2-klein-base-4b.safetensors",
    _clip("qwen_3_4b.safetensors", "flux2"),
    "flux2-vae.safetensors",
    latent="EmptyFlux2LatentImage",
)
KREA_2 = _in_parts(
    1024,
    "krea2_turbo_fp8_scaled.safetensors",
    _clip("qwen3vl_4b_fp8_scaled.safetensors", "krea2"),
    "qwen_image_vae.safetensors",
    latent="EmptyLatentImage",
    newer=("krea2",),
)
ANIMA = _in_parts(
    1024,
    "anima-base-v1.0.safetensors",
    _clip("qwen_3_06b_base.safetensors", "stable_diffusion"),
    "qwen_image_vae.safetensors",
    latent="EmptyLatentImage",
)
