"""``dev.py keep DIR``: all that the shipped graphs make, latents included, for ``dev.py same BEFORE AFTER``."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from .client import GraphFailed, run_graph
from .gallery import chosen
from .server import HostFailed, HostServer


def with_latents_saved(graph: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The graph with a Save Latent behind every latent that a node of it returns."""
    saving = dict(graph)
    for node, content in graph.items():
        for slot, kind in enumerate(object_info[content["class_type"]]["output"]):
            if kind == "LATENT":
                inputs = {"samples": [node, slot], "filename_prefix": f"latents/{node.replace(':', '-')}_{slot}"}
                saving[f"keep-{node}-{slot}"] = {"class_type": "SaveLatent", "inputs": inputs}
    return saving


async def keep_graph(server: HostServer, path: Path, folder: Path) -> int:
    """Runs a graph and moves every file it wrote into ``folder``; returns how many there are."""
    made = server.base / "output"
    graph = with_latents_saved(json.loads(path.read_text()), server.get("/object_info"))
    await run_graph(server.url, graph)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    for entry in made.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return sum(p.is_file() for p in folder.rglob("*"))


def main(arguments: list[str]) -> int:
    """Exit code 0 only if every graph ran."""
    parser = argparse.ArgumentParser(prog="dev.py keep", description=__doc__)
    parser.add_argument("folder", type=Path, help="where what they make goes, a folder per graph")
    parser.add_argument("--workflow", action="append", default=[], help="only this graph (may be given several times)")
    options = parser.parse_args(arguments)
    try:
        with HostServer(Path(os.environ["COMFYUI_PATH"])) as server:
            server.wait()
            for path in chosen(options.workflow):
                count = asyncio.run(keep_graph(server, path, options.folder / path.stem))
                print(f"{path.stem}: {count} files", flush=True)
    except (ValueError, OSError, HostFailed, GraphFailed) as error:
        print(f"keep: {error}", file=sys.stderr)
        return 1
    return 0
