"""Models that work beside the one that is being sampled: a VAE or CLIP Vision that is asked at every step.

Whatever loads a model in the host may take the sampled one off the GPU, patches and all, and a sampler never looks again
whether it is still there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch

from .. import keys


def with_additional_models(model: Any, helpers: Sequence[Any]) -> Any:
    """A clone of the model whose samplings load these first, so that there is memory for all of them from the start.

    Args:
        helpers: VAEs and CLIP Visions; one that has no ``patcher``, which is nothing the host could load, is left out.
    """
    own = model.clone()
    own.set_additional_models(
        keys.AUXILIARY_MODELS, [helper.patcher for helper in helpers if hasattr(helper, "patcher")]
    )
    return own


@contextmanager
def keep_model_loaded(model: Any, latents: torch.Tensor) -> Iterator[None]:
    """Whatever is loaded inside, the model is back afterwards with its patches, if it is being sampled.

    Args:
        model: the host's model itself, which knows who samples it.
        latents: what it is sampling, (batch, channels, …, height, width), for the memory it needs.
    """
    yield
    sampled = getattr(model, "current_patcher", None)
    if sampled is None:
        return
    count, *shape = latents.shape
    comfy.model_management.load_models_gpu(
        [sampled, *sampled.get_nested_additional_models()],
        memory_required=model.memory_required([2 * count, *shape]),  # positive and negative, as the host reckons it
        minimum_memory_required=model.memory_required([count, *shape]),
    )
