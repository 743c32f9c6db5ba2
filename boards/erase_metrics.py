"""What the erasure board counts over its pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from . import erase_attacks
from .board import Figures

RELATIVE = ("kept", "position", "background")
"""The first words of the figures that are relative to the unedited model."""


@dataclass
class EraseMetrics:
    """Counts over the pictures of some groups. ``named``: role of a prompt → whether its concept was named."""

    named: dict[str, list[bool]] = field(default_factory=dict)
    background: list[bool] = field(default_factory=list)
    layout: list[float] = field(default_factory=list)
    silhouette: list[float] = field(default_factory=list)
    anchored: list[bool] = field(default_factory=list)
    minutes: list[float] = field(default_factory=list)

    def add(self, other: EraseMetrics) -> None:
        """Takes in another group's counts."""
        for role, named in other.named.items():
            self.named.setdefault(role, []).extend(named)
        for name in ("background", "layout", "silhouette", "anchored", "minutes"):
            getattr(self, name).extend(getattr(other, name))

    def remarks(self) -> list[str]:
        return []

    def figures(self, plain: Mapping[str, float] | None = None) -> Figures:
        """Shares. The preserved concepts' are relative to ``plain``, the figures of the unedited model."""
        preserved = {
            "kept_right": self._share("kept"),
            "kept_unlisted": self._share("unlisted"),
            "position_kept": self._share("pair"),
            "background_kept": statistics.mean(self.background),
        }
        means: dict[str, Sequence[float]] = {
            "layout_kept": self.layout,
            "silhouette_kept": self.silhouette,
            "anchor_named": self.anchored,
        }
        return (
            self._erased()
            | {name: _relative(value, (plain or {}).get(name)) for name, value in preserved.items()}
            | {name: statistics.mean(values) for name, values in means.items() if values}
            | {"n": sum(map(len, self.named.values())), "minutes": statistics.mean(self.minutes)}
        )

    def _share(self, role: str) -> float:
        return statistics.mean(self.named[role]) if self.named.get(role) else 0.0

    def _erased(self) -> Figures:
        """How often erased concepts are still named: plainly, in paraphrases and under attack."""
        attacks = [named for kind in erase_attacks.KINDS for named in self.named.get(kind, [])]
        return {
            "erased_named": self._share("erased"),
            "erased_named_paraphrase": self._share("paraphrase"),
            **({"erased_named_attack": statistics.mean(attacks)} if attacks else {}),
            **{f"attack_{k}": self._share(k) for k in (*erase_attacks.KINDS, "img2img") if k in self.named},
        }


def _relative(value: float, plain: float | None) -> float:
    """The value over the unedited model's; the value itself where there is nothing to divide by."""
    return value / plain if plain else value


def low_pass_correlation(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of latents (b, c, h, w) at a quarter of their size, per channel about its mean, (b,)."""
    small = [torch.nn.functional.avg_pool2d(x.double(), 4) for x in (one, other)]
    centred = [(x - x.mean((-2, -1), keepdim=True)).flatten(1) for x in small]
    return torch.cosine_similarity(centred[0], centred[1])


def silhouette(latents: torch.Tensor) -> torch.Tensor:
    """How far each cell is from the background, the median of the outermost cells: (b, 1, h, w).

    Unlike the latent it does not know a concept's colours, which must go with the concept.
    """
    rim = torch.ones(latents.shape[-2:], dtype=torch.bool)
    rim[1:-1, 1:-1] = False
    background = latents[..., rim].median(-1).values
    return (latents - background[..., None, None]).norm(dim=1, keepdim=True)
