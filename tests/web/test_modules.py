"""The pure modules of the region editor, by Node's own test runner."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="Node.js is not here; with it (apt-get install nodejs) these tests run too")
@pytest.mark.parametrize("path", sorted(HERE.glob("*.test.js")), ids=lambda p: p.stem)
def test_a_module_of_the_editor(path):
    done = subprocess.run([NODE, "--test", str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
