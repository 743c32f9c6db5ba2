"""Reading LoRA files: kohya, diffusers, LyCORIS, ED-LoRA, and PEFT adapters."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import comfy.lora_convert
import comfy.utils
import torch
from safetensors import SafetensorError

from ...methods.lora_file import PAIRS, PEFT_PREFIX, Counted, check_kinds, checked, is_text
from ...methods.lora_names import renamed
from ..types import Options

log = logging.getLogger(__name__)

_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"
_PLAIN_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
"""What ``init_lora_weights`` is where the base stays as it was (PEFT 0.21.2)."""

_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "replicated layers",
}
"""Settings under which a LoRA's layer does more than add its factors' product (PEFT 0.21.2)."""
_FIRST_FACTORS = {"LOHA": ("hada_w1_a",), "LOKR": ("lokr_w1", "lokr_w1_a")}
"""One factor of every layer, for PEFT's kinds besides LoRA that are added to a weight (PEFT 0.21.2)."""
_PAIRED = r".+\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2))"
_EMBEDDINGS = {"new_concept_embedding.": "l", "new_concept_embedding_2.": "g"}
_BUNDLED = "bundle_emb."
_PEFT_FILE = "adapter_model.safetensors"
_IN_TRAINING = ".lora_velora_embed"
"""What VeLoRA keeps for its backward pass alone (PEFT 0.21.2)."""


@dataclass(frozen=True, eq=False)
class LoraFile:
    """The tensors of a LoRA file under their own names. ``phrase`` is the phrase that its trainer names, if any.

    ``embeddings`` holds the learned words of an ED-LoRA: word to encoder (``l``, ``g``) to (layers, channels).
    ``bundled`` holds the words of embeddings in the file: word to encoder ("" for all) to (vectors, channels).
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    phrase: str = ""
    embeddings: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    bundled: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def text_alone(self) -> bool:
        """Whether it changes text encoders and nothing else."""
        return bool(self.tensors) and all(map(is_text, self.tensors))

    def network_part(self) -> Counted:
        """What is not for text encoders.

        Raises:
            ValueError: as ``checked`` and ``check_kinds``.
        """
        tensors = comfy.lora_convert.convert_lora(checked(self.name, renamed(self.tensors)))
        check_kinds(self.name, tensors)
        return Counted({key: tensor for key, tensor in tensors.items() if not is_text(key)})

    def text_part(self) -> Counted:
        """What is for text encoders.

        Raises:
            ValueError: as ``checked``.
        """
        return Counted({k: tensor for k, tensor in checked(self.name, self.tensors).items() if is_text(k)})


def read_lora(file: str | Path) -> LoraFile:
    """Reads a LoRA: a file of kohya, diffusers, LyCORIS or ED-LoRA, or a PEFT adapter (its folder or the file in it).

    Raises:
        ValueError: it cannot be read, is not a safetensors file, or is more than a plain LoRA (``_check_plain``).
    """
    file = Path(file)
    folder = file if file.is_dir() else file.parent
    if (folder / _CONFIG).is_file() and (file.is_dir() or file.stem == "adapter_model"):
        return LoraFile(folder.name, _peft_tensors(folder))
    if file.suffix != ".safetensors":
        raise ValueError(
            f"'{file.name}' is not a .safetensors file, and other files can run code when they are opened; save the "
            "LoRA as .safetensors with the trainer or the tool it came from."
        )
    state, metadata = _opened(file)
    tensors = dict(_flattened(state.get("params", state)))
    for prefix, config in _configs_of_metadata(metadata).items():
        _check_plain(file.stem, config)
        tensors = _with_alphas(tensors, config, prefix)
    embeddings, bundled = _without_embeddings(tensors), _without_bundled(file.stem, tensors)
    return LoraFile(file.stem, tensors, metadata.get("concepts_phrase", ""), embeddings, bundled)


def _opened(file: Path) -> tuple[Options, dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        state, metadata = comfy.utils.load_torch_file(str(file), safe_load=True, return_metadata=True)
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"'{file.name}' cannot be read as a safetensors file ({reason}); it is damaged, cut off, or a web page or "
            "pointer that was saved in its place: download it again."
        ) from error
    return state, dict(metadata or {})


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


def _without_bundled(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Takes embeddings (``bundle_emb.WORD.clip_l``, or any other last name) out of ``tensors`` and returns them."""
    bundled: dict[str, dict[str, torch.Tensor]] = {}
    for key in [key for key in tensors if key.startswith(_BUNDLED)]:
        word, _, last = key.removeprefix(_BUNDLED).partition(".")
        encoder = last.removeprefix("clip_") if last.startswith("clip_") else ""
        vectors = tensors.pop(key)
        bundled.setdefault(word, {})[encoder] = vectors.reshape(-1, vectors.shape[-1])
    if bundled:
        log.info("LoRA '%s' brings words of its own: %s", name, ", ".join(bundled))
    return bundled


def _peft_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT adapter, with each layer's scale as ``alpha``."""
    config = _config_of_folder(folder)
    if not (folder / _PEFT_FILE).is_file():
        raise ValueError(
            f"'{folder.name}' holds no {_PEFT_FILE}, and other files can run code when they are opened; save the "
            "adapter again with safe_serialization=True."
        )
    _check_plain(folder.name, config)
    state, _ = _opened(folder / _PEFT_FILE)
    tensors = {k.replace(PEFT_PREFIX, ""): t for k, t in state.items() if not k.endswith(_IN_TRAINING)}
    _check_low_rank_pairs(folder, tensors)
    return _with_alphas(_with_scales(tensors, config), config)


def _check_low_rank_pairs(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses an adapter that replaces anything besides adding low-rank pairs."""
    others = [key for key in tensors if not re.fullmatch(_PAIRED, key)]
    if others:
        raise ValueError(
            f"The PEFT adapter '{folder.name}' also holds '{others[0]}', which is not a low-rank pair and cannot be "
            "added to a layer's output; train it without modules_to_save, with bias='none', and not on embeddings."
        )


def _config_of_folder(folder: Path) -> Options:
    """What PEFT wrote beside an adapter: how it was trained.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The {_CONFIG} of '{folder.name}' cannot be read ({error}); save the adapter again."
        ) from error
    return config if isinstance(config, dict) else {}


def _configs_of_metadata(metadata: Mapping[str, str]) -> dict[str, Options]:
    """The same as diffusers writes it into the metadata, by the beginning of the names that it is for.

    A pipeline's part comes before each setting (diffusers 0.42.1: ``unet.lora_alpha``). The file has no ``alpha``.
    """
    try:
        values = json.loads(metadata.get(_METADATA, "{}"))
    except ValueError:
        return {}
    configs: dict[str, Options] = {}
    for name, value in (values if isinstance(values, dict) else {}).items():
        part, _, setting = name.rpartition(".")
        configs.setdefault(f"{part}." if part else "", {})[setting] = value
    return configs


def _check_plain(name: str, config: Options) -> None:
    """Refuses what is more than factors that are added to an unchanged base.

    Raises:
        ValueError: the kind by its name, and how to convert it where that is possible.
    """
    kind = _kind_of(config)
    variants = "".join(f" with {variant}" for setting, variant in _VARIANTS.items() if config.get(setting))
    if kind not in ("LORA", *_FIRST_FACTORS) or variants:
        raise ValueError(
            f"'{name}' is a PEFT adapter of the kind {kind}{variants}, and only PEFT's plain LoRA, LoHa and LoKr can "
            "be added to a layer's output here; train one of these kinds."
        )
    start = str(config.get("init_lora_weights", True))
    if start.lower() not in _PLAIN_STARTS:
        raise ValueError(
            f"'{name}' was trained with init_lora_weights='{start}', which also changes the model's weights, so it is "
            "wrong on the unchanged model; save it again with PEFT's path_initial_model_for_weight_conversion, which "
            "makes a plain LoRA of it (not of LoftQ: train that without it)."
        )


def _kind_of(config: Options) -> str:
    return str(config.get("peft_type") or "LORA").removeprefix("PeftType.")


def _with_scales(tensors: Mapping[str, torch.Tensor], config: Options) -> dict[str, torch.Tensor]:
    """PEFT's LoHa or LoKr with each layer's scale in its first factor; others as they are.

    An ``alpha`` would not do: the host divides it by the rank that it finds, and whole factors of LoKr have none.
    """
    scaled = dict(tensors)
    for key, tensor in tensors.items():
        layer, _, end = key.rpartition(".")
        if end in _FIRST_FACTORS.get(_kind_of(config), ()):
            scale = _setting(config, "alpha", layer, 8.0) / _setting(config, "r", layer, 8.0)
            scaled[key] = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale
    return scaled


def _with_alphas(tensors: Mapping[str, torch.Tensor], config: Options, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors with an ``alpha`` for each layer whose name begins with ``prefix``, unless the file has one."""
    alphas: dict[str, torch.Tensor] = {}
    if "lora_alpha" not in config:
        return dict(tensors)
    for key, tensor in tensors.items():
        end = next((pair.down for pair in PAIRS if key.endswith(pair.down)), None)
        if end is not None and key.startswith(prefix):
            layer = key.removesuffix(end)
            alpha = _setting(config, "lora_alpha", layer.removeprefix(prefix))
            alphas[f"{layer}.alpha"] = torch.tensor(alpha * (len(tensor) ** 0.5 if config.get("use_rslora") else 1.0))
    return alphas | dict(tensors)


def _setting(config: Options, name: str, layer: str, default: float = 1.0) -> float:
    """The layer's own rank (``r``) or alpha, by the first pattern that its name ends with, else that of all."""
    for pattern, value in (config.get("rank_pattern" if name == "r" else "alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    return float(config.get(name, default))
