"""Probing an edit with the host's own text encoder and weights."""

from __future__ import annotations

from collections.abc import Sequence

from ...methods.erase.edit import Edit
from ...methods.erase.fingerprint import check_same_clip
from ...methods.erase.probe import ProbeFinding, attack, phrase_tokens
from ...methods.erase.regenerate import map_of
from ...methods.erase.spec import check_erased, erased_of
from ..text.tokens import PromptEncoder, check_one_encoding
from ..text.weights import without_weights
from ..types import CLIP, ModelPatcher
from .weights import check_edit_width, sampled_keys, text_keys, weight_energy

OTHER_SENTENCES = (
    "a drawing of a {}",
    "{} in the rain",
    "two people looking at a {}",
    "a very beautiful {}, highly detailed",
    "the {}",
    "on a table there is a {} and a cup",
)
"""Sentences that no template set contains."""

_NOT_SOLVED = (
    "This edit was trained or is empty, and only edits solved in closed form can be probed without pictures; connect "
    "one from Solve Erasure."
)


def probe(model: ModelPatcher, clip: CLIP, edit: Edit, others: Sequence[str] = OTHER_SENTENCES) -> list[ProbeFinding]:
    """Attacks every concept that the edit names.

    Args:
        others: sentences with ``{}`` where the concept goes, apart from those it was solved with.

    Raises:
        ValueError: the edit has no map of the text embedding, or is for another model; the CLIP has a schedule.
    """
    entries = [erased_of(entry) for spec in edit.specs() for entry in spec.get("erase", ())]
    if edit.text is None or not entries:
        raise ValueError(_NOT_SOLVED)
    check_edit_width(model, edit)
    check_one_encoding(clip)
    encode = PromptEncoder(clip)
    check_same_clip(edit, encode)
    Q = weight_energy(model, sampled_keys(text_keys(model, edit.targets, edit.blocks)))
    T = map_of(edit.text, len(Q))
    findings = []
    for erased in entries:
        elsewhere = erased._replace(templates=tuple(map(without_weights, others)))
        check_erased(elsewhere)
        solved, other = phrase_tokens(encode, erased), phrase_tokens(encode, elsewhere)
        findings.append(attack(erased.concept, T, Q, solved, other))
    return findings
