"""Contact sheets of all the pictures behind a row of a board."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def save_sheet(rows: Sequence[np.ndarray], file: Path) -> None:
    """All pictures on one sheet: a job per row, three jobs side by side.

    Args:
        rows: the pictures of each job, (n, h, w, 3), bytes.
    """
    pictures = [torch.from_numpy(row) for row in rows]
    widest = max(len(r) * r.shape[2] for r in pictures)
    strips = [F.pad(torch.cat(list(r), 1), (0, 0, 0, widest - len(r) * r.shape[2]), value=255) for r in pictures]
    strips += [torch.full_like(strips[0], 255)] * (-len(strips) % 3)
    sheet = torch.cat([torch.cat(strips[i : i + 3], 1) for i in range(0, len(strips), 3)])
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.numpy()).save(file)
