"""A contact sheet: pictures in rows, their views in columns, with words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

GAP = 0.04  # of a picture's side
TEXT = 0.09  # height of the letters, of a picture's side


def contact_sheet(pictures: torch.Tensor, captions: Sequence[str], heads: Sequence[str]) -> torch.Tensor:
    """One picture of them all.

    Args:
        pictures: (rows, columns, height, width, 3) in 0..1.
        captions: a line above each row.
        heads: a word above each column.

    Returns:
        (1, height, width, 3) in 0..1.
    """
    rows, columns, height, width, _ = pictures.shape
    gap, letters = max(2, round(GAP * width)), max(9, round(TEXT * width))
    font, line = ImageFont.load_default(letters), round(letters * 1.5)
    sheet = Image.new("RGB", (gap + columns * (width + gap), line + rows * (line + height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.text((gap + column * (width + gap), line // 6), head, "gray", font)
    tiles = (pictures.detach().cpu() * 255).round().byte().numpy()
    for row, (caption, shown) in enumerate(zip(captions, tiles, strict=True)):
        top = line + row * (line + height + gap)
        draw.text((gap, top + line // 6), caption, "black", font)
        for column, tile in enumerate(shown):
            sheet.paste(Image.fromarray(tile), (gap + column * (width + gap), top + line))
    return torch.from_numpy(np.asarray(sheet, np.float32) / 255).unsqueeze(0)
