"""The weights an erasure changes, as they act: under every patch a model already has, in any storage."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from ...methods.erase.edit import KEYS_AND_VALUES, NOTHING, Edit
from ...methods.erase.lowrank import LowRank
from ...methods.erase.targets import projection, targeted_keys
from ..architecture import TextEntry
from ..registry import FAMILIES, text_entry_of
from ..types import ModelPatcher

_NETWORK = "diffusion_model."
PatchKey = str | tuple[str, tuple[int, int, int]]
"""Where the host puts a patch: a weight, or (weight, (axis, first, count)) for a range of it."""

POOLED_KEY = "diffusion_model.label_emb.0.0.weight"
"""Where SDXL reads the pooled embedding: the first columns of this weight, before the picture's sizes."""
SAMPLE = 12  # weights that represent all of them when only a report is made
_HALF = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def text_keys(model: ModelPatcher, targets: Sequence[str] = KEYS_AND_VALUES, blocks: str = "") -> list[str]:
    """The keys of every weight that an edit of the text embedding changes.

    Raises:
        ValueError: the model has none, none in those blocks, or one that is neither a key nor a value projection.
    """
    entry = text_entry_of(model)
    keys = _unet_keys(model, targets, blocks) if entry is None else _entry_keys(model, entry, targets, blocks)
    if not keys:
        name = type(model.model.diffusion_model).__name__
        where = f" in blocks that match '{blocks}'" if blocks else ""
        raise ValueError(
            f"This model ({name}) has no layer that is known to read the prompt first{where}, and closed-form erasure "
            f"changes that; use a model of one of these families: {'; '.join(known.title for known in FAMILIES)}."
        )
    return keys


def _unet_keys(model: ModelPatcher, targets: Sequence[str], blocks: str) -> list[str]:
    found = targeted_keys(model.model_state_dict(), targets, blocks)
    width = text_width(model)
    return [key for key in found if width is None or _layer(model, key).in_features == width]


def _entry_keys(model: ModelPatcher, entry: TextEntry, targets: Sequence[str], blocks: str) -> list[str]:
    """Key and value projections where the text meets those, else whatever it meets."""
    keys = [f"{_NETWORK}{layer}.weight" for layer in entry.layers]
    if all(projection(key) is None for key in keys) and set(targets) != set(KEYS_AND_VALUES):
        raise ValueError(
            f"The text of this model goes through one layer ({entry.layers[0]}) before any keys and values, so they "
            "cannot be edited apart; choose 'keys and values'."
        )
    return [key for key in keys if projection(key) in (None, *targets) and re.search(blocks, key)]


def pooled_key(model: ModelPatcher) -> str | None:
    """The weight that reads the pooled text embedding itself; None if there is none."""
    entry = text_entry_of(model)
    if entry is None:
        return POOLED_KEY if POOLED_KEY in model.model_state_dict() else None
    return f"{_NETWORK}{entry.pooled}.weight" if entry.pooled and entry.through == NOTHING else None


def sampled_keys(keys: Sequence[str]) -> list[str]:
    """About ``SAMPLE`` of these keys, spread over the model. The step is odd, since keys and values alternate."""
    return list(keys[:: max(1, len(keys) // SAMPLE) | 1])


def text_width(model: ModelPatcher) -> int | None:
    """Width of the text embedding as the weights read it, or None if a UNet's configuration does not say."""
    if entry := text_entry_of(model):
        return int(_layer(model, f"{_NETWORK}{entry.layers[0]}.weight").in_features)
    config = getattr(model.model.model_config, "unet_config", None) or {}
    width = config.get("context_dim")
    return width if isinstance(width, int) else None


def check_clip_width(model: ModelPatcher, width: int) -> None:
    """Refuses a CLIP whose embeddings have another width than the model reads. A transformer says so itself.

    Raises:
        ValueError: both widths.
    """
    if text_entry_of(model) is None:
        _check_width(model, width, "The CLIP makes", "connect the CLIP of the same checkpoint")


def check_edit_width(model: ModelPatcher, edit: Edit) -> None:
    """Refuses an edit for text embeddings of another width.

    Raises:
        ValueError: both widths.
    """
    _check_width(model, edit.width, "The edit is for", "solve it with the MODEL and CLIP of the checkpoint it is for")
    if edit.text is not None and set(edit.entry).isdisjoint(known := _known_entry(model)) and (edit.entry or known):
        changes, reads = (min(places, default="the cross-attention of a UNet") for places in (edit.entry, known))
        raise ValueError(
            f"The edit changes {changes}, and this model reads its prompt by {reads}; use the MODEL it is for."
        )


def _known_entry(model: ModelPatcher) -> set[str]:
    entry = text_entry_of(model)
    return set() if entry is None else {f"{_NETWORK}{layer}.weight" for layer in entry.layers}


def _check_width(model: ModelPatcher, width: int | None, source: str, remedy: str) -> None:
    reads = text_width(model)
    if None not in (reads, width) and width != reads:
        raise ValueError(
            f"{source} text embeddings of width {width} and this MODEL reads width {reads} (SD 1: 768, SD 2: 1024, "
            f"SDXL: 2048, Flux.1 and SD3: 4096); {remedy}."
        )


def _layer(model: ModelPatcher, key: str) -> torch.nn.Linear:
    """The layer of a weight: a linear one, or another pack's that acts as one."""
    return comfy.utils.get_attr(model.model, key.rsplit(".", 1)[0])


def low_precision(model: ModelPatcher, keys: Iterable[str]) -> bool:
    """Whether any of these weights acts in so coarse a form (fp8, quantised) that a patch would be rounded away."""
    state = model.model_state_dict()
    return any(
        not _plain(state[key], _layer(model, key)) or _acting_dtype(model, key, state[key]) not in _HALF for key in keys
    )


def _acting_dtype(model: ModelPatcher, key: str, weight: torch.Tensor) -> torch.dtype:
    """The dtype a weight is used in. Newer hosts keep it as the file has it and cast it, patched, on its way in."""
    name = key.rsplit(".", 1)[1]
    return getattr(_layer(model, key), f"{name}_comfy_model_dtype", None) or weight.dtype


def _plain(weight: torch.Tensor, layer: torch.nn.Module) -> bool:
    """Whether the tensor itself holds the weight, not a packed form that only the layer can read."""
    whole = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
    return (
        type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.is_floating_point()
        and not weight.is_meta
        and (None in whole or tuple(weight.shape) == whole)
    )


def effective_weights(model: ModelPatcher, keys: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each key with its weight in float32, (out, in), with all patches of the MODEL. Nothing of the model changes.

    What another node puts around a layer, such as Load LoRA (Bypass), counts too.
    """
    if model.injections:
        comfy.model_management.load_models_gpu([model])  # only then is it in place
    for key in keys:
        comfy.model_management.throw_exception_if_processing_interrupted()
        weight, convert = _unpatched(model, key)
        beside = bool(model.injections) and "forward" in vars(_layer(model, key))
        if beside or not _plain(weight, _layer(model, key)):
            yield key, probed_weight(model, key)
            continue
        converted = weight.to(torch.float32, copy=True)
        converted = converted if convert is None else convert(converted, inplace=True)
        yield key, comfy.lora.calculate_weight(model.patches.get(key, []), converted, key)


def _unpatched(model: ModelPatcher, key: str) -> tuple[torch.Tensor, Callable[..., torch.Tensor] | None]:
    """A weight without the MODEL's patches, and what reads the form it is stored in.

    The host's ``get_key_patches`` says the same of all weights, but fails on newer hosts if one layer is quantised:
    there they list the scale and the format of such a layer as weights too.
    """
    weight, _, convert = comfy.model_patcher.get_key_weight(model.model, key)
    if key in model.hook_backup:
        return model.hook_backup[key][0], convert
    return (model.backup[key].weight if key in model.backup else weight), convert


def probed_weight(model: ModelPatcher, key: str) -> torch.Tensor:
    """A weight that only its layer can read (GGUF, other quantisations, a LoRA beside it): its outputs for the unit
    vectors."""
    comfy.model_management.load_models_gpu([model])
    layer = _layer(model, key)
    one = torch.eye(layer.in_features, device=model.load_device)
    with torch.no_grad():
        return (layer(one) - layer(torch.zeros_like(one[:1]))).T.float()


def weight_energy(
    model: ModelPatcher, keys: Sequence[str], progress: comfy.utils.ProgressBar | None = None
) -> torch.Tensor:
    """Q = Σ WᵀW over these weights, (d, d), in float64 on the CPU. RECE and the reports need nothing else of them."""
    total: torch.Tensor | None = None
    for _, weight in effective_weights(model, keys):
        part = (weight.T @ weight).cpu().double()  # in this order: not every device has float64
        total = part if total is None else total + part
        if progress is not None:
            progress.update(1)
    assert total is not None
    return total


def energy_within(model: ModelPatcher, keys: Sequence[str], basis: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Q in the coordinates of an orthonormal basis (d, n), (n, n), and Σ‖W‖² of the whole weights."""
    total, size = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64), 0.0
    for _, weight in effective_weights(model, keys):
        size += float(weight.square().sum())
        part = (weight @ basis.to(weight)).cpu().double()
        total += part.T @ part
    return total, size


def weight_deltas(model: ModelPatcher, edit: Edit) -> dict[PatchKey, LowRank]:
    """ΔW of every weight that the edit's maps change, by the host's key; a range of columns where it is only a part.

    Raises:
        ValueError: the edit is for embeddings of another width, or the model has no such weights.
    """
    deltas: dict[PatchKey, LowRank] = {}
    if edit.text is not None and edit.text.rank:
        check_edit_width(model, edit)
        for key, weight in effective_weights(model, text_keys(model, edit.targets, edit.blocks)):
            deltas[key] = _delta(weight, edit.text)
    if edit.pooled is not None and edit.pooled.rank:
        if (pooled := pooled_key(model)) is None:
            raise no_pooled("The edit also changes the pooled text embedding", "or apply it to such a model")
        ((_, weight),) = effective_weights(model, [pooled])
        columns = edit.pooled.width
        deltas[pooled, (1, 0, columns)] = _delta(weight[:, :columns], edit.pooled)
    return deltas


def no_pooled(what: str, instead: str) -> ValueError:
    """The refusal of an edit of the pooled embedding on a model without one."""
    return ValueError(
        f"{what}, which this model does not read; solve it with 'pooled' off, {instead} (SDXL, Flux.1, SD3)."
    )


def _delta(weight: torch.Tensor, matrix: LowRank) -> LowRank:
    """ΔW = W·M as factors; only the first depends on the layer."""
    return LowRank((weight @ matrix.up.to(weight)).cpu(), matrix.down.float())


def base_fingerprint(model: ModelPatcher) -> tuple[float, ...]:
    """Norms of three fixed projections of a cross-attention in the middle of the model, or of what reads the text in
    its place. Fine-tunes differ in them."""
    keys = text_keys(model)
    keys = [key for key in keys if projection(key) != "v"]
    middle = [key for key in keys if ".middle_block." in key] or keys[len(keys) // 2 :]
    ((_, weight),) = effective_weights(model, middle[:1])
    directions = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(11)).to(weight)
    return tuple(round(float(norm), 5) for norm in (directions @ weight.T).norm(dim=1))
