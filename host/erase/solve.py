"""From words to an edit: encodes the prompts with the host's CLIP, reads the host's weights, and has the edit solved."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import comfy.utils
import torch

from ...methods.erase.diagnose import measure
from ...methods.erase.edit import KEYS_AND_VALUES, Edit
from ...methods.erase.lowrank import LowRank
from ...methods.erase.problem import Problem, SolverSettings
from ...methods.erase.rows import PromptTokens, RowPairs, joined_rows, paired_rows, preserved_rows
from ...methods.erase.solvers import solve
from ...methods.erase.spec import Erased, Preserved, check_erased, check_preserved, sentences
from ...methods.erase.truncate import AUTOMATIC, shortened_solution
from ..text.tokens import encode_parts, encode_prompt
from .weights import base_fingerprint, energy, fingerprints_differ, sampled_keys, text_keys, text_width

log = logging.getLogger(__name__)

_NARROW = 1280  # up to this width the margin is a matter of a second; beyond, Probe Erasure measures it
_FINGERPRINT = "a quick brown fox jumps over the lazy dog"
_SAME = 0.999  # cosine above which a kept row is an erased one
_KEYS = {"preserve_weight": "keep"}  # of settings, in saved files


@dataclass(frozen=True)
class SolveRequest:
    """How to solve: the solver and its settings, which projections, whether the pooled embedding is edited too, and the
    largest rank (``AUTOMATIC`` cuts what hardly matters, 0 keeps all)."""

    solver: str = "uce"
    settings: SolverSettings = field(default_factory=SolverSettings)
    targets: tuple[str, ...] = KEYS_AND_VALUES
    blocks: str = ""
    pooled: bool = False
    rank: int = AUTOMATIC


class PromptEncoder:
    """A CLIP that encodes each sentence once."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        self.known: dict[tuple[str, str], PromptTokens] = {}
        self.long: dict[str, list[PromptTokens]] = {}

    def __call__(self, text: str, subject: str = "") -> PromptTokens:
        if (text, subject) not in self.known:
            self.known[text, subject] = encode_prompt(self.clip, text, subject)
        return self.known[text, subject]

    def parts(self, text: str) -> list[PromptTokens]:
        """A prompt of any length, one PromptTokens a call of the text encoder."""
        if text not in self.long:
            self.long[text] = encode_parts(self.clip, text)
        return self.long[text]


def solve_erasure(
    model: Any, clip: Any, erased: Erased | None, preserved: Preserved | None, request: SolveRequest = SolveRequest(),
    encode: PromptEncoder | None = None,
) -> Edit:  # fmt: skip
    """The edit that takes every concept of the list to its anchor and holds what is preserved, and the empty prompt.

    Args:
        encode: an encoder that already knows some of the prompts.

    Raises:
        ValueError: a concept, anchor or preserved prompt cannot be used, the MODEL has no cross-attention to the prompt, or the
            CLIP is not its own.
    """
    concepts, kept = _asked(erased, preserved)
    # before any prompt, since the encoders of models without cross-attention cut prompts in other ways
    keys = text_keys(model, request.targets, request.blocks)
    encode = encode or PromptEncoder(clip)
    _check_clip(model, encode("").tokens)
    if not concepts:
        return Edit(spec=_spec_of(concepts, kept, request, clip))
    problem = _problem(encode, concepts, kept)
    _check_apart(problem, kept, encode)
    whole = request.solver.startswith("rece")
    needed = keys if whole else sampled_keys(keys)
    progress = comfy.utils.ProgressBar(len(needed) + 1)
    problem = problem._replace(energy=energy(model, needed, progress))
    solution = solve(request.solver, problem, request.settings)
    short = shortened_solution(solution, problem.Q(), request.rank)
    report = measure(problem, [c.concept for c in concepts], solution, short, margins=whole or problem.width <= _NARROW)
    pooled = _pooled(encode, concepts, kept, request)
    if pooled is not None:
        report["notes"].append(
            f"the pooled embedding is edited too, which sets the style of the picture (rank {pooled.rank})"
        )
    progress.update(1)
    return Edit(
        short.M.to(torch.float32), pooled, targets=request.targets, blocks=request.blocks,
        spec=_spec_of(concepts, kept, request, clip), clip=clip_fingerprint(encode), base=base_fingerprint(model),
        report=report,
    )  # fmt: skip


def _asked(erased: Erased | None, preserved: Preserved | None) -> tuple[list[Erased], list[Preserved]]:
    """Both lists in order, checked."""
    concepts = erased.in_order() if erased else []
    kept = preserved.in_order() if preserved else []
    for concept in concepts:
        check_erased(concept)
    check_preserved(concepts, kept)
    return concepts, kept


def clip_fingerprint(encode: PromptEncoder) -> tuple[float, ...]:
    """Three fixed projections of a fixed sentence: another encoder or another clip skip gives others."""
    tokens = encode(_FINGERPRINT).tokens[1:16].flatten()
    directions = torch.randn(3, len(tokens), generator=torch.Generator().manual_seed(12))
    return tuple(round(float(value), 4) for value in directions @ tokens)


def check_same_clip(edit: Edit, encode: PromptEncoder) -> None:
    """Refuses a text encoder whose embeddings are others than those the edit was made for.

    Raises:
        ValueError: what is another, and which CLIP skip the edit was made with.
    """
    if not edit.clip or not fingerprints_differ(edit.clip, clip_fingerprint(encode)):
        return
    made = edit.specs()[0]
    skip = f" ({made['clip_skip'] or 'none'})" if "clip_skip" in made else ""
    raise ValueError(
        "The edit was made with another text encoder or another CLIP skip than this one, and holds for that alone; set the same "
        f"CLIP skip{skip}, or make the edit anew with this CLIP."
    )


def _check_clip(model: Any, tokens: torch.Tensor) -> None:
    width = text_width(model)
    if width is not None and tokens.shape[-1] != width:
        raise ValueError(
            f"The CLIP makes text embeddings of width {tokens.shape[-1]} and the MODEL reads width {width}; connect the CLIP of "
            "the same checkpoint."
        )


def _problem(encode: PromptEncoder, concepts: list[Erased], kept: list[Preserved]) -> Problem:
    empty = encode("").tokens.double()
    rows, weights = [empty], [torch.full((len(empty),), 1 / (len(empty) - 1), dtype=torch.float64)]
    labels = ["the empty prompt"] * len(empty)
    for entry in kept:
        for prompt in entry.prompts:
            parts = encode.parts(prompt)  # a long prompt weighs as much as a short one
            for part in parts:
                row, weight = preserved_rows(part, entry.weight / len(parts), whole=entry.whole)
                rows.append(row)
                weights.append(weight)
                labels += [prompt] * len(row)
    sets = [_rows_of(encode, concept) for concept in concepts]
    return Problem(
        tuple(pairs for pairs, _ in sets),
        torch.cat(rows),
        torch.cat(weights),
        empty,
        variants=tuple(a for _, a in sets),
        labels=tuple(labels),
    )


def _rows_of(encode: PromptEncoder, erased: Erased) -> tuple[RowPairs, tuple[torch.Tensor, torch.Tensor]]:
    """All pairs of one concept, and what else stands for its subject: the same token in its other sentences and names.

    Raises:
        ValueError: concept and anchor have the same tokens, so that there is no pair.
    """
    parts, subjects = [], []
    for sentence, other, name in sentences(erased):
        concept = encode(sentence, name)
        parts.append(paired_rows(concept, encode(other, erased.anchor), erased.scope, erased.weight))
        subjects.append(concept.tokens[concept.end - 1].double())
    rows = joined_rows(parts)
    if not len(rows):
        raise ValueError(
            f"'{erased.concept}' and its anchor '{erased.anchor}' are the same to this text encoder, so that nothing would change; "
            "name another anchor, or leave it empty."
        )
    first = (rows.C - subjects[0]).norm(dim=1).argmin()
    alike = torch.stack(subjects)[1:] if len(subjects) > 1 else rows.C[:0]
    return rows, (alike, first.expand(len(alike)))


def _check_apart(problem: Problem, kept: list[Preserved], encode: PromptEncoder) -> None:
    """Refuses a preserved prompt whose last word is, to the model, the concept itself."""
    prompts = [prompt for entry in kept for prompt in entry.prompts]
    if not prompts:
        return
    encoded = [(prompt, part) for prompt in prompts for part in encode.parts(prompt)]
    last = torch.stack([part.tokens[max(part.end - 1, 1)] for _, part in encoded]).double()
    alike = (
        torch.nn.functional.normalize(last, dim=1)
        @ torch.nn.functional.normalize(joined_rows(problem.erased).C, dim=1).T
    )
    for (prompt, _), cosine in zip(encoded, alike.amax(1).tolist(), strict=True):
        if cosine > _SAME:
            raise ValueError(
                f"The preserved prompt '{prompt}' is, to this text encoder, the same as a concept that is erased; take it "
                "out of Preserve Concepts."
            )


def _pooled(
    encode: PromptEncoder, concepts: list[Erased], kept: list[Preserved], request: SolveRequest
) -> LowRank | None:
    """The same for the pooled embedding of whole prompts, one row a prompt."""
    if not request.pooled:
        return None
    sets = []
    for erased in concepts:
        for sentence, other, name in sentences(erased):
            concept, anchor = encode(sentence, name).pooled, encode(other, erased.anchor).pooled
            if concept is None or anchor is None:
                raise ValueError("This CLIP gives no pooled embedding; switch 'pooled' off.")
            weight = torch.full((1,), erased.weight, dtype=torch.float64)
            sets.append(RowPairs(concept[None].double(), anchor[None].double(), weight))
    prompts = [("", 1.0)] + [(p, entry.weight) for entry in kept for p in entry.prompts]
    rows = torch.stack([encode.parts(p)[0].pooled.double() for p, _ in prompts])  # type: ignore[union-attr]
    weights = torch.tensor([weight for _, weight in prompts], dtype=torch.float64)
    solver = "null-space" if request.solver == "null-space" else "uce"
    problem = Problem((joined_rows(sets),), rows, weights, rows[:1].expand(2, -1))
    return solve(solver, problem, request.settings).M.to(torch.float32)


def _spec_of(concepts: list[Erased], kept: list[Preserved], request: SolveRequest, clip: Any) -> dict[str, Any]:
    settings = {_KEYS.get(k, k): v for k, v in vars(request.settings).items() if v is not None}
    return {
        "erase": [{**c._asdict(), "previous": None} for c in concepts],
        "preserve": [{**p._asdict(), "previous": None} for p in kept],
        "solver": request.solver, "settings": settings, "targets": list(request.targets), "blocks": request.blocks,
        "pooled": request.pooled, "rank": request.rank, "clip_skip": clip.layer_idx,
    }  # fmt: skip
