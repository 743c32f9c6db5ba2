"""What is checked of a LoRA file's tensors before a layer is looked for: halves, ranks, kinds, and the two readers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."


class Pair(NamedTuple):
    """The endings of two factors that only work together. With ``core`` beside them, their ranks stand elsewhere."""

    up: str
    down: str
    core: str | None = None


PAIRS = (
    Pair(".lora_up.weight", ".lora_down.weight"),
    Pair(".lora_B.weight", ".lora_A.weight"),
    Pair(".lora_B.default.weight", ".lora_A.default.weight"),
    Pair(".lora_B", ".lora_A"),
    Pair(".lora.up.weight", ".lora.down.weight"),
    Pair("_lora.up.weight", "_lora.down.weight"),
    Pair(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    Pair(".hada_w1_a", ".hada_w1_b", ".hada_t1"),
    Pair(".hada_w2_a", ".hada_w2_b", ".hada_t2"),
    Pair(".lokr_w1_a", ".lokr_w1_b"),
    Pair(".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"),
)
_HALVES = (("hada_w1_a", "hada_w2_a"), ("hada_t1", "hada_t2"), ("lokr_w1(_a)?", "lokr_w2(_a)?"))
"""What a layer has both of, or neither."""

_TEXT = (
    r"lora_(prior_)?te|lycoris_(te\d*_|text_model|text_encoder|encoder)|"
    r"text_encoder|text_model\.|encoder\.|clip_[lgh]\.|t5"
)

_KINDS = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"reshape_weight": "a reshaped layer",
    r"set_weight": "a replaced weight",
    r"oft_blocks|oft_diag": "OFT",
    r"a1\.weight": "GLoRA",
    r"lambda_layer": "T-LoRA",
    r"on_input|ia3_\w+": "(IA)³",
    r"lora_E": "PEFT's ADALORA",
    r"lora_diag": "PEFT's KaSA",
    r"lora_embedding_[AB]": "changed embeddings",
}
_PEFT_KINDS = (
    "adamss|beft|boft|c3a|deft|delora|fourierft|frod|glora|gralora|hira|hra|lily|ln_tuning|miss|oft|osf|peanut|poly|"
    "psoft|pvera|randlora|road|shadow|shira|supertuning|tinylora|trainable_tokens|unilora|vblora|vera|waveft"
)
"""How the names of PEFT's tensors begin, for what it trains besides LoRA, LoHa and LoKr (0.21.2)."""


def checked(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without those of rank 0, which change nothing.

    Raises:
        ValueError: half of a pair, ranks that do not fit, or a PEFT adapter without its configuration.
    """
    if any(key.startswith(PEFT_PREFIX) for key in tensors) and not any(key.endswith(".alpha") for key in tensors):
        raise ValueError(
            f"The LoRA '{name}' is a PEFT adapter without its adapter_config.json, which has its kind and its scale; "
            "put both files into a folder of models/loras, and keep the name adapter_model.safetensors."
        )
    kept = dict(tensors)
    for pair in PAIRS:
        for layer in _layers_with(pair, tensors):
            if _rank(name, layer, pair, tensors) == 0:
                for end in (pair.up, pair.down, ".alpha"):
                    kept.pop(layer + end, None)
    for halves in _HALVES:
        _check_both(name, halves, tensors)
    return kept


def _layers_with(pair: Pair, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """What stands before the ending, for each half of such a pair."""
    for key in tensors:
        for end in (pair.up, pair.down):
            if key.endswith(end):
                yield key.removesuffix(end)


def _rank(name: str, layer: str, pair: Pair, tensors: Mapping[str, torch.Tensor]) -> int | None:
    """The rank of a pair; None where it stands elsewhere.

    Raises:
        ValueError: one of its factors is missing, or they do not fit.
    """
    for end, other in ((pair.up, pair.down), (pair.down, pair.up)):
        if layer + end not in tensors:
            raise _half(name, layer + other, other, end)
    if pair.core is not None and layer + pair.core in tensors:
        return None
    up, down = tensors[layer + pair.up], tensors[layer + pair.down]
    if up.ndim < 2 or down.ndim < 2 or up.shape[1] != len(down):
        raise ValueError(
            f"The LoRA '{name}' has two factors of '{layer}' whose ranks do not fit, {tuple(up.shape)} and "
            f"{tuple(down.shape)}, as PEFT's block-diagonal form (BD-LoRA) has them; save it as a plain LoRA."
        )
    return len(down)


def _check_both(name: str, halves: tuple[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises a ValueError if a layer has one of the halves without the other."""
    found: list[dict[str, str]] = [{}, {}]
    for key in tensors:
        layer, _, end = key.rpartition(".")
        for half, layers in zip(halves, found, strict=True):
            if re.fullmatch(half, end):
                layers[layer] = key
    for layer in found[0].keys() ^ found[1].keys():
        first = layer in found[0]
        raise _half(name, found[not first][layer], *(half.split("(")[0] for half in halves[:: 1 if first else -1]))


def _half(name: str, key: str, there: str, missing: str) -> ValueError:
    return ValueError(
        f"The LoRA '{name}' is damaged: it has '{key}' and no '{missing.strip('.')}' that belongs to its "
        f"'{there.strip('.')}'; download or save it again."
    )


def is_text(key: str) -> bool:
    """Whether the tensor is for a text encoder."""
    return re.match(_TEXT, key.removeprefix(PEFT_PREFIX)) is not None


def check_kinds(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses a file that changes a layer of the model in another way than by adding to its output.

    Raises:
        ValueError: the kind by its name.
    """
    for key, tensor in tensors.items():
        kind = None if is_text(key) else _kind(key, tensor)
        if kind is not None:
            raise ValueError(
                f"The LoRA '{name}' holds {kind} ('{key}'), which cannot be added to a layer's output as a concept "
                "needs it; use a plain LoRA, LoCon, LoHa or LoKr, or load it for the whole picture with Load LoRA."
            )


def _kind(key: str, tensor: torch.Tensor) -> str | None:
    """What kind of change the tensor is a part of; None: one that can be added."""
    for pattern, kind in _KINDS.items():
        if re.search(rf"\.({pattern})(\.|$)", key):
            return "BOFT" if kind == "OFT" and tensor.ndim == 4 else kind
    found = re.search(rf"\.({_PEFT_KINDS})_\w+(\.\w+)*$", key)
    return f"PEFT's {found[1].upper()}" if found else None


class Counted(dict[str, torch.Tensor]):
    """The tensors of a file, and which of them were taken out: what the host's reader asks for, it uses."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> torch.Tensor:
        self.used.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: torch.Tensor | None = None) -> torch.Tensor | None:  # type: ignore[override]
        """As of any dictionary."""
        if key in self:
            return self[key]
        return default

    def log(self, name: str, model: str) -> None:
        """Logs how many of the tensors the model uses, and the first that it does not."""
        unused = [key for key in self if key not in self.used]
        level = logging.WARNING if unused else logging.INFO
        log.log(level, "LoRA '%s': matched %d of %d keys of the %s", name, len(self) - len(unused), len(self), model)
        if unused:
            others = " and others" * (len(unused) > 1)
            log.warning("LoRA '%s': '%s'%s: the %s has nothing that uses it", name, unused[0], others, model)
