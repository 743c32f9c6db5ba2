"""``dev.py bench start``: what importing the pack adds to the host's start.

Each run is two fresh processes, one with the pack and one without it. Bytecode is cached, as from the second start on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 0.25  # what the pack may add
HEAVY = ("scipy", "sklearn", "peft", "diffusers", "pandas", "matplotlib", "skimage", "cv2", "accelerate", "datasets")
"""Packages that the pack may not import before a node needs them."""
PROBE = """
import asyncio, json, sys, time
host, pack = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, host)
clocks = lambda: (time.perf_counter(), time.process_time())
started = clocks()
import comfy.cli_args
comfy.cli_args.args.cpu = True
import nodes
asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
ready, before, count = clocks(), set(sys.modules), len(nodes.NODE_CLASS_MAPPINGS)
if pack:
    assert asyncio.run(nodes.load_custom_node(pack))
added = sorted({name.split(".")[0] for name in set(sys.modules) - before})
done = clocks()
seconds = {"host": ready[0] - started[0], "pack": done[0] - ready[0], "processor": done[1] - ready[1]}
print(json.dumps(seconds | {"nodes": len(nodes.NODE_CLASS_MAPPINGS) - count, "added": added}))
"""


class Start(NamedTuple):
    """One start: seconds of the host's nodes and of the pack, how many nodes it has, and the packages it imported.

    ``processor``: the pack's seconds of processor time, which other processes on the machine do not lengthen.
    """

    host: float
    pack: float
    processor: float
    nodes: int
    added: list[str]


def measured_start(host: Path, folder: Path, pack: Path | None = ROOT, *, cached: bool = True) -> Start:
    """Starts a process that imports the host's nodes, then the pack's.

    Args:
        folder: where it runs, and where all bytecode goes, which neither the host's folder nor the repository gets.
        cached: whether bytecode is kept. The first start compiles every package, so a single one is faster without.

    Raises:
        subprocess.CalledProcessError: something could not be imported.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    bytecode = {"PYTHONPYCACHEPREFIX": str(folder)} if cached else {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(host), str(pack or "")],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=environment | bytecode,
    )
    return Start(**json.loads(done.stdout.strip().splitlines()[-1]))


def heavy_packages(start: Start) -> list[str]:
    """The heavy packages that the pack, and not the host, has imported."""
    return [name for name in HEAVY if name in start.added]


def main(arguments: list[str]) -> int:
    """Prints the seconds of both sides. Returns 1 if the pack adds too much or imports something heavy."""
    parser = argparse.ArgumentParser(prog="dev.py bench start", description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    host = Path(os.environ["COMFYUI_PATH"])
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        measured_start(host, cache)  # fills the cache
        pairs = [(measured_start(host, cache, None), measured_start(host, cache)) for _ in range(options.runs)]
    alone = statistics.median(without.host for without, _ in pairs)
    both = statistics.median(start.host + start.pack for _, start in pairs)
    added, processor = ([getattr(start, name) for _, start in pairs] for name in ("pack", "processor"))
    print(f"host alone {alone:.2f} s, with the pack {both:.2f} s (medians of {options.runs})")
    span = f"{min(added):.2f} to {max(added):.2f}"
    print(f"the pack's {pairs[0][1].nodes} nodes: {statistics.median(added):.2f} s ({span})")
    print(f"their processor time: {statistics.median(processor):.2f} s, at most {MOST_SECONDS} s")
    if heavy := heavy_packages(pairs[0][1]):
        print(f"imported too early: {', '.join(heavy)}")
    return 1 if heavy or statistics.median(processor) > MOST_SECONDS else 0
