"""LoRA files as low-rank factors for each layer, whatever the names and the form they were written in.

Names are looked up in the host's own key maps, widened by the spellings of diffusers and PEFT that the host leaves out. A
file that changes the model in a way that cannot be added beside a layer is refused, and so is one that fits nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert
import comfy.utils
import comfy.weight_adapter
import torch

log = logging.getLogger(__name__)

_PEFT_CONFIG, _PEFT_PREFIX = "adapter_config.json", "base_model.model."
_TEXT = ("lora_te", "lycoris_te", "text_encoder")
_EMBEDDINGS = {"new_concept_embedding.": "l", "new_concept_embedding_2.": "g"}
_NOT_ADDITIVE = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "reshape_weight": "a reshaped layer", "oft_blocks": "OFT",
    "oft_diag": "OFT", "a1.weight": "GLoRA", "set_weight": "a replaced weight", "w_norm": "changed norms", "b_norm": "changed norms",
    "diff": "a full difference", "diff_b": "changed biases",
}  # fmt: skip


class Factors(NamedTuple):
    """What a LoRA adds beside one layer: ``scale · up(down(x))``.

    ``down`` is (rank, in) for a Linear, (rank, in, kh, kw) for a convolution; ``up`` is (out, rank). Without ``up``, ``down``
    is the whole change (out, in[, kh, kw]): of forms whose rank is not low.
    """

    down: torch.Tensor
    up: torch.Tensor | None
    scale: float


@dataclass(frozen=True, eq=False)
class LoraFile:
    """The tensors of a LoRA file under their own names; ``phrase`` is what its trainer says it answers to, if it does.

    ``embeddings`` holds the learned words of an ED-LoRA: word to encoder (``l``, ``g``) to (layers, channels).
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    phrase: str = ""
    embeddings: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)


def read_lora(path: str | Path) -> LoraFile:
    """Reads a LoRA: a file of kohya, diffusers, LyCORIS or ED-LoRA, or a PEFT adapter (its folder or the file in it).

    Raises:
        ValueError: it is no safetensors file, a PEFT adapter of another kind than LoRA, or peft is not installed to read one.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if (folder / _PEFT_CONFIG).is_file() and (path.is_dir() or path.stem == "adapter_model"):
        return LoraFile(folder.name, _read_peft(folder))
    if path.suffix != ".safetensors":
        raise ValueError(
            f"'{path.name}' is no .safetensors file, and other files can run code when they are opened; save the LoRA as "
            ".safetensors with the trainer or the tool it came from."
        )
    state, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    tensors = dict(_flat(state.get("params", state)))
    embeddings: dict[str, dict[str, torch.Tensor]] = {}
    for name in list(tensors):
        for prefix, encoder in _EMBEDDINGS.items():
            if name.startswith(prefix):
                embeddings.setdefault(name[len(prefix) :], {})[encoder] = tensors.pop(name)
    return LoraFile(path.stem, tensors, (metadata or {}).get("concepts_phrase", ""), embeddings)


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Nested tables of tensors with the names joined by dots; ``params.`` in front, as some trainers write it, goes."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}".removeprefix("params."), value


def _read_peft(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT adapter with its scale written beside each layer, as ``alpha``."""
    try:
        from peft import PeftConfig
        from peft.utils import load_peft_weights
        from peft.utils.other import get_pattern_key
    except ImportError as error:
        raise ValueError(
            f"'{folder.name}' is a PEFT adapter, and peft is not installed to read it; install it with: pip install peft, "
            "or save the LoRA as one .safetensors file."
        ) from error
    config: Any = PeftConfig.from_pretrained(str(folder))
    _check_peft(folder, config)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _pairs_alone(folder, load_peft_weights(str(folder), device="cpu")).items():
        name = name.replace(_PEFT_PREFIX, "")
        tensors[name] = tensor
        if name.endswith(".lora_A.weight"):
            layer, rank = name.removesuffix(".lora_A.weight"), tensor.shape[0]
            alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), layer), config.lora_alpha)
            tensors[f"{layer}.alpha"] = torch.tensor(float(alpha) * (rank**0.5 if config.use_rslora else 1.0))
    return tensors


def _check_peft(folder: Path, config: Any) -> None:
    """Refuses adapters of other kinds, and files that can run code."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"'{folder.name}' holds no adapter_model.safetensors, and other files can run code when they are opened; save the "
            "adapter again with safe_serialization=True."
        )
    kind, dora = str(getattr(config.peft_type, "value", config.peft_type)), bool(getattr(config, "use_dora", False))
    if kind != "LORA" or dora:
        raise ValueError(
            f"'{folder.name}' is a PEFT adapter of the kind {kind}{' with DoRA' * dora}, and only PEFT's plain LoRA can be "
            "added beside a layer here; train one of that kind."
        )


def _pairs_alone(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Refuses an adapter that replaces anything besides adding low-rank pairs."""
    whole = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if whole:
        raise ValueError(
            f"The PEFT adapter '{folder.name}' also holds '{whole[0]}', which is no low-rank pair and cannot be added beside a "
            "layer; train it without modules_to_save, with bias='none', and not on embeddings."
        )
    return tensors


def unet_names(model: Any) -> dict[str, str]:
    """Every name a file may call a layer of the model's UNet by, to the name of its weight."""
    weights = set(model.state_dict())
    names = {n: w for n, w in comfy.lora.model_lora_keys_unet(model, {}).items() if isinstance(w, str)}
    for theirs, ours in comfy.utils.unet_to_diffusers(model.model_config.unet_config).items():
        weight = f"diffusion_model.{ours}"
        if theirs.endswith(".weight") and weight in weights:
            names |= {f"{prefix}{theirs.removesuffix('.weight')}": weight for prefix in ("", "unet.")}
    for weight in weights:
        if weight.startswith("diffusion_model.") and weight.endswith(".weight"):
            bare = weight.removeprefix("diffusion_model.").removesuffix(".weight")
            names |= {f"{prefix}{bare}": weight for prefix in ("", "unet.")}
    return names


def unet_factors(lora: LoraFile, model: Any) -> dict[str, Factors]:
    """The factors of every layer of the model's UNet that the file changes, by the layer's path inside the UNet.

    Raises:
        ValueError: nothing in it fits, a layer has another size, or a change cannot be added beside a layer.
    """
    tensors = comfy.lora_convert.convert_lora(dict(lora.tensors))
    names = unet_names(model)
    _refuse_not_additive(lora.name, tensors, names)
    loaded = comfy.lora.load_lora(tensors, names, log_missing=False)
    if not loaded:
        some = next(iter(tensors), "nothing")
        raise ValueError(
            f"The LoRA '{lora.name}' matched 0 of {len(tensors)} keys: none of its layers has a counterpart in this model's "
            f"UNet (it begins with '{some}'); load the checkpoint it was made for, or another LoRA."
        )
    unet = model.diffusion_model
    found: dict[str, Factors] = {}
    for weight, adapter in loaded.items():
        layer = weight.removeprefix("diffusion_model.").removesuffix(".weight")
        found[layer] = factors_of(lora.name, layer, unet.get_submodule(layer), adapter)
    _tell_matches(lora.name, tensors, {name for name, weight in names.items() if weight in loaded})
    return found


def _tell_matches(name: str, tensors: Mapping[str, Any], layers: set[str]) -> None:
    """Says how many of the file's keys for a UNet have a layer in this one. The text encoders' are counted where they go."""
    asked = [key for key in tensors if not key.startswith(_TEXT)]
    missing = [key for key in asked if not any(stem in layers for stem in _stems(key))]
    level = logging.WARNING if missing else logging.INFO
    log.log(level, "LoRA '%s': matched %d of %d keys", name, len(asked) - len(missing), len(asked))
    if missing:
        log.warning(
            "LoRA '%s': no layer of this model for '%s'%s", name, missing[0], " and others" * (len(missing) > 1)
        )


def _stems(key: str) -> Iterator[str]:
    """What may be the layer's name in a key: everything before one of its dots, or before ``_lora``."""
    yield from (key[:at] for at, letter in enumerate(key) if letter == ".")
    yield key.split("_lora.")[0]


def _refuse_not_additive(name: str, tensors: Mapping[str, Any], names: Mapping[str, str]) -> None:
    for key in tensors:
        for end, what in _NOT_ADDITIVE.items():
            if (key.endswith(f".{end}") or f".{end}." in key) and key.split(f".{end}")[0] in names:
                raise ValueError(
                    f"The LoRA '{name}' holds {what} ('{key}'), which cannot be added beside a layer as a concept path "
                    "needs it; use a plain LoRA, LoCon, LoHa or LoKr, or load it for the whole picture with Load LoRA."
                )


def factors_of(name: str, layer: str, module: Any, adapter: Any) -> Factors:
    """One adapter of the host as factors that fit the layer.

    Raises:
        ValueError: of another kind or size.
    """
    shape = tuple(module.weight.shape)
    kinds: dict[type, Any] = {
        comfy.weight_adapter.LoRAAdapter: _lora, comfy.weight_adapter.LoHaAdapter: _loha, comfy.weight_adapter.LoKrAdapter: _lokr,
    }  # fmt: skip
    convert = kinds.get(type(adapter))
    if convert is None or len(shape) not in (2, 4) or getattr(module, "groups", 1) != 1:
        kind = getattr(adapter, "name", type(adapter).__name__)
        raise ValueError(
            f"The LoRA '{name}' changes '{layer}' by {kind}, which a concept path cannot add; use a plain LoRA."
        )
    factors = convert(adapter.weights, shape, adapter)
    down = (
        factors.down.reshape(factors.down.shape[:2] + (1,) * (len(shape) - 2))
        if factors.down.ndim == 2
        else factors.down
    )
    down = down.flatten(1) if len(shape) == 2 else down
    up = None if factors.up is None else factors.up.flatten(1)
    out = down.shape[0] if up is None else up.shape[0]
    if (out, *down.shape[1:]) != shape:
        raise ValueError(
            f"The LoRA '{name}' was made for another model: it changes {out} × {tuple(down.shape[1:])} values of '{layer}', "
            f"which has {shape[0]} × {shape[1:]}; load the checkpoint it was made for."
        )
    return Factors(down, up, factors.scale)


def _lora(weights: tuple, shape: tuple[int, ...], _: Any) -> Factors:
    """LoRA and LoCon; the middle factor of a Tucker form is taken into ``down``: three convolutions in a row are two."""
    up, down, alpha, mid, *_rest = weights
    rank = down.shape[0]
    if mid is not None:
        down = torch.einsum("rj...,jc->rc...", mid.double(), down.flatten(1).double()).to(down.dtype)
    return Factors(down, up, 1.0 if alpha is None else alpha / rank)


def _loha(weights: tuple, shape: tuple[int, ...], adapter: Any) -> Factors:
    """LoHa, (w1a w1b) ∘ (w2a w2b): of rank r1 r2 with the row-wise and column-wise products of its factors (2108.06098, prop. 1)."""
    w1a, w1b, alpha, w2a, w2b, t1, *_rest = weights
    rank = w1b.shape[0]
    if t1 is not None or rank * w2b.shape[0] * 2 > min(shape[0], w1b.shape[1]) or len(shape) != 2:
        return _whole(adapter, shape)
    up = (w1a[:, :, None] * w2a[:, None, :]).flatten(1)
    down = (w1b[:, None, :] * w2b[None, :, :]).flatten(0, 1)
    return Factors(down, up, 1.0 if alpha is None else alpha / rank)


def _lokr(weights: tuple, shape: tuple[int, ...], adapter: Any) -> Factors:
    """LoKr, w1 ⊗ w2: low-rank if both are, since (a b) ⊗ (c d) = (a ⊗ c)(b ⊗ d)."""
    w1, w2, alpha, w1a, w1b, w2a, w2b, t2, *_rest = weights
    if w1 is not None or w2 is not None or t2 is not None or len(shape) != 2:
        return _whole(adapter, shape)
    return Factors(torch.kron(w1b, w2b), torch.kron(w1a, w2a), 1.0 if alpha is None else alpha / w2b.shape[0])


def _whole(adapter: Any, shape: tuple[int, ...]) -> Factors:
    """The change itself, by the host's own arithmetic."""
    dtype = torch.promote_types(next(t for t in adapter.weights if isinstance(t, torch.Tensor)).dtype, torch.float32)
    delta = adapter.calculate_weight(torch.zeros(shape, dtype=dtype), "", 1.0, 1.0, None, lambda weight: weight, dtype)
    return Factors(delta, None, 1.0)


def with_text_part(clip: Any, lora: LoraFile, strength: float) -> tuple[Any, int]:
    """A clone of the text encoder with the file's text part as ordinary patches, and how many weights it changes."""
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    bare = {n.removeprefix("text_encoder."): w for n, w in names.items() if n.startswith("text_encoder.")}
    patches = comfy.lora.load_lora(dict(lora.tensors), bare | names, log_missing=False)
    if not patches or strength == 0:
        return clip, 0
    changed = clip.clone()
    return changed, len(changed.add_patches(patches, strength))
