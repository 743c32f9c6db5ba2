"""Runs one graph as often as it is told to, with the pack of a given folder, and says what each run cost.

``python workbench/run.py boards.graph_worker PACK GRAPH`` prints a line when it is ready. For each seed that it reads,
it prints a line with the costs as JSON. It ends with its input.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import comfy.model_base
import folder_paths
import torch

from .timing import peak_of

nodes = importlib.import_module("nodes")  # the host's, not the pack's, which a type checker would find
execution = importlib.import_module("execution")
SAVING = ("SaveImage", "PreviewImage")
UNTIMED = ("ConceptsDemoModel", *SAVING)
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
    made: dict[str, Any] = json.loads(json.dumps(graph))
    for node in made.values():
        for name in ("seed", "noise_seed"):
            if isinstance(node["inputs"].get(name), int):
                node["inputs"][name] = seed
    return made


def one_run(graph: dict[str, Any], calls: Calls) -> dict[str, Any]:
    """Runs the graph from its first node on, and returns its costs, or what went wrong under ``failure``."""
    clock = Clock(graph)
    outputs = [number for number, node in graph.items() if node["class_type"] in SAVING]
    executor = execution.PromptExecutor(clock, execution.CacheType.CLASSIC, {"lru": 0, "ram": 0})
    grown = peak_of(lambda: executor.execute(graph, "bench", {"client_id": "bench"}, outputs))
    clock.turn_to("")
    costs = {"seconds": clock.seconds, "processor": clock.processor, "memory": grown}
    return {**costs, **calls.taken(), "failure": clock.failure}


def main(arguments: list[str]) -> int:
    """Loads the host's nodes and the pack, then runs the graph for each seed that is read."""
    pack, graph = arguments
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
    return 0
