"""``dev.py demo``: runs the graphs of ``workflows/api`` in a headless host and saves what they make."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .client import GraphFailed, Picture, run_graph
from .judge import Judge
from .server import HostFailed, HostServer

ROOT = Path(__file__).resolve().parent.parent
API, UI = ROOT / "workflows" / "api", ROOT / "workflows"
CHECKPOINTS = API / "checkpoints"  # graphs for models of the user's own: templates too, but nothing here can run them


def _say(text: str) -> None:
    print(text, flush=True)


def _show_progress(node: str, value: float, maximum: float) -> None:
    if sys.stdout.isatty():
        print(f"\r    node {node}: {value:.0f}/{maximum:.0f} ", end="\n" if value >= maximum else "", flush=True)
    elif value >= maximum:
        _say(f"    node {node}: {value:.0f}/{maximum:.0f}")


def chosen(names: list[str]) -> list[Path]:
    """The graphs to run.

    Raises:
        ValueError: a name that is not there; the message lists what is.
    """
    there = {path.stem: path for path in sorted(API.glob("*.json"))}
    if not there:
        raise ValueError("There is no graph in workflows/api; get the folder back with 'git checkout -- workflows'.")
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"There is no workflow '{unknown[0]}'; there are {', '.join(there)}.")
    return [there[name] for name in names or there]


def save(folder: Path, graph: str, index: int, picture: Picture) -> Path:
    """Writes a picture as it came, its embedded workflow included."""
    path = folder / f"{graph}_{index:02d}.png"
    path.write_bytes(picture.data)
    return path


def seen(judge: Judge, picture: Picture) -> str:
    """What the judge sees in a picture."""
    pixels = np.asarray(Image.open(io.BytesIO(picture.data)).convert("RGB"), np.float32) / 255
    return judge.describe(torch.from_numpy(pixels))


async def run_all(server: HostServer, graphs: list[Path], folder: Path, judge: Judge) -> int:
    """Runs the graphs one after the other; returns how many failed."""
    failed = 0
    for path in graphs:
        _say(f"{path.stem}")
        template = UI / path.name
        workflow = json.loads(template.read_text()) if template.exists() else None
        started = time.monotonic()
        try:
            pictures = await run_graph(
                server.url, json.loads(path.read_text()), workflow=workflow, progress=_show_progress
            )
            if not pictures:
                raise GraphFailed("it ran, and saved no picture; end it with a Save Image")
        except GraphFailed as error:
            server.check()
            _say(f"    failed: {error}")
            failed += 1
            continue
        _say(f"    {time.monotonic() - started:.1f} s, {len(pictures)} pictures")
        for index, picture in enumerate(pictures):
            _say(f"    {save(folder, path.stem, index, picture)}: {seen(judge, picture)}")
    return failed


def main(arguments: list[str]) -> int:
    """Exit code 0 only if every graph ran."""
    parser = argparse.ArgumentParser(prog="dev.py demo")
    parser.add_argument("--workflow", action="append", default=[], help="only this graph (may be given several times)")
    parser.add_argument("--out", type=Path, default=ROOT / "output", help="where the pictures go (default: output/)")
    parser.add_argument("--port", type=int, help="the host's port (default: a free one)")
    options = parser.parse_args(arguments)
    try:
        graphs, judge = chosen(options.workflow), Judge.load()
        options.out.mkdir(parents=True, exist_ok=True)
        with HostServer(Path(os.environ["COMFYUI_PATH"]), options.port) as server:
            _say(f"starting the host on {server.url} …")
            started = time.monotonic()
            server.wait()
            _say(f"    up in {time.monotonic() - started:.0f} s")
            failed = asyncio.run(run_all(server, graphs, options.out, judge))
    except KeyboardInterrupt:
        _say("\nstopped; the host has been ended")
        return 130
    except (ValueError, HostFailed, RuntimeError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    _say(f"{len(graphs) - failed} of {len(graphs)} graphs ran; the pictures are in {options.out}")
    return 1 if failed else 0
