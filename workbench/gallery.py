"""``dev.py demo``: runs the graphs of ``workflows/api`` in a headless host and saves what they make."""

from __future__ import annotations

import argparse
import asyncio
import difflib
import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..demo.judge import Judge
from .client import GraphFailed, Picture, Progress, run_graph
from .server import HostFailed, HostServer

ROOT = Path(__file__).resolve().parent.parent
API, UI = ROOT / "workflows" / "api", ROOT / "workflows"
LONG, WIDEST = 1.6, 256  # what is longer or larger than any single picture of the demo model is a sheet
CHECKPOINTS = API / "checkpoints"  # graphs for models of the user's own: templates too, but nothing here can run them


def _say(text: str) -> None:
    print(text, flush=True)


def _progress_of(graph: dict) -> Progress:
    """Says how far a node is, by its title."""

    def show(node: str, value: float, maximum: float) -> None:
        line = f"    {title_of(graph, node)}: {value:.0f}/{maximum:.0f}"
        if sys.stdout.isatty():
            print(f"\r{line} ", end="\n" if value >= maximum else "", flush=True)
        elif value >= maximum:
            _say(line)

    return show


def title_of(graph: dict, node: str) -> str:
    """The title of a node as a person sees it, or its class; of a node inside a subgraph the class of that."""
    there = graph.get(node) or graph.get(node.split(":")[0]) or {}
    return there.get("_meta", {}).get("title") or there.get("class_type", f"node {node}")


def prompts_in(graph: dict) -> str:
    """The prompts of a graph, one after the other, the empty ones left out."""
    texts = [
        n["inputs"].get(k) for n in graph.values() for k in ("text", "prompt") if n["class_type"] != "PrimitiveString"
    ]
    return "; ".join(dict.fromkeys(t.strip() for t in texts if isinstance(t, str) and t.strip()))


def chosen(names: list[str]) -> list[Path]:
    """The graphs to run.

    Raises:
        ValueError: a name that is not there; the message lists what is.
    """
    there = {path.stem: path for path in sorted(API.glob("*.json"))}
    if not there:
        raise ValueError("There is no graph in workflows/api; get the folder back with 'git checkout -- workflows'.")
    for name in names:
        if name in {path.stem for path in CHECKPOINTS.glob("*.json")}:
            raise ValueError(
                f"The workflow '{name}' needs a checkpoint of yours; open it in ComfyUI and choose one there."
            )
        if name not in there:
            near = difflib.get_close_matches(name, there, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"There is no workflow '{name}'; {hint}there are {', '.join(there)}.")
    return [there[name] for name in names or there]


def save(folder: Path, graph: str, index: int, picture: Picture) -> Path:
    """Writes a picture as it came, its embedded workflow included."""
    path = folder / f"{graph}_{index:02d}{Path(picture.name).suffix}"
    path.write_bytes(picture.data)
    return path


def seen(judge: Judge, picture: Picture) -> str:
    """What the judge sees in a picture; films and sheets of several pictures are not for it."""
    image = Image.open(io.BytesIO(picture.data))
    if (frames := getattr(image, "n_frames", 1)) > 1:
        return f"a film of {frames} frames"
    if max(image.size) > LONG * min(image.size) or max(image.size) > WIDEST:
        return f"a sheet of {image.size[0]} × {image.size[1]} pixels"
    return judge.describe(torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The pictures cannot go to {folder} ({error.strerror}); choose another folder with --out."
        ) from error


async def run_all(server: HostServer, graphs: list[Path], folder: Path, judge: Judge) -> int:
    """Runs the graphs one after the other; returns how many failed."""
    failed = 0
    for path in graphs:
        graph, template = json.loads(path.read_text()), UI / path.name
        _say(f"{path.stem}\n    prompt: {prompts_in(graph)}")
        workflow = json.loads(template.read_text()) if template.exists() else None
        started = time.monotonic()
        try:
            pictures = await run_graph(server.url, graph, workflow=workflow, progress=_progress_of(graph))
            if not pictures:
                raise GraphFailed("it ran, and saved no picture; end it with a Save Image")
        except GraphFailed as error:
            server.check()
            _say(f"    failed: {error}")
            failed += 1
            continue
        _say(f"    {time.monotonic() - started:.1f} s, {len(pictures)} pictures")
        for index, picture in enumerate(pictures):
            title = graph.get(picture.node, {}).get("_meta", {}).get("title")
            shown = f"{save(folder, path.stem, index, picture)}{f' ({title})' if title else ''}"
            _say(f"    {shown}: {seen(judge, picture)}")
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
        _make_folder(options.out)
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
    _say(f"{len(graphs) - failed} of {len(graphs)} graphs ran; the pictures are in {options.out.absolute()}")
    return 1 if failed else 0
