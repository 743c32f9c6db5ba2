"""The losses of a training as a picture and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from .records import EditReport, EditSpec

WIDTH, HEIGHT, MARGIN = 512, 320, 40  # px
_ERASE, _PRESERVE, _INK, _PAPER = (214, 84, 74), (70, 130, 200), (40, 40, 40), (250, 250, 248)


def curve_of(erase: Sequence[float], preserve: Sequence[float]) -> torch.Tensor:
    """Both losses by iteration, smoothed, on a logarithmic scale, (1, h, w, 3) in 0..1."""
    image = Image.new("RGB", (WIDTH, HEIGHT), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    lines = [(_smoothed(erase), _ERASE, "to erase"), (_smoothed(preserve), _PRESERVE, "to keep (drift)")]
    values = [v for line, _, _ in lines for v in line if v > 0]
    top = math.log10(max(values, default=1.0))
    bottom = max(math.log10(min(values, default=0.1)), top - 4)
    draw.rectangle((MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN), outline=(215, 215, 212))
    for number, (line, colour, name) in enumerate(lines):
        points = [_point(i, len(line), v, top, bottom) for i, v in enumerate(line)]
        if len(points) > 1:
            draw.line(points, colour, 2)
        draw.text((MARGIN + 200 * number, 14), name, colour, font)
    draw.text((4, MARGIN - 8), f"{10**top:.2g}", _INK, font)
    draw.text((4, HEIGHT - MARGIN - 8), f"{10**bottom:.0e}", _INK, font)
    draw.text((WIDTH - MARGIN - 90, HEIGHT - 28), f"{len(erase)} iterations", _INK, font)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(1, HEIGHT, WIDTH, 3).float() / 255


def _smoothed(values: Sequence[float], share: float = 0.8) -> list[float]:
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else smoothed[-1] * share + value * (1 - share))
    return smoothed


def _point(index: int, count: int, value: float, top: float, bottom: float) -> tuple[float, float]:
    x = MARGIN + (WIDTH - 2 * MARGIN) * index / max(count - 1, 1)
    level = math.log10(value) if value > 0 else bottom
    share = (top - max(min(level, top), bottom)) / max(top - bottom, 1e-9)
    return x, MARGIN + (HEIGHT - 2 * MARGIN) * share


def training_text(report: EditReport, spec: EditSpec) -> str:
    """A training's report as a table."""
    trained = report["training"]
    lines = [
        f"{spec['solver']}, {spec['budget']}: {trained['reason']}",
        f"concepts: {', '.join(c['concept'] for c in spec['concepts'])}; rank {trained['rank']}, seed {spec['seed']}",
    ]
    for ends, what in ((trained["erase"], "to erase"), (trained["preserve"], "to preserve")):
        if ends:
            first, last = ends
            lines.append(f"  loss {what}: {first:.4g} at the start, {last:.4g} at the end")
    if "note" in trained:
        lines.append(f"note: {trained['note']}")
    if not spec["kept"]:
        lines.append(
            "note: no prompts are preserved, so only the empty prompt was preserved; connect Preserve Concepts."
        )
    return "\n".join(lines)
