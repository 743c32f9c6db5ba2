"""Which tokens read which where the prompts of all concepts are in one sequence with the picture.

Tokens that read the same form a group, and a group's attention is one call over the keys it reads. So no mask of all
tokens by all tokens is made, and any attention will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch

from ..lora_tokens import unknown_grid

Attend: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of queries to keys and values, each (…, tokens, channels)."""


class Extent(NamedTuple):
    """Neighbouring tokens of a sequence, from ``start`` to before ``stop``."""

    start: int
    stop: int


class Group(NamedTuple):
    """Tokens that read the same: their positions in the sequence, and those of what they read; both (number,)."""

    queries: torch.Tensor
    keys: torch.Tensor


def prompt_groups(prompts: Sequence[Extent], length: int) -> list[Group]:
    """The groups among text tokens alone: every prompt reads itself.

    Args:
        prompts: where the prompts are; tokens of none are in no group, and nobody reads them.
        length: of the sequence.
    """
    return _merged([(own, own) for own in _marked(prompts, length)])


def search_groups(prompts: Sequence[Extent], start: int, length: int) -> list[Group]:
    """The groups while nobody knows the regions yet: base and picture read each other and no concept.

    A concept's prompt reads itself and all behind the text, as if the whole picture were its region.

    Args:
        prompts, length: as ``region_groups``.
        start: the first token behind the text.
    """
    base, *concepts = _marked(prompts, length)
    (behind,) = _marked([Extent(start, length)], length)
    return _merged([(base | behind, base | behind), *((own, own | behind) for own in concepts)])


def region_groups(
    prompts: Sequence[Extent],
    inside: torch.Tensor,
    start: int,
    length: int,
    isolation: bool = True,
    with_base: bool = True,
) -> list[Group]:
    """The groups of text and picture in one sequence.

    A concept's prompt reads itself and its region. The picture inside a region reads that prompt, the region and the
    background; inside several it reads all of theirs. The rest of the picture reads the base prompt and all of the
    picture, and so does the base prompt. What is behind the picture (references, what fills up) is part of the
    background, or of all regions where there is none; everybody reads it.

    Args:
        prompts: where the base prompt is, then each region's; tokens of none are in no group, and nobody reads them.
        inside: which tokens of the picture each region owns, (regions, tokens) of bool, on the CPU.
        start: the first token of the picture.
        length: of the sequence.
        isolation: whether regions ignore each other; otherwise all of the picture reads all of the picture.
        with_base: whether regions read the base prompt too.
    """
    base, *concepts = _marked(prompts, length)
    regions = inside.new_zeros(len(inside), length)
    regions[:, start : start + inside.shape[1]] = inside
    picture, behind = _marked([Extent(start, start + inside.shape[1]), Extent(start + inside.shape[1], length)], length)
    outside = picture & ~regions.any(0)
    found = [(base, base | picture | behind)]
    found += [(own, own | region | behind) for own, region in zip(concepts, regions, strict=True)]
    sets = [members.nonzero().flatten().tolist() for members in regions[:, picture].T.unique(dim=0)]
    home = [] if outside.any() else list(range(len(regions)))  # of what is behind the picture
    for members in sets if home in sets else [*sets, home]:
        queries = _in_exactly(regions, members) & picture
        read = base.clone() if with_base or not members else torch.zeros_like(base)
        for number in members:
            read |= concepts[number] | regions[number]
        read |= outside if isolation and members else picture
        found.append((queries | behind if members == home else queries, read | behind))
    return _merged(found)


class RegionGroups:
    """The groups of a picture with regions, each kind of sequence computed once; arguments as ``region_groups``.

    Without regions (``inside`` is None) they are those of a search, for a picture of so many ``tokens``.
    """

    def __init__(
        self, inside: torch.Tensor | None, isolation: bool = True, with_base: bool = True, tokens: int = 0
    ) -> None:
        self.inside, self.isolation, self.with_base = inside, isolation, with_base
        self.tokens = tokens if inside is None else inside.shape[1]
        self._found: dict[tuple[object, ...], list[Group]] = {}

    def __call__(self, prompts: tuple[Extent, ...], text: int, length: int, device: torch.device) -> list[Group]:
        """Who reads whom among that many tokens, of which the first ``text`` are of prompts, or all.

        Raises:
            ValueError: the picture has more tokens than the sequence has left.
        """
        key = (prompts, text, length, device)
        if key not in self._found:
            if text < length < text + self.tokens:
                raise unknown_grid(length - text, [self.tokens])
            groups = self._of(prompts, text, length)
            self._found[key] = [Group(*(at.to(device) for at in group)) for group in groups]
        return self._found[key]

    def _of(self, prompts: tuple[Extent, ...], text: int, length: int) -> list[Group]:
        if length == text:
            return prompt_groups(prompts, length)
        if self.inside is None:
            return search_groups(prompts, text, length)
        return region_groups(prompts, self.inside, text, length, self.isolation, self.with_base)


def grouped(groups: Sequence[Group], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attend: Attend) -> torch.Tensor:
    """Attention in which every token reads what its group does, (…, tokens, channels); zero for tokens of no group."""
    parts = [attend(q.index_select(-2, own), *(t.index_select(-2, read) for t in (k, v))) for own, read in groups]
    out = parts[0].new_zeros(*parts[0].shape[:-2], q.shape[-2], parts[0].shape[-1])
    for group, part in zip(groups, parts, strict=True):
        out = out.index_copy(-2, group.queries, part)
    return out


def _marked(extents: Sequence[Extent], length: int) -> list[torch.Tensor]:
    """Each as (length,) of bool."""
    at = torch.arange(length)
    return [(at >= extent.start) & (at < extent.stop) for extent in extents]


def _in_exactly(regions: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
    """The tokens that these regions (regions, length) own, and no others do."""
    wanted = torch.zeros(len(regions), 1, dtype=torch.bool)
    wanted[list(members)] = True
    return (regions == wanted).all(0)


def _merged(found: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Group]:
    """Groups of queries and keys, each (length,) of bool; those with the same keys are one."""
    by_keys: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}
    for queries, read in found:
        name = read.numpy().tobytes()
        by_keys[name] = (queries | by_keys[name][0] if name in by_keys else queries, read)
    pairs = ((queries.nonzero().flatten(), read.nonzero().flatten()) for queries, read in by_keys.values())
    return [Group(queries, read) for queries, read in pairs if len(queries)]
