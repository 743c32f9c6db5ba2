"""Folders of hosts that were killed are cleared by the next host; those that anybody uses or owns stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from comfyui_concepts.workbench import host_folder
from comfyui_concepts.workbench.host_folder import LOCK, PREFIX, claimed, clear_leftovers
from comfyui_concepts.workbench.server import HostServer

ROOT = Path(__file__).resolve().parent.parent.parent
DEAF = """import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[sys.argv.index('--base-directory') + 1], 'output', 'picture.png').touch()
time.sleep(600)
"""
OWNER = """import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from workbench.server import HostServer
with HostServer(pathlib.Path(sys.argv[2])) as server:
    print(server.pid, server.base, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A temporary folder of our own in the place of the system's."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def deaf_host(tmp_path):
    """A stand-in for a host that does not end when it is told to."""
    folder = tmp_path / "host"
    folder.mkdir()
    (folder / "main.py").write_text(DEAF)
    return folder


def _until(met):
    deadline = time.monotonic() + 30
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_hosts_folder_stays_while_the_host_runs_and_goes_with_the_next(temporary, deaf_host):
    command = [sys.executable, "-c", OWNER, str(ROOT), str(deaf_host)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    pid, base = owner.stdout.readline().split()
    host, base = int(pid), Path(base)
    try:
        _until((base / "output" / "picture.png").exists)
        assert clear_leftovers() == []  # both run
        owner.kill()
        owner.wait()
        assert clear_leftovers() == []  # the host still does
    finally:
        os.kill(host, signal.SIGKILL)
    assert base.exists()
    _until(lambda: _is_free(base))
    with HostServer(deaf_host) as server:
        assert not base.exists()
        assert server.base.exists()
        _until((server.base / "output" / "picture.png").exists)
        assert clear_leftovers() == []
        os.killpg(server.pid, signal.SIGKILL)
    assert list(temporary.iterdir()) == []


def _is_free(base):
    """Whether the lock can be had, without removing anything."""
    import fcntl

    with open(base / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_what_is_not_a_folder_of_ours_stays(temporary, tmp_path, monkeypatch):
    """Without a lock, a link to elsewhere, another name, or another user's."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / LOCK).touch()
    (temporary / f"{PREFIX}link").symlink_to(precious)
    for name in (f"{PREFIX}bare", "other"):
        (temporary / name).mkdir()
    (temporary / "other" / LOCK).touch()
    linked = temporary / f"{PREFIX}linked-lock"
    linked.mkdir()
    (linked / LOCK).symlink_to(precious / LOCK)
    left, lock = claimed()
    os.close(lock)
    with monkeypatch.context() as patch:
        patch.setattr(host_folder.os, "getuid", lambda: os.geteuid() + 1)
        assert clear_leftovers() == []
    assert clear_leftovers() == [left]
    assert {path.name for path in temporary.iterdir()} == {
        f"{PREFIX}link", f"{PREFIX}bare", "other", f"{PREFIX}linked-lock",
    }  # fmt: skip
    assert (precious / LOCK).exists()


def test_a_cleared_folder_takes_nothing_along_that_it_links_to(temporary, tmp_path):
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "nodes.py").touch()
    left, lock = claimed()
    (left / "custom_nodes").symlink_to(pack, target_is_directory=True)
    os.close(lock)
    assert clear_leftovers() == [left]
    assert (pack / "nodes.py").exists()
