"""What LoRA-Composer is told, with the paper's values where they hold for every model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..choices import check_choice


@dataclass(frozen=True)
class LossWeights:
    """How much the losses count (2403.11627, eq. 8; the reference's figures, whose ratio of fill and region to box is 2 : 10 : 8)."""

    box: float = 8.0
    fill: float = 2.0
    region: float = 10.0


@dataclass(frozen=True)
class Compose:
    """Settings of one run.

    Args:
        isolation: whether tokens of a region ignore the other regions in self-attention.
        reinit: ``swap`` exchanges the noise of each region's best window with its own, ``copy`` is the reference's, ``off``.
        enhancement: how far each gradient step goes; 0 takes none. With ``relative`` it is a share of the latent's own length,
            which holds for every model; otherwise the paper's learning rate (20 for SD 1.5).
        start, end: the part of the sampling, in percent (0 to 1), in which steps are taken.
        stop: ``patience`` ends them when the loss has not fallen by 1 % over some steps, ``rise`` at the first rise (the
            reference's), ``never`` not before the end of the window.
        token_lora: whether the rest of each LoRA acts on the tokens of its region: self-attention, queries, feed-forward. The
            paper's LoRAs learn words too and go without it; ordinary ones carry most of a concept there, so it is on.
        automatic: with no regions, the percent at which they are taken from the concepts' attention so far.
    """

    isolation: bool = True
    reinit: str = "swap"
    enhancement: float = 0.01
    relative: bool = True
    start: float = 0.0
    end: float = 0.5
    stop: str = "patience"
    weights: LossWeights = LossWeights()
    token_lora: bool = True
    automatic: float = 0.2

    def __post_init__(self) -> None:
        for name, value, known in (("reinit", self.reinit, ("swap", "copy", "off")),
                                   ("stop", self.stop, ("patience", "rise", "never"))):  # fmt: skip
            check_choice(known, value, name)

    def rate(self, progress: float) -> float:
        """The step at this percent: it falls to √½ of itself at the end of the sampling (sec. 4, as the reference computes it)."""
        return self.enhancement * (1 - 0.5 * min(max(progress, 0.0), 1.0)) ** 0.5

    def at(self, automatic: float) -> Compose:
        """The same with regions found at this percent."""
        return replace(self, automatic=automatic)
