"""The archive that the registry gets: made by comfy-cli from a copy of the checkout, and what must not be in it.

The registry's scanner looks for words in every file, pages and scripts included, and holds back what has one. Its rules
are not public. ``WORDS`` has those that publishers were shown, and their near relatives.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAME: str = PROJECT["project"]["name"]  # the registry's, and the folder of who installs from it
LIMIT = 52_000_000  # bytes of the archive: two demo models with eight LoRAs each are 45 of them
WORDS = {
    "processes": r"subprocess|os\.(?:system|popen|exec|spawn|startfile|kill)|rm -rf",
    "network": r"socket|urllib|urlopen|aiohttp|httpx|http\.(?:client|server)|import requests|requests\.|ftplib|smtplib",
    "network, in a script too": r"\.(?:connect|bind|send|sendall|recv|listen)\(",
    "environment": r"os\.environ|environ\[|os\.getenv|os\.putenv|sys\.path",
    "code that is made while it runs": r"importlib|__import__|\beval\(|\bexec\(|\bcompile\(|new Function|__builtins__",
    "memory": r"ctypes|pickle|marshal|dill\b|shelve",
    "disguise": r"base64|\batob\(|\bbtoa\(|fromhex|codecs\.|cryptography|zlib",
    "databases": r"sqlite|psycopg|pymongo",
}
_PASSING = shutil.ignore_patterns(".git", "output", "__pycache__", ".*_cache", "node.zip")


def make(folder: Path) -> Path:
    """Makes the archive in a folder that is there, from what git would track; returns it.

    Raises:
        RuntimeError: comfy-cli refuses the pack; the message has its words.
    """
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, "pack")
        shutil.copytree(ROOT, copy, ignore=_PASSING)
        for command in (("init", "-q"), ("add", "-A")):  # comfy-cli packs what git tracks, less what .comfyignore names
            subprocess.run(["git", "-C", str(copy), *command], check=True, capture_output=True)
        for verb in ("validate", "pack"):
            comfy_node(verb, copy)
        return Path(shutil.move(copy / "node.zip", folder / "node.zip"))


def comfy_node(verb: str, pack: Path) -> str:
    """Runs ``comfy node VERB`` in the pack's folder and returns what it says.

    Raises:
        RuntimeError: it fails; the message has its words.
    """
    comfy = str(Path(sys.executable).parent / "comfy")
    environment = os.environ | {"DO_NOT_TRACK": "1", "COMFY_NO_WATCH": "1"}
    command = [comfy, "--skip-prompt", "node", verb]
    done = subprocess.run(command, cwd=pack, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"'comfy node {verb}' refuses the pack:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def findings(archive: Path) -> list[str]:
    """What the registry's scanner is known to hold back or is likely to: ``file:line: kind: word``."""
    found = []
    with zipfile.ZipFile(archive) as packed:
        for name in packed.namelist():
            if not name.endswith((".safetensors", ".jpg", ".webp", ".png")):
                found += [f"{name}:{rest}" for rest in _words(packed.read(name).decode())]
    return found


def _words(text: str) -> Iterator[str]:
    """``line: kind: word`` of everything in a text that the scanner may take for an attack."""
    for kind, pattern in WORDS.items():
        for match in re.finditer(pattern, text, re.IGNORECASE):
            yield f"{text.count(chr(10), 0, match.start()) + 1}: {kind}: {match[0]}"


def main(arguments: list[str]) -> int:
    """Makes the archive and says what is in it; 1 if something is that should not be."""
    parser = argparse.ArgumentParser(prog="dev.py pack", description=__doc__)
    parser.add_argument("folder", type=Path, help="where node.zip goes")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    archive = make(folder)
    with zipfile.ZipFile(archive) as packed:
        size = archive.stat().st_size
        print(f"{archive}: {len(packed.namelist())} files, {size / 1e6:.1f} MB (at most {LIMIT / 1e6:.0f})")
    found = findings(archive)
    print("\n".join(found) or "none of the words that the registry's scanner holds a pack back for")
    return int(bool(found) or size > LIMIT)
