"""Small pictures side by side, each with a title: the preview of a node while it works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

from .region_picture import COLOURS, TINT

SIDE = 192  # px, the longer side of a panel: titles stay legible, and a row of four fits the host's previews
GAP = 4
_COLUMNS = 4
_LINE, _LETTERS = 16, 11  # px
_PAPER, _INK = (23, 24, 28), (220, 220, 220)


class Panel(NamedTuple):
    """A picture (h, w, 3) in 0..1, its title, and whether a row begins with it."""

    picture: torch.Tensor
    title: str = ""
    begins: bool = False


class AttentionSnapshot(NamedTuple):
    """Attention maps, (concepts, h, w) of any positive scale, and the sampling percent (0 to 1) they are from."""

    maps: torch.Tensor
    percent: float


def side_by_side(panels: Sequence[Panel], side: int = SIDE) -> torch.Tensor:
    """All panels in one picture, (height, width, 3) in 0..1, up to four per row.

    Args:
        side: of each panel's longer side, in pixels.

    Raises:
        ValueError: no panels.
    """
    if not panels:
        raise ValueError("There is no picture to show; give at least one panel.")
    tiles = [_tile(panel.picture, side) for panel in panels]
    across, down = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    places = _places(panels)
    columns, rows = (max(place[axis] for place in places) + 1 for axis in (0, 1))
    head = _LINE if any(panel.title for panel in panels) else 0
    sheet = Image.new("RGB", (columns * (across + GAP) - GAP, rows * (head + down + GAP) - GAP), _PAPER)
    for (column, row), panel, tile in zip(places, panels, tiles, strict=True):
        left, top = column * (across + GAP), row * (head + down + GAP)
        if head:
            sheet.paste(_words(panel.title, across), (left, top))
        sheet.paste(tile, (left, top + head))
    return torch.from_numpy(numpy.array(sheet, numpy.float32) / 255)


def _places(panels: Sequence[Panel]) -> list[tuple[int, int]]:
    """Column and row of each panel: a row ends when it is full, or where the next panel begins one."""
    places: list[tuple[int, int]] = []
    for panel in panels:
        column, row = places[-1] if places else (-1, 0)
        ends = bool(places) and (panel.begins or column == _COLUMNS - 1)
        places.append((0, row + 1) if ends else (column + 1, row))
    return places


def tinted(picture: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """A picture (h, w, 3) with each of the masks (masks, h', w') in 0..1 over it, in the colour of its place."""
    for at, mask in enumerate(_on(picture, masks)):
        colour = torch.tensor(COLOURS[at % len(COLOURS)]) / 255
        picture = torch.lerp(picture, colour.expand_as(picture), (TINT * mask.clamp(0, 1))[..., None])
    return picture


def heat(picture: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """A picture (h, w, 3) lit where a map (h', w') of any positive scale is high, dark where it is low."""
    light = _on(picture, attention[None])[0]
    light = (light - light.min()) / (light.max() - light.min()).clamp_min(1e-8)
    return picture * (0.15 + 0.85 * light[..., None])


def concept_panels(picture: torch.Tensor, maps: torch.Tensor, names: Sequence[str]) -> list[Panel]:
    """The panels of a run with several concepts: the picture under all their masks or attention maps, then under each.

    Args:
        picture: (h, w, 3) in 0..1.
        maps: masks in 0..1, or attention maps, (concepts, h', w').
    """
    peaks = maps.flatten(1).amax(1).clamp_min(1e-8)[:, None, None]
    alone = [Panel(heat(picture, one), name) for one, name in zip(maps, names, strict=True)]
    return [Panel(tinted(picture, maps / peaks), "all"), *alone]


def attention_panels(picture: torch.Tensor, attention: AttentionSnapshot, names: Sequence[str]) -> list[Panel]:
    """A separate row with the concepts' attention. Its title has the percent: it may be older than the picture."""
    panels = concept_panels(picture, attention.maps, names)
    titled = f"attention at {100 * attention.percent:.0f} %: "
    return [panel._replace(title=titled + panel.title, begins=at == 0) for at, panel in enumerate(panels)]


def _on(picture: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Maps (n, h', w') at the size of a picture, on its device."""
    sized = maps.detach().to(picture.device, torch.float32)[:, None]
    return torch.nn.functional.interpolate(sized, picture.shape[:2], mode="bilinear", align_corners=False)[:, 0]


def _tile(picture: torch.Tensor, side: int) -> Image.Image:
    """A picture scaled so that its longer side is ``side``."""
    image = Image.fromarray((picture.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy(), "RGB")
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _words(title: str, width: int) -> Image.Image:
    """One line of text, cut at a panel's width."""
    line = Image.new("RGB", (width, _LINE), _PAPER)
    text = title.encode("utf-8", "replace").decode("utf-8").replace("\n", " ")
    ImageDraw.Draw(line).text((2, 1), text, _INK, ImageFont.load_default(_LETTERS))
    return line
