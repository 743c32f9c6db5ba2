"""Probing an edit with the host's own text encoder and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...methods.erase.edit import Edit
from ...methods.erase.probe import ProbeFinding, attack
from ...methods.erase.regenerate import map_of
from ...methods.erase.spec import Erased, check_erased, sentences
from .solve import PromptEncoder, check_same_clip
from .weights import check_width, energy, sampled_keys, text_keys

OTHER_SENTENCES = (
    "a drawing of a {}", "{} in the rain", "two people looking at a {}", "a very beautiful {}, highly detailed", "the {}",
    "on a table there is a {} and a cup",
)  # fmt: skip
"""Sentences that no template set holds."""


def probe(model: Any, clip: Any, edit: Edit, others: Sequence[str] = OTHER_SENTENCES) -> list[ProbeFinding]:
    """Attacks every concept that the edit names.

    Args:
        others: sentences with ``{}`` where the concept goes, apart from those it was solved with.

    Raises:
        ValueError: the edit has no map of the text embedding, or is for another model.
    """
    entries = [entry for spec in edit.specs() for entry in spec.get("erase", ())]
    if edit.text is None or not entries:
        raise ValueError(
            "Only edits solved in closed form can be probed without pictures; this one was trained or is empty."
        )
    check_width(model, edit)
    encode = PromptEncoder(clip)
    check_same_clip(edit, encode)
    Q = energy(model, sampled_keys(text_keys(model, edit.targets, edit.blocks)))
    T = map_of(edit.text, len(Q))
    findings = []
    for entry in entries:
        erased = Erased(**entry | {"templates": tuple(entry["templates"]), "names": tuple(entry["names"])})
        asked = erased._replace(templates=tuple(others))
        check_erased(asked)
        findings.append(attack(erased.concept, T, Q, _subjects(encode, erased), _subjects(encode, asked)))
    return findings


def _subjects(encode: PromptEncoder, erased: Erased) -> tuple[torch.Tensor, torch.Tensor]:
    """The subject's last token in every sentence, and its anchor's, (n, d) each; an anchor that is empty has its end token."""
    pairs = []
    for sentence, other, name in sentences(erased):
        concept, anchor = encode(sentence, name), encode(other, erased.anchor)
        there = anchor.end - 1 if anchor.end > anchor.start else anchor.stop
        pairs.append((concept.tokens[concept.end - 1].double(), anchor.tokens[there].double()))
    concepts, anchors = zip(*pairs, strict=True)
    return torch.stack(concepts), torch.stack(anchors)
