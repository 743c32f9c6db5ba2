"""Three ways to deliver an edit to the host: low-rank patches, whole differences, or a change of the text embedding."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from functools import partial

import comfy.patcher_extension
import comfy.weight_adapter
import torch

from ...methods.choices import check_choice
from ...methods.erase.edit import KEYS_AND_VALUES, NOTHING, Edit
from ...methods.erase.fingerprint import check_same_clip, clip_fingerprint, fingerprints_differ
from ...methods.erase.lowrank import LowRank
from .. import keys
from ..engine.reach import check_reaches_network
from ..registry import text_entry_of
from ..text.tokens import PromptEncoder
from ..types import CLIP, Conditioning, Executor, ModelPatcher, TransformerOptions
from .entry.hooks import around_entry, mapped_rows
from .entry.rows import conditioning_rows
from .weights import (
    base_fingerprint,
    check_edit_width,
    low_precision,
    no_pooled,
    pooled_key,
    text_keys,
    weight_deltas,
)

log = logging.getLogger(__name__)

AUTOMATIC, WEIGHTS, FULL, TEXT = "automatic", "weights", "full weights", "text"
DELIVERIES = (AUTOMATIC, WEIGHTS, FULL, TEXT)
_BLOCKS = {"input": "input_blocks.{}.1", "middle": "middle_block.1", "output": "output_blocks.{}.1"}
_MODEL = "diffusion_model."


def apply_edit(model: ModelPatcher, edit: Edit, strength: float = 1.0, delivery: str = AUTOMATIC) -> ModelPatcher:
    """A clone of the model with the edit. The given model and the loaded weights stay as they are.

    Args:
        delivery: ``weights`` patches every key and value projection, or what reads the text first on a transformer,
            with the exact low-rank difference. ``full weights`` patches the difference itself, for programs that read
            patches. ``text`` changes the embedding before these layers: no storage format rounds it, and LoRAs loaded
            later cannot undo it. ``automatic`` is ``text`` for fp8 and quantised weights, else ``weights``; it is also
            ``weights`` where trained layers read the text.

    Raises:
        ValueError: the edit does not fit the model, or cannot be delivered in this way.
    """
    check_choice(DELIVERIES, delivery, "delivery")
    edited = model.clone()
    if edit.empty or strength == 0:
        return edited
    check_edit_width(model, edit)
    if by_text := _by_text(model, edit, delivery):
        _change_text(edited, edit, strength) if text_entry_of(model) is None else _change_entry(edited, edit, strength)
    _warn_about(model, edit, by_text)
    for layers in ({} if by_text else weight_deltas(model, edit), edit.on_model()):
        _add_patches(edited, {key: _patch(delta, delivery == FULL) for key, delta in layers.items()}, strength)
    _add_patches(edited, {k: ("diff", (d,)) for k, d in edit.diffs.items() if k.startswith(_MODEL)}, strength)
    return edited


def apply_to_clip(clip: CLIP, edit: Edit, strength: float = 1.0) -> CLIP:
    """A clone of the text encoder with the edit's part for it (trained edits); the same encoder if there is none.

    Raises:
        ValueError: the edit was made for another text encoder or another CLIP skip, or has no such part there.
    """
    if edit.empty or strength == 0:
        return clip
    _check_clip_skip(edit, clip)
    patches: dict[object, object] = {key: _patch(m, False) for key, m in edit.on_clip().items()}
    patches |= {key: ("diff", (d,)) for key, d in edit.diffs.items() if not key.startswith(_MODEL)}
    if not patches:
        return clip
    edited = clip.clone()
    _add_patches(edited, patches, strength)
    if low_precision(edited.patcher, map(str, patches)):
        log.warning(
            "The text encoder is stored in fp8 or quantised, and rounding it again blurs the edit and everything else "
            "a little; load it in fp16."
        )
    return edited


def _check_clip_skip(edit: Edit, clip: CLIP) -> None:
    """Raises if the CLIP skip differs. Another LoRA or edit on the same text encoder only logs a warning: the edit
    still mostly works."""
    made, encode = edit.specs()[0], partial(conditioning_rows, clip) if edit.entry else PromptEncoder(clip)
    if "clip_skip" not in made or made["clip_skip"] != clip.layer_idx:
        check_same_clip(edit, encode)
    elif edit.clip and fingerprints_differ(edit.clip, clip_fingerprint(encode)):
        log.warning(
            "The text encoder is not quite the one the edit was made with (it has a LoRA or another edit); it erases "
            "less."
        )


def _stored_coarsely(model: ModelPatcher, edit: Edit) -> bool:
    return low_precision(model, text_keys(model, edit.targets, edit.blocks))


def _by_text(model: ModelPatcher, edit: Edit, delivery: str) -> bool:
    """Whether the edit changes the text embedding rather than the weights that read it.

    Raises:
        ValueError: the delivery is ``text``, and a trained layer reads that text.
    """
    mixed = _trains_text_readers(model, edit)
    if delivery == TEXT and mixed:
        raise ValueError(
            "This edit changes the text and also trains weights that read it, and these were trained for the unedited "
            "text; choose the delivery 'weights' or 'automatic'."
        )
    has_text = edit.text is not None or edit.pooled is not None
    return delivery == TEXT or (delivery == AUTOMATIC and has_text and not mixed and _stored_coarsely(model, edit))


def _trains_text_readers(model: ModelPatcher, edit: Edit) -> bool:
    """Whether trained layers read the edited text: W·T + Δ is meant, and through the text it would be (W + Δ)·T."""
    single = {*edit.layers, *edit.diffs}
    text = edit.text is not None and any(map(edit.reads_text, single))
    return text or (edit.pooled is not None and pooled_key(model) in single)


def _warn_about(model: ModelPatcher, edit: Edit, by_text: bool) -> None:
    trained = [key for key in edit.on_model() if key in model.model_state_dict()]
    solved = edit.text is not None
    if not by_text and ((solved and _stored_coarsely(model, edit)) or low_precision(model, trained)):
        log.warning(
            "The weights are stored in fp8 or quantised, and rounding them again blurs the edit and everything else a "
            "little; delivery 'text' avoids it, where no trained layer reads the text."
        )
    if edit.base and (solved or trained) and fingerprints_differ(edit.base, base_fingerprint(model)):
        log.warning(
            "The edit was made on another checkpoint than this one. Fine-tunes of one family share their text space, "
            "so it mostly works; make it again if the concept comes through."
        )


def _patch(matrix: LowRank, full: bool) -> object:
    if full:
        return ("diff", (matrix.matrix(),))
    return comfy.weight_adapter.LoRAAdapter(set(), (matrix.up, matrix.down, None, None, None, None))


def _add_patches(patcher: ModelPatcher | CLIP, patches: Mapping[object, object], strength: float) -> None:
    """Adds patches; refuses if the host does not take all of them."""
    taken = patcher.add_patches(patches, strength) if patches else ()
    if missing := set(patches) - set(taken):
        raise ValueError(
            f"{len(missing)} of {len(patches)} weights of the edit do not exist here (such as "
            f"'{min(map(str, missing))}'); it was made for another kind of model."
        )


def change_conditioning(conditioning: Conditioning, edit: Edit, strength: float = 1.0) -> Conditioning:
    """The same prompts with the edit in their embeddings: every token becomes T·c, and so does the pooled embedding.

    Raises:
        ValueError: the edit changes single weights, some of the projections, or embeddings of another width.
    """
    _check_reaches_conditioning(edit)
    changed = []
    for tokens, values in conditioning:
        if edit.width is not None and tokens.shape[-1] != edit.width:
            raise ValueError(
                f"The edit is for text embeddings of width {edit.width} and this conditioning has width "
                f"{tokens.shape[-1]}; encode the prompt with the CLIP the edit was solved with."
            )
        values, pooled = dict(values), values.get("pooled_output")
        if edit.pooled is not None and pooled is not None:
            values["pooled_output"] = mapped_rows(pooled, edit.pooled, strength)
        changed.append([tokens if edit.text is None else mapped_rows(tokens, edit.text, strength), values])
    return changed


def _check_reaches_conditioning(edit: Edit) -> None:
    if edit.layers or edit.diffs:
        raise ValueError(
            "This edit was trained and changes single weights, so it cannot be put into a conditioning; connect a "
            "MODEL."
        )
    if edit.through != NOTHING:
        raise ValueError(
            f"This edit acts behind a {edit.through} inside the model, which a conditioning does not reach; connect a "
            "MODEL to Apply Erasure."
        )
    if edit.targets != KEYS_AND_VALUES or edit.blocks:
        raise ValueError(
            "This edit changes some of the projections only, and a conditioning reaches all of them; connect a MODEL."
        )


def _change_text(model: ModelPatcher, edit: Edit, strength: float) -> None:
    """Puts the edit in front of the projections, at every sampling step."""
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, keys.ERASE, _uncompiled)
    if edit.text is not None and edit.text.rank:
        model.set_model_attn2_patch(_text_patch(edit.text, edit, strength))
    if edit.pooled is not None and edit.pooled.rank:
        model.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, keys.ERASE, _pooled_wrapper(edit.pooled, strength)
        )


def _change_entry(model: ModelPatcher, edit: Edit, strength: float) -> None:
    """Puts the edit in front of a transformer's first text layers, for the time of each model call."""
    maps: list[tuple[LowRank, list[str]]] = []
    if edit.text is not None and edit.text.rank:
        maps.append((edit.text, text_keys(model, edit.targets, edit.blocks)))
    if edit.pooled is not None and edit.pooled.rank:
        if (key := pooled_key(model)) is None:
            raise no_pooled("The edit also changes the pooled text embedding", "or apply it to such a model")
        maps.append((edit.pooled, [key]))
    layers = [(matrix, [k.removeprefix(_MODEL).removesuffix(".weight") for k in found]) for matrix, found in maps]
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, keys.ERASE, _uncompiled)
    model.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.APPLY_MODEL, keys.ERASE, around_entry(layers, strength)
    )


def _uncompiled(executor: Executor, *args: object, **kwargs: object) -> object:
    """Around a sampling: refuses a compiled model, into which the edit's patch would not get."""
    check_reaches_network(
        executor.class_obj.model_patcher, "An erasure by text", ", or choose the delivery 'weights' in Apply Erasure"
    )
    return executor(*args, **kwargs)


def _text_patch(matrix: LowRank, edit: Edit, strength: float) -> Callable[..., tuple[torch.Tensor, ...]]:
    def patch(
        n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: TransformerOptions
    ) -> tuple[torch.Tensor, ...]:
        for_keys, for_values = (
            bool(re.search(edit.blocks, _projection_key(extra_options, to))) and to in edit.targets for to in ("k", "v")
        )
        if context.shape[-1] != matrix.width or not (for_keys or for_values):
            return n, context, value
        same, edited = value is context, mapped_rows(context, matrix, strength)
        edited_value = edited if same else mapped_rows(value, matrix, strength)
        return n, edited if for_keys else context, edited_value if for_values else value

    return patch


def _projection_key(extra_options: TransformerOptions, to: str) -> str:
    """The key of the projection that a patch is called for."""
    name, number = extra_options["block"][:2]
    block, depth = _BLOCKS[name].format(number), extra_options.get("block_index", 0)
    return f"diffusion_model.{block}.transformer_blocks.{depth}.attn2.to_{to}.weight"


def _pooled_wrapper(matrix: LowRank, strength: float) -> Callable[..., torch.Tensor]:
    def wrapper(
        executor: Executor,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None,
        y: torch.Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        if isinstance(y, torch.Tensor):
            y = torch.cat([mapped_rows(y[:, : matrix.width], matrix, strength), y[:, matrix.width :]], 1)
        return executor(x, timestep, context, y, *args, **kwargs)

    return wrapper
