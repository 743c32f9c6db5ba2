"""The small pictures of the template dialog: what each graph really made, not what it might have made."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

from PIL import Image

from .client import run_graph
from .gallery import API, CHECKPOINTS, UI
from .server import HostServer

SIDE = 256  # px
_MOST = 4  # pictures on one thumbnail
_QUALITY = 85


def thumbnail(pictures: list[bytes]) -> bytes:
    """Up to four pictures in a square, as JPEG.

    Raises:
        ValueError: no pictures.
    """
    if not pictures:
        raise ValueError("There is no picture to make a thumbnail of; end the graph with a Save Image.")
    shown = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures[:_MOST]]
    across = 1 if len(shown) == 1 else 2
    side = SIDE // across
    square = Image.new("RGB", (SIDE, SIDE), "white")
    for at, picture in enumerate(shown):
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        scale = side / max(picture.size)
        size = tuple(max(1, round(length * scale)) for length in picture.size)
        left, top = at % across * side + (side - size[0]) // 2, at // across * side + (side - size[1]) // 2
        square.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, top))
    target = io.BytesIO()
    square.save(target, "JPEG", quality=_QUALITY)
    return target.getvalue()


def shown_by(name: str) -> str:
    """The graph whose thumbnail a graph for one's own checkpoint shows: the one it is the twin of, on the demo model."""
    there = sorted(path.stem for path in API.glob("*.json"))
    stem = name.rsplit("_", 1)[0]
    return stem if stem in there else next((other for other in there if other.startswith(stem)), there[0])


def make(server: HostServer, names: list[str]) -> list[Path]:
    """Runs the graphs (all, if none is named) and writes their thumbnails, and those of their twins."""
    made = []
    for path in sorted(API.glob("*.json")):
        if names and path.stem not in names:
            continue
        pictures = asyncio.run(run_graph(server.url, json.loads(path.read_text())))
        data = thumbnail([picture.data for picture in pictures if picture.name.endswith(".png")])
        twins = [twin.stem for twin in CHECKPOINTS.glob("*.json") if shown_by(twin.stem) == path.stem]
        for name in (path.stem, *sorted(twins)):
            made.append(UI / f"{name}.jpg")
            made[-1].write_bytes(data)
    return made
