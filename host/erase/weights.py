"""The weights an erasure goes to, as they are in effect: under every patch a model already has, in any storage."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import torch

from ...methods.erase.edit import Edit
from ...methods.erase.lowrank import LowRank
from ...methods.erase.targets import targeted_keys

log = logging.getLogger(__name__)

POOLED_KEY = "diffusion_model.label_emb.0.0.weight"
"""Where SDXL reads the pooled embedding: the first columns of this weight, before the picture's sizes."""
SAMPLE = 12  # weights that stand for all of them when only a report is made
_HALF = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def text_keys(model: Any, targets: Sequence[str], blocks: str = "") -> list[str]:
    """The keys of every weight that an edit of the text embedding goes to.

    Raises:
        ValueError: the model has none, or none in those blocks.
    """
    found = targeted_keys(model.model_state_dict(), targets, blocks)
    width = text_width(model)
    keys = [key for key in found if width is None or _linear(model, key).in_features == width]
    if not keys:
        name = type(model.model.diffusion_model).__name__
        where = f" in blocks that match '{blocks}'" if blocks else ""
        raise ValueError(
            f"This model ({name}) has no cross-attention that reads the prompt{where}, which closed-form erasure changes; use "
            "a model of the SD 1, SD 2 or SDXL families."
        )
    return keys


def sampled_keys(keys: Sequence[str]) -> list[str]:
    """About ``SAMPLE`` of these keys, spread over the model. Keys and values alternate in a model's list, so that every
    second, fourth … would be keys alone; an odd step takes both."""
    return list(keys[:: max(1, len(keys) // SAMPLE) | 1])


def text_width(model: Any) -> int | None:
    """Width of the text embedding the model reads, or None if it does not say."""
    config = getattr(model.model.model_config, "unet_config", None) or {}
    width = config.get("context_dim")
    return width if isinstance(width, int) else None


def _linear(model: Any, key: str) -> Any:
    return comfy.utils.get_attr(model.model, key.rsplit(".", 1)[0])


def low_precision(model: Any, keys: Iterable[str]) -> bool:
    """Whether any of these weights is stored so coarsely (fp8, quantised) that a patch would be rounded away."""
    state = model.model_state_dict()
    return any(not _plain(state[key], _linear(model, key)) or state[key].dtype not in _HALF for key in keys)


def _plain(weight: torch.Tensor, module: Any) -> bool:
    whole = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return (
        type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.is_floating_point()
        and not weight.is_meta
        and (None in whole or tuple(weight.shape) == whole)
    )


def effective_weights(model: Any, keys: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each key with its weight in float32, (out, in), with all patches the MODEL has; nothing of the model is changed."""
    entries = model.get_key_patches("diffusion_model.")
    for key in keys:
        comfy.model_management.throw_exception_if_processing_interrupted()
        (weight, convert), *patches = entries[key]
        if not _plain(weight, _linear(model, key)):
            yield key, probed_weight(model, key)
            continue
        converted = convert(weight.to(torch.float32, copy=True), inplace=True)
        yield key, comfy.lora.calculate_weight(patches, converted, key)


def probed_weight(model: Any, key: str) -> torch.Tensor:
    """The weight of a layer in a form only it can read (GGUF, other quantisations): its answers to the unit vectors."""
    comfy.model_management.load_models_gpu([model])
    module = _linear(model, key)
    device = model.load_device
    one = torch.eye(module.in_features, device=device)
    with torch.no_grad():
        return (module(one) - module(torch.zeros_like(one[:1]))).T.float()


def energy(model: Any, keys: Sequence[str], progress: Any = None) -> torch.Tensor:
    """Q = Σ WᵀW over these weights, (d, d), in float64 on the CPU: all that RECE and the reports need to know of them."""
    total: torch.Tensor | None = None
    for _, weight in effective_weights(model, keys):
        part = (weight.T @ weight).cpu().double()  # in this order: not every device has float64
        total = part if total is None else total + part
        if progress is not None:
            progress.update(1)
    assert total is not None
    return total


def weight_deltas(model: Any, edit: Edit) -> dict[Any, LowRank]:
    """ΔW of every weight the edit goes to, by the key the host's patches take; a column range where it is only a part.

    Raises:
        ValueError: the edit is for embeddings of another width, or the model has no such weights.
    """
    made: dict[Any, LowRank] = {}
    if edit.text is not None and edit.text.rank:
        check_width(model, edit)
        for key, weight in effective_weights(model, text_keys(model, edit.targets, edit.blocks)):
            made[key] = _seen_through(weight, edit.text)
    if edit.pooled is not None and edit.pooled.rank:
        if POOLED_KEY not in model.model_state_dict():
            raise ValueError(
                "The edit also changes the pooled text embedding, which this model does not read; solve it with 'pooled' off, "
                "or apply it to an SDXL model."
            )
        ((_, weight),) = effective_weights(model, [POOLED_KEY])
        columns = edit.pooled.width
        made[(POOLED_KEY, (1, 0, columns))] = _seen_through(weight[:, :columns], edit.pooled)
    return made


def _seen_through(weight: torch.Tensor, matrix: LowRank) -> LowRank:
    """ΔW = W·M as factors: nothing but the thin one depends on the layer."""
    return LowRank((weight @ matrix.up.to(weight)).cpu(), matrix.down.float())


def check_width(model: Any, edit: Edit) -> None:
    """Refuses an edit for text embeddings of another width.

    Raises:
        ValueError: which widths these are.
    """
    width = text_width(model)
    if width is not None and edit.width not in (None, width):
        raise ValueError(
            f"The edit is for text embeddings of width {edit.width} and this model reads width {width} (SD 1: 768, SD 2: 1024, "
            "SDXL: 2048); solve it with the MODEL and CLIP of the checkpoint it shall go to."
        )


def base_fingerprint(model: Any) -> tuple[float, ...]:
    """Norms of three fixed projections of a cross-attention in the middle of the model: fine-tunes differ in them a little."""
    keys = text_keys(model, ("k",))
    middle = [key for key in keys if ".middle_block." in key] or keys[len(keys) // 2 :]
    ((_, weight),) = effective_weights(model, middle[:1])
    directions = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(11)).to(weight)
    return tuple(round(float(norm), 5) for norm in (directions @ weight.T).norm(dim=1))


def fingerprints_differ(first: Sequence[float], second: Sequence[float], tolerance: float = 0.02) -> bool:
    """Whether two fingerprints are of different things; an unknown one differs from none."""
    if not first or not second:
        return False
    return len(first) != len(second) or any(
        abs(a - b) > tolerance * max(abs(a), abs(b), 1e-6) for a, b in zip(first, second, strict=True)
    )
