"""Where concepts' phrases are seen while the base model draws alone: the maps from which regions are found."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

import torch

from ..engine.attention import CROSS, Site, find_sites, loss_sites
from ..engine.attention_patches import Attend, override_attention
from ..engine.model_call import conditioning_rows
from ..types import ModelOptions, TransformerOptions
from .projections import POSITIVE, ProjectedConcepts, grid_of, with_patched_words


class AttentionAccumulator:
    """Sums, over model calls, how much the queries of the positive rows attend to each concept's phrase.

    Args:
        cond_or_uncond: uuid of a conditioning entry to 0 (positive) or 1 (negative).
    """

    def __init__(self, projected: ProjectedConcepts, cond_or_uncond: Mapping[UUID, int]) -> None:
        self.projected, self.cond_or_uncond = projected, cond_or_uncond
        self.sites = loss_sites(projected.unet, CROSS) or find_sites(projected.unet, CROSS)
        self.sums: dict[tuple[int, int], torch.Tensor] = {}
        self.percent = 0.0

    def options(self, options: ModelOptions, percent: float) -> ModelOptions:
        """A copy of the options under which the maps are summed. The model's output stays the same.

        Args:
            percent: of the sampling, 0 to 1.
        """
        self.percent = percent
        options = with_patched_words(options, self.projected, self.cond_or_uncond)
        return override_attention(options, self.projected.unet, self.sites, self._override)

    def _override(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site, options: TransformerOptions, attend: Attend
    ) -> torch.Tensor:
        grid = grid_of(q, options)
        for uuid, rows in conditioning_rows(options, len(q)):
            if self.cond_or_uncond.get(uuid) == POSITIVE:
                concepts = self.projected.concepts
                each = [self.projected.attention_map(q[rows], site, c, rows).mean((0, 1)) for c in concepts]
                maps = torch.stack(each)
                self.sums[grid] = self.sums.get(grid, torch.zeros(())) + maps.unflatten(-1, grid).cpu()
        return attend(q, k, v)

    def maps(self) -> torch.Tensor:
        """(concepts, h, w) at the finest grid that was seen."""
        return self.sums[max(self.sums)]
