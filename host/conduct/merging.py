"""Where the paths meet: in its region, the base takes over a concept's output (Concept Conductor, 2408.03632)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple
from uuid import UUID

import torch

from ...methods.masks import MaskPyramid
from .. import keys
from ..engine.attention_patches import OutputSite
from ..types import TransformerOptions

log = logging.getLogger(__name__)


class Owner(NamedTuple):
    """Whose an entry is: its path, 0 for the positive or 1 for the negative, and which of the path's entries it is.

    A prompt may have several entries (combined, scheduled). One of the base and one of a concept that go together have
    the same ``number``.
    """

    path: int
    cond_or_uncond: int
    number: int = 0


class PathRows(NamedTuple):
    """Rows of a model call, whose they are, and the uuid of their entry."""

    rows: slice
    owner: Owner
    uuid: UUID


class Evaluation(Enum):
    """Whose evaluation the running model call belongs to."""

    FOREIGN = auto()
    """Another node's. Without the concepts' rows, the base stays whole and a warning is logged once."""
    OWN = auto()
    """Ours: the output of every concept is at hand, in the call or cached."""
    SINGLE_PATH = auto()
    """Of one path: every row has its branches, and nothing is merged."""


class CachedOutput(NamedTuple):
    """A concept's output (rows, tokens of its region, channels) at those token positions."""

    tokens: torch.Tensor
    output: torch.Tensor


OutputKey = tuple[Owner, OutputSite]
"""Whose output, and the place in the network."""


@dataclass(eq=False)
class Merging:
    """Merges the concepts' outputs into the base's rows, wherever it is called with the outputs of all rows.

    Args:
        masks: may be exchanged between calls.
        concepts: their number; path 0 is the base.
        active: whether the base takes anything over at the moment.

    ``cached_outputs`` is set while the concepts are evaluated before the base. ``reached`` says whether the running
    call has come here, ``answered_by_others`` whether one of our evaluation has not: a step cache answered it.
    """

    masks: MaskPyramid
    concepts: int
    active: bool = True
    evaluation: Evaluation = Evaluation.FOREIGN
    cached_outputs: dict[OutputKey, CachedOutput] | None = None
    reached: bool = False
    answered_by_others: bool = False
    _warned: bool = False

    @contextlib.contextmanager
    def evaluating(self, evaluation: Evaluation) -> Iterator[None]:
        """Inside it, model calls belong to that evaluation. Outputs that our own has cached are dropped at the end."""
        before, self.evaluation = self.evaluation, evaluation
        self.answered_by_others = False
        try:
            yield
        finally:
            self.evaluation = before
            if evaluation is Evaluation.OWN:
                self.cached_outputs = None

    def merge(self, output: torch.Tensor, place: OutputSite, transformer_options: TransformerOptions) -> torch.Tensor:
        """In the base's rows of an output at which paths meet: h ← Σ M_i h_i (2408.03632).

        Args:
            output: (rows, tokens, channels), changed in place.
        """
        self.reached = True
        table: Sequence[PathRows] = transformer_options.get(keys.PATH_ROWS, ())
        merges = self.active and self.evaluation is not Evaluation.SINGLE_PATH
        if not table or not merges or not self.concepts:
            return output
        masks = self.masks.at(*place.grid).to(output.device).flatten(-2)  # (…, 1 + concepts, tokens)
        outputs = {row.owner: output[row.rows] for row in table if row.owner.path}
        if self.cached_outputs is not None:
            for owner, h in outputs.items():
                tokens = (masks[..., owner.path, :] > 0).reshape(-1, masks.shape[-1]).any(0).nonzero().flatten()
                self.cached_outputs[owner, place] = CachedOutput(tokens, h[:, tokens])
        for row in table:
            if row.owner.path == 0:
                self._inject(output[row.rows], row.owner, place, masks, outputs)
        return output

    def _inject(
        self,
        base: torch.Tensor,
        owner: Owner,
        place: OutputSite,
        masks: torch.Tensor,
        outputs: dict[Owner, torch.Tensor],
    ) -> None:
        """Writes the concepts' outputs into the base's rows (batch, tokens, channels), each in its region."""
        found: list[torch.Tensor] = []
        for path in range(1, self.concepts + 1):
            theirs = owner._replace(path=path)
            h = outputs.get(theirs)
            if h is None:
                h = self._cached(base, (theirs, place))
            if h is None:
                return  # before anything is written: a base evaluated without concepts stays whole
            found.append(h)
        soft = self.masks.soft
        if soft:
            base.mul_(masks[..., 0, :, None].to(base.dtype))
        for path, h in enumerate(found, 1):
            mask = masks[..., path, :, None]
            base.copy_(torch.addcmul(base, mask.to(base.dtype), h) if soft else torch.where(mask > 0, h, base))

    def _cached(self, base: torch.Tensor, key: OutputKey) -> torch.Tensor | None:
        """A concept's cached output, filled up with the base's outside of the region.

        Raises:
            RuntimeError: it is missing in our own evaluation.
        """
        if self.cached_outputs is not None and key in self.cached_outputs:
            tokens, h = self.cached_outputs[key]
            return base.index_copy(1, tokens, h)
        if self.evaluation is Evaluation.OWN and not self.answered_by_others:
            raise RuntimeError(
                "The concepts and the base were evaluated in separate model calls, so the concepts' outputs are "
                "missing; please report this workflow."
            )
        if not self._warned:
            self._warned = True
            log.warning(
                "Another node requested a prediction for the base prompt only, or answered for the concepts; it "
                "contains no concepts. Bypass that node if they are missing in the picture."
            )
        return None
