"""Words under a picture on a film: there while it is still, gone while it moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = 1 / 24  # height of the letters, of a canvas's side
SMALLEST = 9  # px, on small canvases
MIDDLE = 11 / 12  # where their middle is: half way from the picture's lower edge to the canvas's
WIDEST = 0.95  # of the canvas; longer words are written smaller
FADING = 1 / 4  # of a movement, at each of its ends: a square that turns round has not reached the words by then


def captioned(shot: np.ndarray, words: str, strength: float = 1.0) -> np.ndarray:
    """The canvas with words in its lower margin.

    Args:
        shot: uint8 (height, width, 3).
        strength: 1 is black; 0, or no words, is the canvas itself.
    """
    if strength <= 0 or not words:
        return shot
    sheet = Image.fromarray(shot)
    font = _fitting(words, sheet.width, max(SMALLEST, LETTERS * min(sheet.size)))
    ink = round(255 * (1 - strength))
    middle = (sheet.width / 2, MIDDLE * sheet.height)
    ImageDraw.Draw(sheet).text(middle, words, (ink,) * 3, font, anchor="mm")
    return np.asarray(sheet)


def _fitting(words: str, width: int, size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font at that size, or at the smaller one at which the words fit."""
    font = ImageFont.load_default(size)
    return ImageFont.load_default(size * min(1.0, WIDEST * width / font.getlength(words)))


def faded(shots: Sequence[np.ndarray], before: str, after: str, motion: int) -> list[np.ndarray]:
    """A movement in whose first frames the words before it go, and in whose last ones those after it come.

    Args:
        shots: one movement of ``motion`` frames, or two of them.
    """
    count = max(1, round(FADING * motion))
    going = [captioned(shot, before, 1 - (at + 1) / count) for at, shot in enumerate(shots)]
    return [captioned(shot, after, 1 - (len(shots) - 1 - at) / count) for at, shot in enumerate(going)]
