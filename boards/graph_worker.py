"""Runs one graph as often as it is told to, with the pack of a given folder, and says what each run cost.

A program of its own: ``python graph_worker.py PACK GRAPH``, with the host's folder in ``COMFYUI_PATH``. It prints a
line when it is ready. For each seed that it reads, it prints a line with the costs as JSON. It ends with its input.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
UNTIMED = ("ConceptsDemoModel", "SaveImage", "PreviewImage")
"""Nodes that read the model or write files: what they take says nothing about a method."""


class Clock:
    """Takes the messages that the host would send to a page, and from them the seconds of the nodes that are timed."""

    client_id: str | None = None
    last_node_id: str | None = None

    def __init__(self, graph: dict[str, Any]) -> None:
        self.graph, self.seconds, self.processor, self.failure = graph, 0.0, 0.0, ""
        self._node, self._since = "", (0.0, 0.0)

    def send_sync(self, event: str, data: Any, *_: object) -> None:
        if event == "executing":
            self.turn_to(data["node"].split(".")[0])
        elif event == "execution_error":
            self.failure = f"{data['node_type']}: {data['exception_message'].strip()}"

    def turn_to(self, node: str) -> None:
        """From now on another node runs; '' is none."""
        now = time.perf_counter(), time.process_time()
        if self._node and self.graph[self._node]["class_type"] not in UNTIMED:
            self.seconds += now[0] - self._since[0]
            self.processor += now[1] - self._since[1]
        self._node, self._since = node, now


class Calls:
    """Counts the calls of models in this process, their rows, and rows times cells of the latent."""

    def __init__(self) -> None:
        import comfy.model_base

        self.calls = self.rows = self.cells = 0
        apply_model = comfy.model_base.BaseModel.apply_model

        def note(model: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.rows += len(x)
            self.cells += len(x) * x.shape[-2] * x.shape[-1]
            return apply_model(model, x, *args, **kwargs)

        comfy.model_base.BaseModel.apply_model = note

    def taken(self) -> dict[str, int]:
        """What was counted since the last time."""
        found = {"calls": self.calls, "rows": self.rows, "cells": self.cells}
        self.calls = self.rows = self.cells = 0
        return found


def seeded(graph: dict[str, Any], seed: int) -> dict[str, Any]:
    """The graph with this seed wherever a node has one."""
    made = json.loads(json.dumps(graph))
    for node in made.values():
        for name in ("seed", "noise_seed"):
            if isinstance(node["inputs"].get(name), int):
                node["inputs"][name] = seed
    return made


def memory(field: str) -> float:
    """A figure of this process in MB; 0 where the system has none."""
    if not FORGET.exists():
        return 0.0
    return next(int(line.split()[1]) / 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))


def one_run(graph: dict[str, Any], calls: Calls) -> dict[str, Any]:
    """Runs the graph from its first node on, and returns its costs, or what went wrong under ``failure``."""
    import execution

    gc.collect()
    before, clock = memory("VmRSS"), Clock(graph)
    if FORGET.exists():
        FORGET.write_text("5")  # the highest memory is what it is now
    outputs = [number for number, node in graph.items() if node["class_type"] in ("SaveImage", "PreviewImage")]
    executor = execution.PromptExecutor(clock, execution.CacheType.CLASSIC, {"lru": 0, "ram": 0})
    executor.execute(graph, "bench", {"client_id": "bench"}, outputs)
    clock.turn_to("")
    costs = {"seconds": clock.seconds, "processor": clock.processor, "memory": memory("VmHWM") - before}
    return {**costs, **calls.taken(), "failure": clock.failure}


def main(pack: str, graph: str) -> None:
    """Loads the host's nodes and the pack, then runs the graph for each seed that is read."""
    sys.argv = sys.argv[:1]  # the host reads the command line when it is imported
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [os.environ["COMFYUI_PATH"], *(entry for entry in sys.path if entry not in (here, ""))]
    import comfy.cli_args

    if os.environ.get("CONCEPTS_DEVICE", "cpu") == "cpu":
        comfy.cli_args.args.cpu = True
    import folder_paths
    import torch

    nodes = importlib.import_module("nodes")  # the host's, not the pack's, which a type checker would find
    torch.set_num_threads(1)
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    if not asyncio.run(nodes.load_custom_node(pack)):
        raise SystemExit(f"The pack in {pack} could not be imported.")
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        folder_paths.set_temp_directory(folder)
        told, calls = json.loads(Path(graph).read_text()), Calls()
        print("ready", flush=True)
        for line in sys.stdin:
            print("costs " + json.dumps(one_run(seeded(told, int(line)), calls)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
