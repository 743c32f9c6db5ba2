"""Outside checkers of the pack, in the versions of ``requirements-checkers.txt``. Standard library only.

They have a small environment of their own in the cache: a new one among them does not rebuild the large environment,
and none of them can change what the host runs on. comfy-cli is in the large one: tests drive the host with it too.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

WANTED = Path(__file__).resolve().parent.parent / "requirements-checkers.txt"
CACHE = Path(os.environ.get("CONCEPTS_CACHE", Path.home() / ".cache" / "comfyui-concepts"))  # as in dev.py


def checkers() -> Path:
    """The folder of their commands; installs them when they are first asked for.

    Raises:
        RuntimeError: they cannot be installed; the message has pip's words.
    """
    recipe = sys.version + WANTED.read_text()
    folder = CACHE / f"checkers-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one test run ask at the same time
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run(sys.executable, "-m", "venv", str(folder))
            _run(str(folder / "bin" / "python"), "-m", "pip", "install", "--no-deps", "-r", str(WANTED))
            (folder / "complete").touch()
    return folder / "bin"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The outside checkers cannot be installed: {' '.join(command)}\n{done.stderr[-2000:]}")
