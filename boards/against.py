"""``dev.py bench FAMILY --against REF``: what the graphs of a family cost here, over what they cost at another commit.

A second checkout is made. Both run the same graph in turn, pair by pair, each in a process of its own that has loaded
everything before. Graphs are the pack's contract, so any commit that knows a graph's nodes can run it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
API, PROGRAM = ROOT / "workflows" / "api", ROOT / "workbench" / "run.py"
FAMILIES = ("anagram", "compose", "conduct", "erase")
Costs = dict[str, Any]
"""What one run has cost: ``seconds``, ``processor`` (seconds of it), ``memory`` (MB it grew by), ``calls`` of the
model, their ``rows``, ``cells`` (rows times cells of the latent)."""


class Worker:
    """A process that runs one graph with the pack of one folder."""

    def __init__(self, pack: Path, graph: Path) -> None:
        self.pack = pack
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  until close
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "boards.graph_worker", str(pack), str(graph)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        self._line("ready")

    def run(self, seed: int) -> Costs:
        """One run with this seed.

        Raises:
            RuntimeError: the graph did not run; the message says why.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        costs: Costs = json.loads(self._line("costs "))
        if costs["failure"]:
            raise RuntimeError(f"the graph did not run with the pack in {self.pack}: {costs['failure']}")
        return costs

    def _line(self, start: str) -> str:
        """The rest of the next line that begins so; the host prints lines of its own."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line.removeprefix(start)
        self.process.wait()
        self.said.seek(0)
        last = "".join(self.said.readlines()[-5:])
        raise RuntimeError(f"the process with the pack in {self.pack} has ended, and said at last:\n{last}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()


@contextlib.contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """A folder with the pack as it was at a commit; the repository stays as it is.

    Raises:
        ValueError: there is no such commit.
    """
    with tempfile.TemporaryDirectory(prefix="concepts-against-") as folder:
        pack, archive = Path(folder, "pack"), Path(folder, "pack.tar")
        made = subprocess.run(
            ["git", "-C", str(ROOT), "archive", "-o", str(archive), f"{ref}^{{commit}}"], capture_output=True, text=True
        )
        if made.returncode:
            raise ValueError(f"git has no commit '{ref}' here ({made.stderr.strip()}); see 'git log --oneline'.")
        with tarfile.open(archive) as tar:
            tar.extractall(pack, filter="data")
        yield pack


def pairs_of(graph: Path, here: Path, there: Path, pairs: int) -> list[tuple[Costs, Costs]]:
    """The costs of so many runs by both packs in turn, after one of each that does not count."""
    with contextlib.closing(Worker(here, graph)) as ours, contextlib.closing(Worker(there, graph)) as theirs:
        ours.run(0), theirs.run(0)
        found = []
        for seed in range(1, pairs + 1):
            found.append((ours.run(seed), theirs.run(seed)))
            print(f"    {graph.stem}: {seed} of {pairs} pairs", flush=True)
        return found


def report(graph: str, ref: str, costs: Sequence[tuple[Costs, Costs]]) -> str:
    """Ratios of seconds pair by pair, and what does not depend on the machine, here and there."""
    told = [f"{_ratio('seconds', costs)} the seconds of {ref}", f"{_ratio('processor', costs)} its processor time"]
    ours, theirs = zip(*costs, strict=True)
    grown = (statistics.median(run["memory"] for run in side) for side in (ours, theirs))
    told.append("memory {:+.0f} MB, {:+.0f} there".format(*grown))
    counts = [f"{ours[0][what]} ({theirs[0][what]} there) {what}" for what in ("calls", "rows", "cells")]
    return f"{graph}, {len(costs)} pairs: {', '.join((*told, *counts))}"


def _ratio(what: str, costs: Sequence[tuple[Costs, Costs]]) -> str:
    ratios = [ours[what] / theirs[what] for ours, theirs in costs]
    return f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"


def main(arguments: list[str]) -> int:
    """Prints a line for each graph."""
    parser = argparse.ArgumentParser(prog="dev.py bench FAMILY --against REF")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--against", required=True, metavar="REF", help="a commit, tag or branch")
    parser.add_argument("--graph", action="append", help="only this graph of workflows/api (again for more)")
    parser.add_argument("--runs", type=int, default=5, help="pairs")
    options = parser.parse_args(arguments)
    there = {path.stem: path for path in sorted(API.glob(f"{options.family}_*.json"))}
    if unknown := [name for name in options.graph or () if name not in there]:
        parser.error(f"there is no graph '{unknown[0]}' of {options.family}; there are: {', '.join(there)}")
    try:
        with checkout(options.against) as pack:
            for name in options.graph or there:
                print(report(name, options.against, pairs_of(there[name], ROOT, pack, options.runs)), flush=True)
    except (ValueError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
