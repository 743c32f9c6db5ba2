"""The problem that every solver gets, how it is built from encoded prompts, and the solution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from .lowrank import LowRank
from .rows import PreservedRows, PromptTokens, RowPairs, joined_rows, paired_rows, preserved_rows
from .spec import Erased, Preserved, preserved_prompts, sentences

_SAME_COSINE = 0.999  # above it a preserved row is an erased one


class Encode(Protocol):
    """A text encoder that turns prompts into token rows. Nothing here knows the model behind it."""

    def __call__(self, text: str, phrase: str = "") -> PromptTokens:
        """One sentence, with the positions of a phrase in it.

        Raises:
            ValueError: the sentence is too long for one call of the text encoder, or does not contain the phrase.
        """

    def parts(self, text: str) -> list[PromptTokens]:
        """A prompt of any length, one entry per call of the text encoder."""


PreservedTerms = tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None]
"""Preserved rows (m, d), their weights (m,), the ridge, and Σ w·rrᵀ (d, d) of captions."""


class Problem(NamedTuple):
    """Rows to erase, one set per concept, and rows to preserve (m, d) with weights (m,).

    ``energy`` is Q = Σ WᵀW over the edited weights, (d, d); without it every direction of the embedding counts the
    same. ``empty`` holds the empty prompt's token rows (positions, d). ``statistics`` is Σ w·rrᵀ, (d, d), of captions
    that are preserved on average alone. ``variants`` has two entries per concept: rows
    (k, d) of its other names and sentences, and the number of the concept's row that each of them varies (k,).
    ``labels`` names the prompt of each preserved row, ``held`` says what the row is in it. ``outside`` counts the
    directions that no row has, and that are left out (``blocks.within_span``).
    """

    erased: tuple[RowPairs, ...]
    preserved: torch.Tensor
    preserved_weights: torch.Tensor
    empty: torch.Tensor
    energy: torch.Tensor | None = None
    variants: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    statistics: torch.Tensor | None = None
    labels: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    outside: int = 0

    @property
    def width(self) -> int:
        return self.preserved.shape[1]

    def preserved_terms(self, factor: float, ridge: float) -> PreservedTerms:
        """What ``uce`` and ``system`` take after the erased rows: all that is preserved, at ``factor`` its weight."""
        statistics = None if self.statistics is None else self.statistics * factor
        return self.preserved, self.preserved_weights * factor, ridge, statistics

    @property
    def directions(self) -> int:
        """How many the embedding has, with those that are left out."""
        return self.width + self.outside

    def Q(self) -> torch.Tensor:
        """The energy, or the identity, in float64."""
        return torch.eye(self.width, dtype=torch.float64) if self.energy is None else self.energy.double()


@dataclass(frozen=True)
class SolverSettings:
    """The numbers of Erase Options. None is the solver's own value (``Solver``).

    Attributes:
        ridge: λ of the erasure.
        preserve_weight: multiplies the weight of everything preserved, captions too; the null space ignores it.
        epochs: how often RECE looks for embeddings that bring the concept back.
        regeneration: λ of such an embedding (RECE).
        neighbours: how many neighbours RealEra samples per row.
        reach: how far RealEra erases; 1 is the distance of the farthest other name or sentence.
        threshold: below it the null space counts a direction as unused.
        seed: of RealEra's and SPEED's samples.
    """

    ridge: float | None = None
    preserve_weight: float | None = None
    epochs: int = 3
    regeneration: float = 0.1
    neighbours: int = 16
    reach: float = 1.0
    threshold: float = 0.1
    seed: int = 0

    def given(self) -> dict[str, float]:
        """The values that are set, by their keys in saved files (``preserve_weight`` is ``keep`` there)."""
        values = {"keep" if key == "preserve_weight" else key: value for key, value in vars(self).items()}
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class Solution:
    """M of T = I + M with the A of its last solve.

    ``regeneration`` is RECE's residual before each epoch and at the end. ``proxies``, (n, d) per concept, are what its
    rows became where the solver does not take the anchor's own rows.
    """

    M: LowRank
    A: torch.Tensor
    regeneration: tuple[float, ...] = ()
    notes: tuple[str, ...] = field(default=())
    proxies: tuple[torch.Tensor, ...] = ()


class Solver(NamedTuple):
    """A way to solve a problem, with its own ridge and weight of what is preserved.

    ``every_weight``: its result depends on Q, which then must cover every weight and not a sample of them.
    ``published_rows``: it preserves the words of the list alone, without end tokens and the empty prompt.
    ``averages``: it reads ``Problem.statistics``.
    """

    solve: Callable[[Problem, SolverSettings], Solution]
    ridge: float
    preserve_weight: float
    about: str
    every_weight: bool = False
    published_rows: bool = False
    averages: bool = True


def problem_of(
    encode: Encode, concepts: Sequence[Erased], preserved: Sequence[Preserved], *, published_rows: bool = False
) -> Problem:
    """The problem of the two lists. It has no energy yet.

    The empty prompt is preserved too, unless ``published_rows`` (``Solver``).

    Raises:
        ValueError: a prompt cannot be encoded, a concept equals its anchor, or a preserved prompt equals a concept.
    """
    empty = encode("").tokens.double()
    always = empty[:0] if published_rows else empty
    rows, weights = [always], [torch.full((len(always),), 1 / max(len(empty) - 1, 1), dtype=torch.float64)]
    labels, held = ["the empty prompt"] * len(always), [""] * len(always)
    single = [entry for entry in preserved if not entry.averaged]
    for prompt, entry in preserved_prompts(single):
        for kept in _rows_of(encode, prompt, entry, ends=not published_rows):
            rows.append(kept.rows)
            weights.append(kept.weights)
            labels += [prompt] * len(kept.rows)
            held += kept.names
    sets = [_concept_rows(encode, concept) for concept in concepts]
    erased, variants = tuple(pairs for pairs, _ in sets), tuple(others for _, others in sets)
    _check_distinct(encode, erased, single)
    problem = Problem(erased, torch.cat(rows), torch.cat(weights), empty, variants=variants)
    statistics = _statistics_of(encode, [entry for entry in preserved if entry.averaged], ends=not published_rows)
    return problem._replace(statistics=statistics, labels=tuple(labels), held=tuple(held))


def _rows_of(encode: Encode, prompt: str, entry: Preserved, *, ends: bool) -> Iterator[PreservedRows]:
    """The preserved rows of a prompt, part by part; a long prompt weighs as much as a short one."""
    parts = encode.parts(prompt)
    for part in parts:
        yield preserved_rows(part, entry.each / len(parts), whole=entry.whole, ends=ends)


def _statistics_of(encode: Encode, captions: Sequence[Preserved], *, ends: bool) -> torch.Tensor | None:
    """Σ w·rrᵀ, (d, d), of all rows of captions; None if there are no captions."""
    total: torch.Tensor | None = None
    for prompt, entry in preserved_prompts(captions):
        for rows in _rows_of(encode, prompt, entry, ends=ends):
            if total is None:
                total = rows.rows.new_zeros(rows.rows.shape[1], rows.rows.shape[1])
            total.addmm_(rows.rows.T, rows.weights[:, None] * rows.rows)  # in place: of T5 it takes 0.1 GB
    return total


def _concept_rows(encode: Encode, erased: Erased) -> tuple[RowPairs, tuple[torch.Tensor, torch.Tensor]]:
    """All pairs of one concept, and its variants: the last token of the concept in its other sentences and names.

    Raises:
        ValueError: concept and anchor have the same tokens, so no pair is left.
    """
    pairs, last_tokens = [], []
    for sentence, anchored, name in sentences(erased):
        concept = encode(sentence, name)
        pairs.append(paired_rows(concept, encode(anchored, erased.anchor), erased.scope, erased.weight))
        last_tokens.append(concept.tokens[concept.last_token].double())
    rows = joined_rows(pairs)
    if not len(rows):
        raise ValueError(
            f"'{erased.concept}' and its anchor '{erased.anchor}' are the same to this text encoder, so nothing would "
            "change; name another anchor, or leave it empty."
        )
    first = (rows.C - last_tokens[0]).norm(dim=1).argmin()
    others = torch.stack(last_tokens)[1:] if len(last_tokens) > 1 else rows.C[:0]
    return rows, (others, first.expand(len(others)))


def _check_distinct(encode: Encode, erased: Sequence[RowPairs], preserved: Sequence[Preserved]) -> None:
    """Refuses a preserved prompt whose last word is, to the model, the concept itself."""
    encoded = [(prompt, part) for prompt, _ in preserved_prompts(preserved) for part in encode.parts(prompt)]
    if not encoded:
        return
    last = torch.stack(
        [part.tokens[part.last_word(part.first, max(part.stop, part.first + 1)).end - 1] for _, part in encoded]
    ).double()
    normalized = torch.nn.functional.normalize
    cosines = normalized(last, dim=1) @ normalized(joined_rows(erased).C, dim=1).T
    for (prompt, _), cosine in zip(encoded, cosines.amax(1).tolist(), strict=True):
        if cosine > _SAME_COSINE:
            raise ValueError(
                f"The preserved prompt '{prompt}' is, to this text encoder, the same as a concept that is erased; take "
                "it out of Preserve Concepts."
            )


def pooled_problem(encode: Encode, concepts: Sequence[Erased], preserved: Sequence[Preserved]) -> Problem:
    """The same problem for the pooled embedding of whole prompts, one row per prompt.

    Raises:
        ValueError: the text encoder has no pooled embedding.
    """
    sets = []
    for erased in concepts:
        for sentence, anchored, name in sentences(erased):
            concept, anchor = _pooled(encode(sentence, name)), _pooled(encode(anchored, erased.anchor))
            sets.append(RowPairs(concept[None], anchor[None], torch.full((1,), erased.weight, dtype=torch.float64)))
    prompts = [("", 1.0), *((prompt, entry.each) for prompt, entry in preserved_prompts(preserved))]
    rows = torch.stack([_pooled(encode.parts(prompt)[0]) for prompt, _ in prompts])
    weights = torch.tensor([weight for _, weight in prompts], dtype=torch.float64)
    return Problem((joined_rows(sets),), rows, weights, rows[:1].expand(2, -1))


def _pooled(prompt: PromptTokens) -> torch.Tensor:
    if prompt.pooled is None:
        raise ValueError("This CLIP gives no pooled embedding; switch 'pooled' off.")
    return prompt.pooled.double()
