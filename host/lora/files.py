"""Reading LoRA files (kohya, diffusers, LyCORIS, ED-LoRA, PEFT adapters), and their text part on a CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import comfy.lora
import comfy.utils
import torch

from ..types import CLIP, Options

_PEFT_CONFIG, _PEFT_PREFIX = "adapter_config.json", "base_model.model."
_EMBEDDINGS = {"new_concept_embedding.": "l", "new_concept_embedding_2.": "g"}


class _PeftConfig(Protocol):
    """What is read of the configuration of a PEFT adapter."""

    peft_type: object
    lora_alpha: float
    alpha_pattern: dict[str, float]
    use_rslora: bool


@dataclass(frozen=True, eq=False)
class LoraFile:
    """The tensors of a LoRA file under their own names. ``phrase`` is the phrase that its trainer names, if any.

    ``embeddings`` holds the learned words of an ED-LoRA: word to encoder (``l``, ``g``) to (layers, channels).
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    phrase: str = ""
    embeddings: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)


def read_lora(file: str | Path) -> LoraFile:
    """Reads a LoRA: a file of kohya, diffusers, LyCORIS or ED-LoRA, or a PEFT adapter (its folder or the file in it).

    Raises:
        ValueError: it is not a safetensors file, a PEFT adapter of another kind than LoRA, or peft is not installed to
            read one.
    """
    file = Path(file)
    folder = file if file.is_dir() else file.parent
    if (folder / _PEFT_CONFIG).is_file() and (file.is_dir() or file.stem == "adapter_model"):
        return LoraFile(folder.name, _peft_tensors(folder))
    if file.suffix != ".safetensors":
        raise ValueError(
            f"'{file.name}' is not a .safetensors file, and other files can run code when they are opened; save the "
            "LoRA as .safetensors with the trainer or the tool it came from."
        )
    state, metadata = comfy.utils.load_torch_file(str(file), safe_load=True, return_metadata=True)
    tensors = dict(_flattened(state.get("params", state)))
    embeddings = _without_embeddings(tensors)
    return LoraFile(file.stem, tensors, (metadata or {}).get("concepts_phrase", ""), embeddings)


def _flattened(state: Options, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Nested tables of tensors, with the names joined by dots. Some trainers begin them with ``params.``: dropped."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flattened(dict(value), f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}".removeprefix("params."), value


def _without_embeddings(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Takes the learned words out of ``tensors`` and returns them: word to encoder to vectors."""
    embeddings: dict[str, dict[str, torch.Tensor]] = {}
    for name in list(tensors):
        for prefix, encoder in _EMBEDDINGS.items():
            if name.startswith(prefix):
                embeddings.setdefault(name[len(prefix) :], {})[encoder] = tensors.pop(name)
    return embeddings


def _peft_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT adapter, with each layer's scale as ``alpha``."""
    try:
        from peft import PeftConfig
        from peft.utils import load_peft_weights
        from peft.utils.other import get_pattern_key
    except ImportError as error:
        raise ValueError(
            f"'{folder.name}' is a PEFT adapter, and peft is not installed to read it; install it with: pip install "
            "peft, or save the LoRA as one .safetensors file."
        ) from error
    config: _PeftConfig = PeftConfig.from_pretrained(str(folder))
    _check_peft(folder, config)
    loaded = load_peft_weights(str(folder), device="cpu")
    _check_low_rank_pairs(folder, loaded)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in loaded.items():
        name = name.replace(_PEFT_PREFIX, "")
        tensors[name] = tensor
        if name.endswith(".lora_A.weight"):
            layer, rank = name.removesuffix(".lora_A.weight"), tensor.shape[0]
            alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), layer), config.lora_alpha)
            tensors[f"{layer}.alpha"] = torch.tensor(float(alpha) * (rank**0.5 if config.use_rslora else 1.0))
    return tensors


def _check_peft(folder: Path, config: _PeftConfig) -> None:
    """Refuses adapters of other kinds, and files that can run code."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"'{folder.name}' holds no adapter_model.safetensors, and other files can run code when they are opened; "
            "save the adapter again with safe_serialization=True."
        )
    kind, dora = str(getattr(config.peft_type, "value", config.peft_type)), bool(getattr(config, "use_dora", False))
    if kind != "LORA" or dora:
        raise ValueError(
            f"'{folder.name}' is a PEFT adapter of the kind {kind}{' with DoRA' * dora}, and only PEFT's plain LoRA "
            "can be added to a layer's output here; train one of that kind."
        )


def _check_low_rank_pairs(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses an adapter that replaces anything besides adding low-rank pairs."""
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        raise ValueError(
            f"The PEFT adapter '{folder.name}' also holds '{others[0]}', which is not a low-rank pair and cannot be "
            "added to a layer's output; train it without modules_to_save, with bias='none', and not on embeddings."
        )


def with_text_part(clip: CLIP, lora: LoraFile, strength: float) -> tuple[CLIP, int]:
    """A clone of the text encoder with the file's text part as ordinary patches, and how many weights it changes."""
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    bare = {n.removeprefix("text_encoder."): w for n, w in names.items() if n.startswith("text_encoder.")}
    patches = comfy.lora.load_lora(dict(lora.tensors), bare | names, log_missing=False)
    if not patches or strength == 0:
        return clip, 0
    changed = clip.clone()
    return changed, len(changed.add_patches(patches, strength))
