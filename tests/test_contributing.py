"""CONTRIBUTING's list of rooms against the folders that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = re.search(r"^## Rooms\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL).group(1)
NAMED = {name.rstrip("/") for name in re.findall(r"`([\w/]+/)`", ROOMS)}
SKIPPED = ("output", ".", "node_modules")


def _folders_with_python() -> set[str]:
    """Folders below the root that hold Python files, by their path."""
    folders = {path.parent.relative_to(ROOT) for path in ROOT.rglob("*.py")}
    return {f.as_posix() for f in folders if f.parts and not any(part.startswith(SKIPPED) for part in f.parts)}


def test_every_folder_with_python_files_is_named():
    rooms = {f for f in _folders_with_python() if not f.startswith("tests/")}
    assert not rooms - NAMED, f"CONTRIBUTING, 'Rooms', does not name {sorted(rooms - NAMED)}"


def test_every_folder_that_is_named_exists():
    assert len(NAMED) > 20
    assert not {name for name in NAMED if not (ROOT / name).is_dir()}


def test_the_tests_have_the_same_rooms():
    tested = {f.removeprefix("tests/") for f in _folders_with_python() if f.startswith("tests/")}
    assert not {f for f in tested if f not in NAMED and f"tests/{f}" not in NAMED}
