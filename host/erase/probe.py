"""Probing an edit with the host's own text encoder and weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from ...methods.erase.blocks import WIDE
from ...methods.erase.edit import Edit
from ...methods.erase.fingerprint import check_same_clip
from ...methods.erase.lowrank import LowRank
from ...methods.erase.probe import ProbeFinding, attack, phrase_tokens
from ...methods.erase.problem import Encode
from ...methods.erase.regenerate import map_of
from ...methods.erase.spec import Erased, check_erased, erased_of
from ..text.weights import without_weights
from ..types import CLIP, ModelPatcher
from .entry.rows import conditioning_rows, encoders_of
from .weights import check_edit_width, energy_within, sampled_keys, text_keys, weight_energy

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
    encoders = encoders_of(model, clip)
    check_same_clip(edit, partial(conditioning_rows, clip) if edit.entry else encoders[0])
    attacked = [_attacked(encoders, erased, others) for erased in entries]
    keys = text_keys(model, edit.targets, edit.blocks)
    return (
        _wide_findings(model, keys, edit.text, attacked)
        if edit.text.width > WIDE
        else _findings(model, keys, edit.text, attacked)
    )


class _Attacked(NamedTuple):
    """A concept with its rows and their anchors, in the sentences it was solved with and in others."""

    concept: str
    solved: tuple[torch.Tensor, torch.Tensor]
    others: tuple[torch.Tensor, torch.Tensor]


def _attacked(encoders: Sequence[Encode], erased: Erased, others: Sequence[str]) -> _Attacked:
    elsewhere = erased._replace(templates=tuple(map(without_weights, others)))
    check_erased(elsewhere)
    solved, other = (
        tuple(map(torch.cat, zip(*(phrase_tokens(encode, e) for encode in encoders), strict=True)))
        for e in (erased, elsewhere)
    )
    return _Attacked(erased.concept, (solved[0], solved[1]), (other[0], other[1]))


def _findings(
    model: ModelPatcher, keys: Sequence[str], M: LowRank, attacked: Sequence[_Attacked]
) -> list[ProbeFinding]:
    Q = weight_energy(model, sampled_keys(keys))
    T = map_of(M, len(Q))
    return [attack(a.concept, T, Q, a.solved, a.others) for a in attacked]


def _wide_findings(
    model: ModelPatcher, keys: Sequence[str], M: LowRank, attacked: Sequence[_Attacked]
) -> list[ProbeFinding]:
    """The same in the coordinates of all rows and of what M makes. Margins take an embedding's every direction."""
    rows = [row for a in attacked for row in (*a.solved, *a.others)]
    basis = torch.linalg.qr(torch.cat([*rows, M.up.T.double()]).T).Q
    Q, _ = energy_within(model, keys, basis)
    T = map_of(LowRank(basis.T @ M.up.double(), M.down.double() @ basis), len(Q))
    found = []
    for a in attacked:
        solved, others = ((C @ basis, G @ basis) for C, G in (a.solved, a.others))
        found.append(attack(a.concept, T, Q, solved, others, margins=False))
    return found
