"""How well pictures match prompts, by a CLIP that the user has loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..types import CLIP, ClipVision


def _text_projections(clip: CLIP) -> list[torch.Tensor]:
    modules = clip.cond_stage_model.named_modules()
    weights = [getattr(module, "weight", None) for name, module in modules if name.endswith("text_projection")]
    return [weight for weight in weights if weight is not None]


def _is_real(projection: torch.Tensor) -> bool:
    """Whether a text projection was in the file: without one, the host puts a placeholder there."""
    weight = projection.float()
    return bool(torch.isfinite(weight).all() and weight.any()) and not torch.equal(
        weight, torch.eye(*weight.shape, device=weight.device)
    )


def text_embeddings(clip: CLIP, prompts: Sequence[str]) -> torch.Tensor:
    """Unit-length embeddings of prompts, (prompts, dim).

    The projection is applied here, because encoders of SD 1 and Flux return the embedding before it, also from
    CLIPLoader.

    Raises:
        ValueError: the text encoder has no projection (SD 1.5 checkpoints drop it), is not a CLIP, or is several whose
            outputs are concatenated (SD 3).
    """
    projections = _text_projections(clip)
    if not projections or not _is_real(projections[-1]):
        raise ValueError(
            "This CLIP has no text projection, so its words cannot be compared with pictures (SD 1.5 checkpoints leave "
            "it out); load a complete text encoder with CLIPLoader, such as clip_l of CLIP ViT-L/14."
        )
    tokens = map(clip.tokenize, prompts)
    pooled = torch.cat([clip.encode_from_tokens(each, return_pooled="unprojected")[1] for each in tokens]).float()
    projection = _text_projections(clip)[-1].to(pooled)  # as it is loaded now, with its patches
    if pooled.shape[-1] != projection.shape[-1]:
        raise ValueError(
            f"This text encoder returns {pooled.shape[-1]} numbers per prompt and projects {projection.shape[-1]}, so "
            "it is several in one; load a single CLIP with CLIPLoader, such as clip_l of CLIP ViT-L/14."
        )
    return F.normalize(F.linear(pooled, projection), dim=-1)


def cosine_similarities(clip_vision: ClipVision, pictures: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Cosine of every picture (IMAGE, (n, height, width, 3) in 0..1) with every text embedding, (n, prompts).

    Raises:
        ValueError: no image projection, or embeddings of different sizes.
    """
    images = clip_vision.encode_image(pictures, crop=False)["image_embeds"]
    if images is None or images.shape[-1] != texts.shape[-1]:
        raise ValueError(
            f"The CLIP Vision returns {None if images is None else images.shape[-1]} numbers per picture and the CLIP "
            f"{texts.shape[-1]} per prompt, so they do not belong together; load both from the same CLIP (ViT-L with "
            "clip_l, bigG with clip_g)."
        )
    return F.normalize(images.float(), dim=-1) @ texts.to(images.device).T


def similarities(clip_vision: ClipVision, clip: CLIP, pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Cosine of every picture with every prompt, (n, prompts).

    Raises:
        ValueError: as ``text_embeddings`` and ``cosine_similarities``.
    """
    return cosine_similarities(clip_vision, pictures, text_embeddings(clip, prompts))
