"""Where concepts look while the base model draws alone: the maps from which regions are found."""

from __future__ import annotations

from typing import Any

import torch

from ..engine.attention import CROSS, Site, find_sites
from ..engine.attention_patches import Attend, override_attention
from .enhancement import loss_sites
from .injection import Injection, grid_of


class Watcher:
    """Sums, over model calls, how much each concept's phrase is seen by the queries of the positive rows."""

    def __init__(self, injection: Injection) -> None:
        self.injection = injection
        sites = loss_sites(injection.unet, CROSS)
        self.sites = sites or find_sites(injection.unet, CROSS)
        self.sums: dict[tuple[int, int], torch.Tensor] = {}
        self.progress = 0.0

    def options(self, options: dict[str, Any], progress: float) -> dict[str, Any]:
        """A copy of the options under which the maps are summed at this percent (0 to 1); the answers stay as they are."""
        self.progress = progress
        return override_attention(options, self.injection.unet, self.sites, self._answer)

    def _answer(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site, extra: dict[str, Any], attend: Attend
    ) -> torch.Tensor:
        grid = grid_of(q, extra)
        uuids = extra.get("uuids") or ()
        for rows, uuid in zip(q.chunk(max(1, len(uuids))), uuids, strict=False):
            if self.injection.sides.get(uuid) == 0:
                voices = self.injection.voices
                seen = torch.stack([self.injection.look(rows, site, voice).mean((0, 1)) for voice in voices])
                self.sums[grid] = self.sums.get(grid, torch.zeros(())) + seen.unflatten(-1, grid).cpu()
        return attend(q, k, v)

    def maps(self) -> torch.Tensor:
        """(concepts, h, w) at the finest grid that was seen."""
        return self.sums[max(self.sums)]
