"""How well pictures match prompts, by a CLIP the user has loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


def _text_projections(clip: Any) -> list[torch.Tensor]:
    modules = clip.cond_stage_model.named_modules()
    return [
        m.weight for name, m in modules if name.endswith("text_projection") and getattr(m, "weight", None) is not None
    ]


def _is_real(projection: torch.Tensor) -> bool:
    """Whether a text projection was in the file: the host leaves a stand-in otherwise."""
    weight = projection.float()
    return bool(torch.isfinite(weight).all() and weight.any()) and not torch.equal(
        weight, torch.eye(*weight.shape, device=weight.device)
    )


def text_embeddings(clip: Any, prompts: Sequence[str]) -> torch.Tensor:
    """Unit-length embeddings of prompts, (prompts, dim).

    They are projected here: encoders of SD 1 and Flux hand on what stands before the projection, from CLIPLoader too.

    Raises:
        ValueError: the text encoder came without its projection (SD 1.5 checkpoints drop it), is no CLIP, or is several whose
            outputs are strung together (SD 3).
    """
    projections = _text_projections(clip)
    if not projections or not _is_real(projections[-1]):
        raise ValueError(
            "This CLIP has no text projection, so its words cannot be compared with pictures (SD 1.5 checkpoints leave it "
            "out); load a complete text encoder with CLIPLoader, such as clip_l of CLIP ViT-L/14."
        )
    tokens = map(clip.tokenize, prompts)
    pooled = torch.cat([clip.encode_from_tokens(each, return_pooled="unprojected")[1] for each in tokens]).float()
    projection = _text_projections(clip)[-1].to(pooled)  # as it is loaded now, with its patches
    if pooled.shape[-1] != projection.shape[-1]:
        raise ValueError(
            f"This text encoder gives {pooled.shape[-1]} numbers a prompt and projects {projection.shape[-1]}: it is several in "
            "one; load a single CLIP with CLIPLoader, such as clip_l of CLIP ViT-L/14."
        )
    return F.normalize(F.linear(pooled, projection), dim=-1)


def compared(clip_vision: Any, pictures: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Cosine of every picture (IMAGE, (n, height, width, 3) in 0..1) with every text embedding, (n, prompts).

    Raises:
        ValueError: no image projection, or embeddings of different sizes.
    """
    seen = clip_vision.encode_image(pictures, crop=False)["image_embeds"]
    if seen is None or seen.shape[-1] != words.shape[-1]:
        raise ValueError(
            f"The CLIP Vision gives {None if seen is None else seen.shape[-1]} numbers a picture and the CLIP "
            f"{words.shape[-1]} a prompt, so they are not a pair; load both from the same CLIP (ViT-L with clip_l, bigG with clip_g)."
        )
    return F.normalize(seen.float(), dim=-1) @ words.to(seen.device).T


def similarities(clip_vision: Any, clip: Any, pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Cosine of every picture with every prompt, (n, prompts).

    Raises:
        ValueError: as ``text_embeddings`` and ``compared``.
    """
    return compared(clip_vision, pictures, text_embeddings(clip, prompts))
