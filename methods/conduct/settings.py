"""The settings of Concept Conductor, with the paper's values for a schedule of any length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

REFERENCE_UPDATES = 61
"""Gradient steps of the reference code (SD 1.5, 200 steps). Their number, not their density, moves the layout."""

WHO = "Concept Conductor"
"""The subject of its refusals."""


class Meeting(NamedTuple):
    """Where in a network concepts are put into the base.

    Attributes:
        whole_blocks: takes the outputs of whole blocks, residual and all, instead of their attentions; in a UNet, those
            of the decoder's transformers.
        start, end: the range of blocks, as shares of the depth. 0 to 1 is all blocks in which paths can meet: in a UNet
            those of the decoder, in a transformer all. If the end is not above the start, there are none.
    """

    whole_blocks: bool = False
    start: float = 0.0
    end: float = 1.0

    def among(self, count: int) -> range:
        """The numbers of these blocks, of ``count`` in the order they run. A range that is not empty has at least one.

        A block is in it if its middle is; an end on the middle of a block leaves it out.
        """
        if self.end <= self.start:
            return range(0)
        first = min(int(self.start * count + 0.5), count - 1)
        return range(first, max(first + 1, int(self.end * count + 0.5)))


@dataclass(frozen=True)
class Conduct:
    """Windows are in sampling percent, 0 to 1, and include both ends.

    Attributes:
        guidance_weight: of the alignment loss, per token. The reference code's 10 at 256 tokens and 40 at 1024 are both
            0.0390625. 0 is no alignment.
        guidance_start, guidance_end: the window of layout alignment.
        iterations: gradient steps before each step of the window; 0 makes about as many in all as the reference code.
        concept_share: γ, the weight of the concepts' paths in the alignment; the base's is 1.
        injection_start, injection_end: the window in which concepts are put into the base. Outside of it the base draws
            alone, and the concepts are not computed, but for a refinement that comes before it.
        whole_transformers: takes the outputs of the decoder's whole transformers, feed-forward and residual included,
            for LoRAs that act on more than attention. Differs from the paper, which takes their attentions alone.
        refine_start, refine_end: the window of mask refinement; empty (end not above start) is off.
        refine_every: the smallest distance between two refinements.
        least_overlap: a cluster that overlaps less with the old mask is not trusted; the old mask's rectangle is taken.
        rectangles: always take rectangles.
        block_start, block_end: the range of blocks in which concepts are put into the base, as ``Meeting``; an empty
            one is an empty window. Differs from the paper, which has no range.
    """

    guidance_weight: float = 0.0390625
    guidance_start: float = 0.0
    guidance_end: float = 0.304
    iterations: int = 0
    concept_share: float = 1.0
    injection_start: float = 0.0
    injection_end: float = 1.0
    whole_transformers: bool = False
    refine_start: float = 0.252
    refine_end: float = 0.404
    refine_every: float = 0.025
    least_overlap: float = 0.7
    rectangles: bool = False
    block_start: float = 0.0
    block_end: float = 1.0

    @property
    def meeting(self) -> Meeting:
        """Where in the network concepts are put into the base."""
        return Meeting(self.whole_transformers, self.block_start, self.block_end)

    @property
    def aligns(self) -> bool:
        """Whether there is any layout alignment."""
        return self.guidance_weight > 0

    @property
    def refines(self) -> bool:
        """Whether masks are ever refined."""
        return self.refine_end > self.refine_start

    def steps_each(self, guided: int) -> int:
        """Gradient steps before each of ``guided`` sampling steps."""
        return self.iterations or max(1, -(-REFERENCE_UPDATES // max(guided, 1)))

    def guides_at(self, percent: float) -> bool:
        """Whether the layout is aligned at this percent."""
        return self.aligns and self.guidance_start <= percent <= self.guidance_end

    def injects_at(self, percent: float) -> bool:
        """Whether concepts are put into the base at this percent."""
        return self._injects_anywhere and self.injection_start <= percent <= self.injection_end

    @property
    def _injects_anywhere(self) -> bool:
        """Whether the range of blocks has any."""
        return self.block_end > self.block_start

    def refines_at(self, percent: float, last: float | None) -> bool:
        """Whether to refine at this percent. ``last`` is the percent of the last refinement.

        Masks that no concept will use any more are not refined.
        """
        used = self._injects_anywhere and percent <= self.injection_end
        inside = used and self.refines and self.refine_start <= percent <= self.refine_end
        return inside and (last is None or percent - last >= self.refine_every - 1e-6)
