"""What is made once and kept in a folder of the user: the host, pages, environments. Standard library only.

``dev.py`` imports it before there is an environment.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:
    sys.exit("dev.py needs Linux or macOS (on Windows: WSL). The nodes themselves run wherever ComfyUI does.")

CACHE = Path(os.environ.get("CONCEPTS_CACHE", Path.home() / ".cache" / "comfyui-concepts"))


class SetupError(RuntimeError):
    """Something the person at the keyboard can mend; shown without a traceback."""


def say(text: str) -> None:
    """A line for the person who waits."""
    print(f"dev.py: {text}", flush=True)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time per thing made in the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another dev.py that is making {name} …")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run(command: list[str], doing: str, **options: object) -> None:
    """Runs a set-up command, saying what it is for; its last lines are shown if it fails."""
    say(f"{doing} …")
    started = time.time()
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(command, stdout=output, stderr=output, **options)  # type: ignore[call-overload]
        output.seek(0)
        lines = output.read().strip().splitlines()
    if done.returncode:
        raise SetupError(f"{doing} failed:\n  " + "\n  ".join(lines[-12:]) + f"\nThe command was: {' '.join(command)}")
    say(f"  done in {time.time() - started:.0f} s")


def make_venv(folder: Path) -> list[str]:
    """A fresh virtual environment; returns the command that is its pip."""
    try:
        run([sys.executable, "-m", "venv", str(folder)], "making a virtual environment")
    except SetupError as error:
        raise SetupError(f"{error}\nOn Debian and Ubuntu, 'apt install python3-venv' is what it lacks.") from error
    return [str(folder / "bin" / "python"), "-m", "pip", "--no-input", "--disable-pip-version-check"]
