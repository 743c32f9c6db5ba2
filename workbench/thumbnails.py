"""The small pictures of the template dialog and of the help pages: what each graph really made."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from .client import run_graph
from .gallery import API, CHECKPOINTS, UI
from .server import HostServer
from .twins import TWINS

SIDE = 256  # px
_BY_HAND = {"anagram_sd15": "anagram_turn"}  # twins that no source makes
_PAPER = (23, 24, 28)
_MOST = 4  # pictures on one thumbnail
_QUALITY = 85
_STRIP = 560  # px
DOCS = UI.parent / "web" / "docs" / "pictures"
RECORD = DOCS / "made_from.json"
"""By name, the digest of each graph as it was when its pictures were made."""


def thumbnail(pictures: list[bytes]) -> bytes:
    """Up to four pictures in a square, as JPEG.

    Raises:
        ValueError: no pictures.
    """
    if not pictures:
        raise ValueError("There is no picture to make a thumbnail of; end the graph with a Save Image.")
    shown = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]
    whole = [picture for picture in shown if max(picture.size) <= 2 * min(picture.size)]
    shown = whole[:_MOST] or [_beginning(shown[0])]  # no long sheets among pictures
    across = 1 if len(shown) == 1 else 2
    side = SIDE // across
    rows = -(-len(shown) // across)
    spare = (SIDE - rows * side) // 2  # two pictures are in the middle
    square = Image.new("RGB", (SIDE, SIDE), _PAPER)
    for at, picture in enumerate(shown):
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        scale = side / max(picture.size)
        width, height = (max(1, round(length * scale)) for length in picture.size)
        left, top = at % across * side + (side - width) // 2, spare + at // across * side + (side - height) // 2
        square.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    target = io.BytesIO()
    square.save(target, "JPEG", quality=_QUALITY)
    return target.getvalue()


def _beginning(sheet: Image.Image) -> Image.Image:
    """The first square of a long sheet: what it shows as best."""
    side = min(sheet.size)
    return sheet.crop((0, 0, side, side))


def strip(pictures: list[bytes]) -> bytes:
    """What a help page shows of a graph: its long sheet if it made one, else up to four pictures in a row, as JPEG."""
    shown = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]
    sheets = [picture for picture in shown if max(picture.size) > 2 * min(picture.size)]
    if sheets:
        row = sheets[0]
        row.thumbnail((_STRIP, _STRIP), Image.Resampling.LANCZOS)
    else:
        side = _STRIP // _MOST
        row = Image.new("RGB", (side * len(shown[:_MOST]), side), "white")
        for at, picture in enumerate(shown[:_MOST]):
            picture.thumbnail((side, side), Image.Resampling.LANCZOS)
            row.paste(picture, (at * side, 0))
    target = io.BytesIO()
    row.save(target, "JPEG", quality=_QUALITY)
    return target.getvalue()


def shown_by(name: str) -> str:
    """The graph whose thumbnail a graph for the user's checkpoint shows: its source, on the demo model."""
    return TWINS[name].source if name in TWINS else _BY_HAND.get(name, name)


def digest(graph: dict[str, Any]) -> str:
    """What of a graph in API format may change its pictures, in 16 digits: the titles of its nodes do not."""
    nodes = {identity: (node["class_type"], node["inputs"]) for identity, node in graph.items()}
    return hashlib.sha256(json.dumps(nodes, sort_keys=True).encode()).hexdigest()[:16]


def outdated() -> list[str]:
    """The graphs that are new or have changed since their pictures were made."""
    now = {path.stem: digest(json.loads(path.read_text())) for path in API.glob("*.json")}
    then = json.loads(RECORD.read_text())
    return sorted(name for name, of_now in now.items() if then.get(name) != of_now)


def _remember(name: str, graph: dict[str, Any]) -> None:
    """Writes into the record that a graph's pictures are of its present state; graphs that are gone leave it."""
    then = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    there = {path.stem for path in API.glob("*.json")}
    kept = {known: value for known, value in then.items() if known in there} | {name: digest(graph)}
    RECORD.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


def make(server: HostServer, names: list[str]) -> list[Path]:
    """Runs the graphs (all, if none is named) and writes the thumbnails of them and of their twins, and the record."""
    made = []
    for path in sorted(API.glob("*.json")):
        if names and path.stem not in names:
            continue
        graph = json.loads(path.read_text())
        pictures = asyncio.run(run_graph(server.url, graph))
        still = [picture.data for picture in pictures if picture.name.endswith(".png")]
        data = thumbnail(still)
        DOCS.mkdir(exist_ok=True)
        made.append(DOCS / f"{path.stem}.jpg")
        made[-1].write_bytes(strip(still))
        for film in (picture for picture in pictures if picture.name.endswith(".webp")):
            made.append(DOCS / f"{path.stem}.webp")
            made[-1].write_bytes(film.data)
        twins = [twin.stem for twin in CHECKPOINTS.glob("*.json") if shown_by(twin.stem) == path.stem]
        for name in (path.stem, *sorted(twins)):
            made.append(UI / f"{name}.jpg")
            made[-1].write_bytes(data)
        _remember(path.stem, graph)
    return made
