"""The temporary folder of a host, and the removal of what killed hosts left. Standard library only.

A file in the folder is locked before it gets its name. The process that made the folder and the host that inherits the
file hold it open. The system releases the lock however they end: a folder whose lock can be taken is not in use.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "concepts-host-"
LOCK = "in-use"


def claimed() -> tuple[Path, int]:
    """A new folder, and the descriptor of its lock: give it to the host too, and close it when the folder is gone."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    starting = folder / "starting"
    lock = os.open(starting, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    starting.rename(folder / LOCK)  # no other process sees the name before it is locked
    return folder, lock


def clear_leftovers() -> list[Path]:
    """Removes and returns the folders of this user's hosts that no process uses. Those without a lock stay."""
    there = Path(tempfile.gettempdir()).glob(f"{PREFIX}*")
    return [folder for folder in there if _is_ours(folder) and _cleared(folder)]


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder of this user: the system's temporary folder may hold anything, links to elsewhere too."""
    try:
        about = folder.lstat()
    except OSError:
        return False  # it has just gone
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()


def _cleared(folder: Path) -> bool:
    """Removes a folder unless somebody has its lock."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True
