"""Models used during a sampling besides the sampled one: a VAE or CLIP Vision that runs at every step.

Loading any other model may evict the one being sampled, with its patches. The sampler does not check for this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import comfy.model_management
import torch

from .. import keys
from ..types import BaseModel, ModelPatcher


def with_additional_models(model: ModelPatcher, models: Sequence[object]) -> ModelPatcher:
    """A clone of the model whose samplings load these first, so there is memory for all of them from the start.

    Args:
        models: VAEs and CLIP Visions. One without a ``patcher`` cannot be loaded by the host and is left out.
    """
    clone = model.clone()
    clone.set_additional_models(keys.AUXILIARY_MODELS, [one.patcher for one in models if hasattr(one, "patcher")])
    return clone


@contextmanager
def keep_model_loaded(model: BaseModel, latents: torch.Tensor) -> Iterator[None]:
    """Whatever is loaded inside, the model is loaded again afterwards with its patches, if it is being sampled.

    Args:
        latents: what it is sampling, (batch, channels, …, height, width), for the memory it needs.
    """
    yield
    sampled = getattr(model, "current_patcher", None)
    if sampled is None:
        return
    count, *shape = latents.shape
    comfy.model_management.load_models_gpu(
        [sampled, *sampled.get_nested_additional_models()],
        memory_required=model.memory_required([2 * count, *shape]),  # positive and negative, as the host counts
        minimum_memory_required=model.memory_required([count, *shape]),
    )
