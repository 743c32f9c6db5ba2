"""The judge: a small classifier that says which concept a picture, or a box of it, shows.

It answers a concept's name, ``nothing`` (a blank, noise, something without a recognisable object), ``several`` (more
than one object in the box) or ``unsure``. Its confidence is calibrated by temperature (Guo et al. 1706.04599) on
pictures it was not trained on, and it is ``unsure`` below ``UNSURE_BELOW``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import vocabulary
from .files import load_strictly, read_weights

WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"
READER = WEIGHTS.with_name("reader.safetensors")
"""A second judge, from another seed and other pictures: what is steered by it, the judge can examine."""
NOTHING, SEVERAL, UNSURE = "nothing", "several", "unsure"
CLASSES = (*vocabulary.CONCEPTS, *vocabulary.LORA_CONCEPTS, NOTHING, SEVERAL)
UNSURE_BELOW = 0.5
_BACKGROUND_TOLERANCE = 0.16  # RMS distance in RGB 0..1 beyond which a colour has no name

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in canvas fractions 0..1."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
LEFT: Box = (0.0, 0.0, 0.5, 1.0)
RIGHT: Box = (0.5, 0.0, 1.0, 1.0)
THIRDS: tuple[Box, ...] = tuple((i / 3, 0.0, (i + 1) / 3, 1.0) for i in range(3))


@dataclass(frozen=True)
class Verdict:
    """What the judge sees: the best class with its calibrated probability; ``name`` is ``unsure`` when that is low."""

    best: str
    confidence: float

    @property
    def name(self) -> str:
        return self.best if self.confidence >= UNSURE_BELOW else UNSURE

    def __str__(self) -> str:
        return f"{self.name} ({self.confidence:.0%})" if self.name != UNSURE else f"unsure (perhaps {self.best})"


class _Block(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.SiLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.silu(self.conv(x) + self.skip(x)), 2)


class JudgeNetwork(nn.Module):
    """Pictures (b, 3, h, w) in 0..1, any size from 32 px, to logits (b, classes)."""

    temperature: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(_Block(3, 32), _Block(32, 64), _Block(64, 96), _Block(96, 160))
        self.head = nn.Linear(320, len(CLASSES))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.blocks(F.avg_pool2d(x, 2) * 2 - 1)
        return self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)) / self.temperature


class Judge:
    """The bundled judge. Pictures are (b, h, w, 3) in 0..1, as the host's IMAGE."""

    def __init__(self, network: JudgeNetwork) -> None:
        self.network = network.train(False)

    @classmethod
    def load(cls, weights: Path = WEIGHTS) -> Judge:
        """The judge with the bundled weights.

        Raises:
            RuntimeError: the file is missing, damaged or of another version.
        """
        network = JudgeNetwork()
        state = {k: v.float() if v.is_floating_point() else v for k, v in read_weights(weights).items()}
        load_strictly(network, state, "judge")
        return cls(network)

    @torch.inference_mode()
    def look(self, pictures: torch.Tensor, box: Box = WHOLE) -> list[Verdict]:
        """What each picture shows inside the box."""
        h, w = pictures.shape[1:3]
        x0, y0, x1, y1 = (round(edge * size) for edge, size in zip(box, (w, h, w, h), strict=True))
        crop = pictures[:, y0:y1, x0:x1].permute(0, 3, 1, 2).float()
        probability, index = self.network(crop).softmax(-1).max(-1)
        return [Verdict(CLASSES[i], p) for i, p in zip(index.tolist(), probability.tolist(), strict=True)]

    @torch.inference_mode()
    def probabilities(self, pictures: torch.Tensor) -> torch.Tensor:
        """The calibrated probability of every class for each picture, (b, classes)."""
        return self.network(pictures.permute(0, 3, 1, 2).float()).softmax(-1)

    def describe(self, picture: torch.Tensor) -> str:
        """One picture (h, w, 3) in a few words, for a person."""
        colour = f"{background_of(picture)} background"
        pictures, wide = picture.unsqueeze(0), picture.shape[1] > 1.3 * picture.shape[0]
        (whole,) = self.look(pictures)
        parts = [self.look(pictures, box)[0] for box in (THIRDS if wide else (LEFT, RIGHT))]
        apart = all(part.name not in (NOTHING, SEVERAL, UNSURE) for part in parts)
        surer = apart and min(part.confidence for part in parts) > whole.confidence
        if wide or whole.name == SEVERAL or surer:
            return ", ".join(map(str, parts)) + f", {colour}"
        return f"{whole}, {colour}"


def background_of(picture: torch.Tensor) -> str:
    """The name of the background of a picture (h, w, 3) in 0..1: the median of a border of 1/16 of its size."""
    margin = max(1, min(picture.shape[:2]) // 16)
    border = torch.ones(picture.shape[:2], dtype=torch.bool)
    border[margin:-margin, margin:-margin] = False
    colour = picture.float().cpu()[border].median(0).values
    centres = torch.tensor(list(vocabulary.BACKGROUNDS.values())) / 255
    distance = (centres - colour).square().mean(-1).sqrt()
    nearest = int(distance.argmin())
    return list(vocabulary.BACKGROUNDS)[nearest] if distance[nearest] < _BACKGROUND_TOLERANCE else UNSURE
