"""``dev.py same BEFORE AFTER``: whether two folders that ``dev.py keep`` and the boards filled are equal bit for bit.

Times and embedded workflows may differ. Pixels, tensors, metadata, figures and the bytes of other files may not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from safetensors import safe_open

WORKFLOW = {"prompt", "workflow"}
"""The metadata in which the host embeds the graph of a file."""
TIME = re.compile(r"(^|[_ ])(seconds|minutes)([_ ]|$)")
"""Keys of a board whose values are times."""
MISSING = object()


def files_of(folder: Path) -> dict[str, Path]:
    """Every file below a folder, by its path in it."""
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


def first_difference(before: Path, after: Path) -> str | None:
    """What differs first between two folders: the file, the place in it, and both values. None if they are equal."""
    one, other = files_of(before), files_of(after)
    for name in sorted(one.keys() | other.keys()):
        for there, folder in ((one, before), (other, after)):
            if name not in there:
                return f"{name}: missing in {folder}"
        if difference := difference_of(one[name], other[name]):
            return f"{name}: {difference}"
    return None


def difference_of(before: Path, after: Path) -> str | None:
    """What differs first between two files of the same kind, or None."""
    return next(KINDS.get(before.suffix.lower(), _bytes)(before, after), None)


def _frames(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with Image.open(path) as picture:
        for frame in ImageSequence.Iterator(picture):
            yield frame.mode, np.asarray(frame)


def _pictures(before: Path, after: Path) -> Iterator[str]:
    """Pixels of every frame."""
    pairs = itertools.zip_longest(_frames(before), _frames(after))
    for number, (one, other) in enumerate(pairs):
        if one is None or other is None:
            yield f"frame {number} is missing in one of them"
        elif (one[0], one[1].shape) != (other[0], other[1].shape):
            yield f"frame {number}: {one[0]} {one[1].shape} and {other[0]} {other[1].shape}"
        elif len(places := np.argwhere(one[1] != other[1])):
            at = tuple(places[0].tolist())
            yield f"frame {number}, pixel {at}: {one[1][at]} and {other[1][at]}"


def _tensors(before: Path, after: Path) -> Iterator[str]:
    """Metadata without the workflow, then the tensors by their bits."""
    with safe_open(before, "pt") as one, safe_open(after, "pt") as other:
        metadata = [{k: v for k, v in (f.metadata() or {}).items() if k not in WORKFLOW} for f in (one, other)]
        yield from _values(metadata[0], metadata[1], "metadata")
        names = sorted({*one.keys(), *other.keys()})
        for name in names:
            if name not in one.keys() or name not in other.keys():  # noqa: SIM118  a file, not a dictionary
                yield f"tensor {name} is missing in one of them"
                continue
            yield from _tensor(name, one.get_tensor(name), other.get_tensor(name))


def _tensor(name: str, one: torch.Tensor, other: torch.Tensor) -> Iterator[str]:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        yield f"tensor {name}: {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
        return
    bits = [t.contiguous().reshape(-1, 1).view(torch.uint8) for t in (one, other)]
    if len(places := torch.nonzero((bits[0] != bits[1]).any(1))):
        at = np.unravel_index(int(places[0]), one.shape)
        place = tuple(int(i) for i in at)
        yield f"tensor {name} at {place}: {one[place].item()!r} and {other[place].item()!r}"


def _boards(before: Path, after: Path) -> Iterator[str]:
    """Every value of two JSON files but times."""
    yield from _values(json.loads(before.read_text()), json.loads(after.read_text()), "")


def _values(one: Any, other: Any, place: str) -> Iterator[str]:
    """The places at which two values differ, from dictionaries and lists down to their leaves."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [k for k in {**one, **other} if not TIME.search(k)]:
            yield from _values(one.get(key, MISSING), other.get(key, MISSING), f"{place}.{key}".lstrip("."))
    elif isinstance(one, list) and isinstance(other, list):
        for number, (a, b) in enumerate(itertools.zip_longest(one, other, fillvalue=MISSING)):
            yield from _values(a, b, f"{place}[{number}]")
    elif MISSING in (one, other):
        yield f"{place} is missing in one of them"
    elif repr(one) != repr(other):  # NaN equals itself here
        yield f"{place}: {one!r} and {other!r}"


def _bytes(before: Path, after: Path) -> Iterator[str]:
    one, other = (np.frombuffer(p.read_bytes(), np.uint8) for p in (before, after))
    shared = min(len(one), len(other))
    if len(places := np.flatnonzero(one[:shared] != other[:shared])):
        yield f"byte {places[0]}: {one[places[0]]} and {other[places[0]]}"
    elif len(one) != len(other):
        yield f"{len(one)} bytes and {len(other)} bytes"


KINDS: dict[str, Callable[[Path, Path], Iterator[str]]] = {
    **dict.fromkeys((".png", ".webp", ".jpg", ".gif"), _pictures),
    **dict.fromkeys((".latent", ".safetensors"), _tensors),
    ".json": _boards,
}
"""How files of a suffix are compared; all others by their bytes."""


def main(arguments: list[str]) -> int:
    """Prints the first difference and returns 1, or how many files are equal and returns 0."""
    parser = argparse.ArgumentParser(prog="dev.py same", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    for folder in (options.before, options.after):
        if not folder.is_dir() or not files_of(folder):
            print(f"same: There are no files in {folder}; fill it with: dev.py keep {folder}", file=sys.stderr)
            return 2
    if difference := first_difference(options.before, options.after):
        print(difference)
        return 1
    print(f"{len(files_of(options.before))} files are the same")
    return 0
