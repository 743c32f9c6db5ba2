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
    """Tokens that read the same: their positions in the sequence, and those of what they read; both (number,).

    Attributes:
        shares: how much of a token's answer comes from this group, (queries,); None where all of it does.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    shares: torch.Tensor | None = None

    def to(self, device: torch.device) -> Group:
        shares = None if self.shares is None else self.shares.to(device)
        return Group(self.queries.to(device), self.keys.to(device), shares)


def prompt_groups(prompts: Sequence[Extent], length: int) -> list[Group]:
    """The groups among text tokens alone: every prompt reads itself.

    Args:
        prompts: where the prompts are; tokens of none are in no group, and nobody reads them.
        length: of the sequence.
    """
    return _merged([(own.float(), own) for own in _marked(prompts, length)])


def search_groups(prompts: Sequence[Extent], start: int, length: int) -> list[Group]:
    """The groups while nobody knows the regions yet: base and picture read each other and no concept.

    A concept's prompt reads itself and all behind the text, as if the whole picture were its region.

    Args:
        prompts, length: as ``region_groups``.
        start: the first token behind the text.
    """
    base, *concepts = _marked(prompts, length)
    (behind,) = _marked([Extent(start, length)], length)
    groups = [((base | behind).float(), base | behind), *((own.float(), own | behind) for own in concepts)]
    return _merged(groups)


def region_groups(
    prompts: Sequence[Extent],
    inside: torch.Tensor,
    start: int,
    length: int,
    isolation: bool = True,
    with_base: bool = True,
    weights: torch.Tensor | None = None,
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
        weights: of soft regions, background first, (1 + regions, tokens), which add up to one in every token. A token's
            answer is the mean of what it would read in each, by these weights. None: ``inside`` says all.
    """
    base, *concepts = _marked(prompts, length)
    regions = inside.new_zeros(len(inside), length)
    regions[:, start : start + inside.shape[1]] = inside
    picture, behind = _marked([Extent(start, start + inside.shape[1]), Extent(start + inside.shape[1], length)], length)
    outside = picture & ~regions.any(0)
    found = [(base.float(), base | picture | behind)]
    found += [(own.float(), own | region | behind) for own, region in zip(concepts, regions, strict=True)]
    home = [] if outside.any() else list(range(len(regions)))  # of what is behind the picture
    owners = _owners(inside, weights)
    if home not in [members for members, _ in owners]:
        owners.append((home, torch.zeros(inside.shape[1])))
    for members, share in owners:
        read = base.clone() if with_base or not members else torch.zeros_like(base)
        for number in members:
            read |= concepts[number] | regions[number]
        read |= outside if isolation and members else picture
        answered = behind.float() if members == home else torch.zeros(length)
        answered[picture] = share
        found.append((answered, read | behind))
    return _merged(found)


class RegionGroups:
    """The groups of a picture with regions, each kind of sequence computed once; arguments as ``region_groups``.

    Without regions (``inside`` is None) they are those of a search, for a picture of so many ``tokens``.
    """

    def __init__(
        self,
        inside: torch.Tensor | None,
        isolation: bool = True,
        with_base: bool = True,
        tokens: int = 0,
        weights: torch.Tensor | None = None,
    ) -> None:
        self.inside, self.isolation, self.with_base, self.weights = inside, isolation, with_base, weights
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
            self._found[key] = [group.to(device) for group in groups]
        return self._found[key]

    def _of(self, prompts: tuple[Extent, ...], text: int, length: int) -> list[Group]:
        if length == text:
            return prompt_groups(prompts, length)
        if self.inside is None:
            return search_groups(prompts, text, length)
        return region_groups(prompts, self.inside, text, length, self.isolation, self.with_base, self.weights)


def grouped(groups: Sequence[Group], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attend: Attend) -> torch.Tensor:
    """Attention in which every token reads what its group does, (…, tokens, channels); zero for tokens of no group."""
    parts = [
        attend(q.index_select(-2, group.queries), *(t.index_select(-2, group.keys) for t in (k, v))) for group in groups
    ]
    out = parts[0].new_zeros(*parts[0].shape[:-2], q.shape[-2], parts[0].shape[-1])
    for group, part in zip(groups, parts, strict=True):
        if group.shares is None:
            out = out.index_copy(-2, group.queries, part)
        else:
            out = out.index_add(-2, group.queries, part * group.shares[:, None].to(part))
    return out


def _marked(extents: Sequence[Extent], length: int) -> list[torch.Tensor]:
    """Each as (length,) of bool."""
    at = torch.arange(length)
    return [(at >= extent.start) & (at < extent.stop) for extent in extents]


def _owners(inside: torch.Tensor, weights: torch.Tensor | None) -> list[tuple[list[int], torch.Tensor]]:
    """Sets of regions, and how much of each token of the picture is theirs, (tokens,); both as ``region_groups``."""
    if weights is not None:
        return [([number - 1] if number else [], row) for number, row in enumerate(weights.float())]
    return [
        (members.nonzero().flatten().tolist(), (inside == members[:, None]).all(0).float())
        for members in inside.T.unique(dim=0)
    ]


def _merged(found: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Group]:
    """Groups of how much a token's answer is theirs (length,) and of keys (length,) of bool; one for the same keys."""
    by_keys: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}
    for share, read in found:
        name = read.numpy().tobytes()
        by_keys[name] = (share + by_keys[name][0] if name in by_keys else share, read)
    groups = []
    for share, read in by_keys.values():
        queries = share.nonzero().flatten()
        part = share[queries]
        if len(queries):
            groups.append(Group(queries, read.nonzero().flatten(), None if (part == 1).all() else part))
    return groups
