"""LoRA-Composer's settings, with the paper's values where they hold for every model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..choices import check_choice

WHO = "LoRA Composer"
"""The subject of its refusals and warnings."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses (2403.11627, eq. 8), with the reference's figures.

    ``words`` says how the losses of a concept's words become one: ``mean``, so that a long phrase weighs no more than a
    short one, or ``sum`` as in the reference, which always has two words.
    """

    box: float = 8.0
    fill: float = 2.0
    region: float = 10.0
    words: str = "mean"


@dataclass(frozen=True)
class Compose:
    """Settings of one run.

    Args:
        isolation: whether tokens of a region ignore the other regions in self-attention.
        reinit: ``swap`` exchanges each region's noise with its best window's; ``copy`` copies; ``off``.
        enhancement: how far each gradient step goes; 0 takes none. With ``relative`` it is a share of the latent's norm
            and holds for every model. Otherwise it is the paper's learning rate (20 for SD 1.5).
        start, end: the part of the sampling, in percent (0 to 1), in which steps are taken.
        stop: ``patience`` ends them when the loss has not fallen by 1 % over some steps. ``rise`` ends them at the
            first rise, as the reference does; ``never`` at the end of the window.
        token_lora: whether the rest of each LoRA acts on its region's tokens: self-attention, queries, feed-forward.
            Differs from the paper: its LoRAs learn words and do without. Ordinary LoRAs hold most of a concept there.
        automatic: without regions, the percent at which they are taken from the concepts' attention so far.
        base_in_regions: whether regions read the base prompt too, where all prompts are in one sequence with the
            picture. A UNet's regions never do. On the demo transformer they then show the base's nouns.
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
    base_in_regions: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("first_noise", self.reinit, ("swap", "copy", "off")),
            ("stop", self.stop, ("patience", "rise", "never")),
            ("words", self.weights.words, ("mean", "sum")),
        ):
            check_choice(known, value, name)

    def rate(self, percent: float) -> float:
        """The step's length at this percent; it falls to √½ of the first (sec. 4, as in the reference)."""
        return self.enhancement * (1 - 0.5 * min(max(percent, 0.0), 1.0)) ** 0.5

    def at(self, automatic: float) -> Compose:
        """The same with regions found at this percent."""
        return replace(self, automatic=automatic)
