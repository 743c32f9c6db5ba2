"""Three ways to deliver an edit to the host: low-rank patches, whole differences, or a change of the text on its way in."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
import comfy.weight_adapter
import torch

from ...methods.choices import check_choice
from ...methods.erase.edit import Edit
from ...methods.erase.lowrank import LowRank
from ...methods.erase.targets import reaches
from .. import keys
from ..engine.gradients import without_inference_tensors
from .solve import PromptEncoder, check_same_clip, clip_fingerprint
from .weights import (
    POOLED_KEY,
    base_fingerprint,
    check_width,
    fingerprints_differ,
    low_precision,
    text_keys,
    weight_deltas,
)

log = logging.getLogger(__name__)

AUTOMATIC, WEIGHTS, FULL, TEXT = "automatic", "weights", "full weights", "text"
DELIVERIES = (AUTOMATIC, WEIGHTS, FULL, TEXT)
_BLOCKS = {"input": "input_blocks.{}.1", "middle": "middle_block.1", "output": "output_blocks.{}.1"}


def apply_edit(model: Any, edit: Edit, strength: float = 1.0, delivery: str = AUTOMATIC) -> Any:
    """A clone of the model with the edit; the given one stays as it is, and so do the loaded weights.

    Args:
        delivery: ``weights`` patches every key and value projection with the exact low-rank difference; ``full weights``
            with the difference itself, for programs that read patches; ``text`` changes the embedding before the
            projections, which no storage format rounds and which LoRAs loaded later cannot undo. ``automatic`` takes
            ``text`` for fp8 and quantised weights, else ``weights``; and ``weights`` too where trained layers read the text.

    Raises:
        ValueError: the edit does not fit the model, or cannot be delivered so.
    """
    check_choice(DELIVERIES, delivery, "delivery")
    edited = model.clone()
    if edit.empty or strength == 0:
        return edited
    check_width(model, edit)
    by_text = _by_text(model, edit, delivery)
    _warn_about(model, edit, by_text)
    if by_text:
        _change_text(edited, edit, strength)
    patches = {} if by_text else {k: _patch(m, delivery == FULL) for k, m in weight_deltas(model, edit).items()}
    _add(edited, patches, strength)
    _add(edited, {k: _patch(m, delivery == FULL) for k, m in edit.on_model().items()}, strength)
    _add(edited, {k: ("diff", (d,)) for k, d in edit.diffs.items() if k.startswith("diffusion_model.")}, strength)
    return edited


def _check_skip(edit: Edit, clip: Any) -> None:
    """Refuses another CLIP skip. Another LoRA or edit in the same text encoder is only told: the edit still reaches most of it."""
    made, encode = edit.specs()[0], PromptEncoder(clip)
    if "clip_skip" not in made or made["clip_skip"] != clip.layer_idx:
        check_same_clip(edit, encode)
    elif edit.clip and fingerprints_differ(edit.clip, clip_fingerprint(encode)):
        log.warning(
            "The text encoder is not quite the one the edit was made with (a LoRA, or another edit); it erases less."
        )


def apply_to_clip(clip: Any, edit: Edit, strength: float = 1.0) -> Any:
    """A clone of the text encoder with the part of the edit that goes there (trained edits); else the same encoder.

    Raises:
        ValueError: the edit was made for another text encoder or another CLIP skip, or has no such part there.
    """
    if edit.empty or strength == 0:
        return clip
    _check_skip(edit, clip)
    patches: dict[Any, Any] = {k: _patch(m, False) for k, m in edit.on_clip().items()}
    patches |= {k: ("diff", (d,)) for k, d in edit.diffs.items() if not k.startswith("diffusion_model.")}
    if not patches:
        return clip
    edited = clip.clone()
    _add(edited, patches, strength)
    return edited


def _coarse(model: Any, edit: Edit) -> bool:
    return low_precision(model, text_keys(model, edit.targets, edit.blocks))


def _by_text(model: Any, edit: Edit, delivery: str) -> bool:
    """Whether the edit goes into the text embedding rather than into the weights that read it.

    Raises:
        ValueError: into the text is asked for, and a trained layer reads that text.
    """
    mixed = _mixed(edit)
    if delivery == TEXT and mixed:
        raise ValueError(
            "This edit changes the text and also trains weights that read it, and these were trained for the unedited text; take "
            "the delivery 'weights' or 'automatic'."
        )
    has_text = edit.text is not None or edit.pooled is not None
    return delivery == TEXT or (delivery == AUTOMATIC and has_text and not mixed and _coarse(model, edit))


def _mixed(edit: Edit) -> bool:
    """Whether single weights are changed that the edited text runs into: W·T + Δ is meant, and through the text it would be
    (W + Δ)·T."""
    single = {*edit.layers, *edit.diffs}
    text = edit.text is not None and any(reaches(key, edit.targets, edit.blocks) for key in single)
    return text or (edit.pooled is not None and POOLED_KEY in single)


def _warn_about(model: Any, edit: Edit, by_text: bool) -> None:
    trained = [key for key in edit.on_model() if key in model.model_state_dict()]
    solved = edit.text is not None
    if not by_text and ((solved and _coarse(model, edit)) or low_precision(model, trained)):
        log.warning(
            "The weights are stored in fp8 or quantised, and rounding them anew blurs the edit and everything else a little; "
            "delivery 'text' avoids it, where no trained layer reads the text."
        )
    if edit.base and (solved or trained) and fingerprints_differ(edit.base, base_fingerprint(model)):
        log.warning(
            "The edit was made on another checkpoint than this one; fine-tunes of one family share their text space, so that "
            "it mostly holds. Make it anew if the concept comes through."
        )


def _patch(matrix: LowRank, full: bool) -> Any:
    if full:
        return ("diff", (matrix.matrix(),))
    return comfy.weight_adapter.LoRAAdapter(set(), (matrix.up, matrix.down, None, None, None, None))


def _add(patcher: Any, patches: dict[Any, Any], strength: float) -> None:
    """Adds patches and refuses if the host does not take all of them."""
    taken = patcher.add_patches(patches, strength) if patches else []
    if missing := set(patches) - set(taken):
        raise ValueError(
            f"{len(missing)} of {len(patches)} weights of the edit do not exist here (such as '{min(map(str, missing))}'); it "
            "was made for another kind of model."
        )


def change_conditioning(conditioning: list, edit: Edit, strength: float = 1.0) -> list:
    """The same prompts with the edit in their embeddings: every token becomes T·c, and so does the pooled embedding.

    Raises:
        ValueError: the edit changes single weights, or embeddings of another width.
    """
    if edit.layers or edit.diffs:
        raise ValueError(
            "This edit was trained and changes single weights, so that it cannot be put into a conditioning; connect a MODEL."
        )
    if edit.targets != ("k", "v") or edit.blocks:
        raise ValueError(
            "This edit goes to some of the projections only, and a conditioning reaches all of them; connect a MODEL."
        )
    changed = []
    for tokens, about in conditioning:
        if edit.width is not None and tokens.shape[-1] != edit.width:
            raise ValueError(
                f"The edit is for text embeddings of width {edit.width} and this conditioning has width {tokens.shape[-1]}; "
                "encode the prompt with the CLIP the edit was solved with."
            )
        about, pooled = dict(about), about.get("pooled_output")
        if edit.pooled is not None and pooled is not None:
            about["pooled_output"] = _moved(pooled, edit.pooled, strength)
        changed.append([tokens if edit.text is None else _moved(tokens, edit.text, strength), about])
    return changed


def _moved(x: torch.Tensor, matrix: LowRank, strength: float) -> torch.Tensor:
    """x + s·Mx, computed in float32."""
    if strength == 0 or not matrix.rank:
        return x
    wide, factors = x.float(), (matrix.up, matrix.down)
    if not torch.is_inference_mode_enabled():  # inside a gradient region nothing made under inference mode may be saved
        factors = (without_inference_tensors(matrix.up), without_inference_tensors(matrix.down))
    return (wide + strength * LowRank(*(f.to(wide) for f in factors))(wide)).to(x.dtype)


def _change_text(model: Any, edit: Edit, strength: float) -> None:
    """The edit in front of the projections, at every sampling step."""
    if edit.text is not None and edit.text.rank:
        model.set_model_attn2_patch(_text_patch(edit, strength))
    if edit.pooled is not None and edit.pooled.rank:
        model.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, keys.ERASE, _pooled_wrapper(edit.pooled, strength)
        )


def _text_patch(edit: Edit, strength: float) -> Callable:
    matrix, wanted = edit.text, re.compile(edit.blocks)
    assert matrix is not None

    def patch(n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra: dict[str, Any]) -> tuple:
        for_keys, for_values = (bool(wanted.search(_key_of(extra, to))) and to in edit.targets for to in ("k", "v"))
        if context.shape[-1] != matrix.width or not (for_keys or for_values):
            return n, context, value
        same, moved = value is context, _moved(context, matrix, strength)
        moved_value = moved if same else _moved(value, matrix, strength)
        return n, moved if for_keys else context, moved_value if for_values else value

    return patch


def _key_of(extra: dict[str, Any], to: str) -> str:
    """The key of the projection that a patch is called for."""
    name, number = extra["block"][:2]
    place, depth = _BLOCKS[name].format(number), extra.get("block_index", 0)
    return f"diffusion_model.{place}.transformer_blocks.{depth}.attn2.to_{to}.weight"


def _pooled_wrapper(matrix: LowRank, strength: float) -> Callable:
    def wrapper(executor: Any, x: torch.Tensor, t: Any, context: Any, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(y, torch.Tensor):
            y = torch.cat([_moved(y[:, : matrix.width], matrix, strength), y[:, matrix.width :]], 1)
        return executor(x, t, context, y, *args, **kwargs)

    return wrapper
