"""Outside checkers of the pack, in the versions of ``requirements-checkers.txt``. Standard library only.

They have a small environment of their own in the cache: a new one among them does not rebuild the large environment,
and none of them can change what the host runs on. comfy-cli is in the large one: tests drive the host with it too.
lycoris-lora is here without its torch: a test imports it into a process that has one.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from .cache import CACHE, locked, make_venv, run

WANTED = Path(__file__).resolve().parent.parent / "requirements-checkers.txt"


def checkers() -> Path:
    """The folder of their commands; installs them when they are first asked for.

    Raises:
        SetupError: they cannot be installed; the message has pip's words.
    """
    recipe = sys.version + WANTED.read_text()
    folder = CACHE / f"checkers-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with locked(folder.name):  # processes of one test run ask at the same time
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            run([*make_venv(folder), "install", "--no-deps", "-r", str(WANTED)], "installing the outside checkers")
            (folder / "complete").touch()
    return folder / "bin"
