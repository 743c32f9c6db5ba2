"""The commands of the README when something is wrong, and what they leave behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from comfyui_concepts.workbench import gallery
from comfyui_concepts.workbench.server import HostFailed, HostServer, free_port

ROOT = Path(__file__).resolve().parent.parent.parent
BUSY = """import http.server, sys, time

class Host(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != '/system_stats':
            time.sleep(600)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{}')

address = '127.0.0.1', int(sys.argv[sys.argv.index('--port') + 1])
http.server.ThreadingHTTPServer(address, Host).serve_forever()
"""


def _dev(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "dev.py"), "--python", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


@pytest.fixture
def busy_host(host_path, tmp_path):
    """A stand-in for a host that is up and does not come to an end: a real one takes 12 s of processor time to start.

    The demo's own process imports the real one, from where it is.
    """
    folder = tmp_path / "host"
    folder.mkdir()
    for name in ("comfy", "comfy_api", "requirements.txt"):
        (folder / name).symlink_to(host_path / name)
    (folder / "main.py").write_text(BUSY)
    return folder


def test_a_wrong_host_folder_is_named(tmp_path):
    done = _dev("demo", COMFYUI_PATH=str(tmp_path))
    assert done.returncode == 2
    assert f"COMFYUI_PATH is {tmp_path}, and that is not a ComfyUI folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_workflow_is_answered_with_the_known_ones(capsys):
    assert gallery.main(["--workflow", "nonsense"]) == 1
    assert "There is no workflow 'nonsense'; there are anagram_" in capsys.readouterr().err


def test_an_unknown_family_is_answered_with_the_known_ones():
    done = _dev("score", "nonsense")
    assert done.returncode == 2
    assert "nothing called 'nonsense' to score; choose one: score anagram | " in done.stderr
    assert "| model" in done.stderr


def test_an_interpreter_without_torch_is_refused(tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(ROOT / "dev.py"), "--python", str(bare), "demo"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "cannot import torch" in done.stderr


def test_a_taken_port_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = _dev("demo", "--port", str(port))
    assert done.returncode == 1
    assert f"Port {port} is taken by another program; leave --port out" in done.stderr


def test_a_port_that_is_none_is_named(capsys, tmp_path):
    assert gallery.main(["--port", "70000", "--out", str(tmp_path)]) == 1
    assert "There is no port 70000" in capsys.readouterr().err


def test_a_host_without_requirements_is_named(tmp_path):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    command = [sys.executable, str(ROOT / "dev.py"), "demo"]
    environment = os.environ | {"COMFYUI_PATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    assert "has no requirements.txt" in done.stderr


@pytest.mark.slow
def test_a_test_run_names_the_host_and_the_torch_it_ran_on(host_path):
    done = _dev("test", "tests/methods/test_choices.py")
    assert done.returncode == 0, done.stdout + done.stderr
    version = re.search(r'__version__ = "(.+)"', (host_path / "comfyui_version.py").read_text()).group(1)
    assert f"ran on ComfyUI {version} in {host_path}, torch {torch.__version__}" in done.stdout


@pytest.mark.slow
def test_a_host_does_not_outlive_one_who_is_killed(busy_host, tmp_path):
    """The net below: nobody could end it in order."""
    if sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent has died")
    port = free_port()
    command = [
        sys.executable,
        str(ROOT / "workbench" / "run.py"),
        "workbench.gallery",
        "--port",
        str(port),
        "--out",
        str(tmp_path),
    ]
    environment = os.environ | {"COMFYUI_PATH": str(busy_host)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("    up in"):
            break
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while _listening(port) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _listening(port)


def test_a_host_that_fails_to_start_shows_its_last_lines(tmp_path, host_path):
    for name in ("comfy", "comfy_api", "requirements.txt"):
        (tmp_path / name).symlink_to(host_path / name)
    (tmp_path / "main.py").write_text("print('the driver is too old')\nraise SystemExit(3)\n")
    done = _dev("demo", COMFYUI_PATH=str(tmp_path))
    assert done.returncode == 1
    assert "The host ended with code 3. Its last lines:\n  | the driver is too old" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_host_that_never_answers_is_given_up_and_ended(tmp_path):
    (tmp_path / "main.py").write_text("import time\nprint('thinking')\ntime.sleep(600)\n")
    server = HostServer(tmp_path)
    with server, pytest.raises(HostFailed, match=r"did not answer within 2 s.*\n  \| thinking"):
        server.wait(2)
    assert server.pid is None
    assert not server.base.exists()


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "terminated", "hung up"])
def test_stopping_in_the_middle_ends_the_host_too(how, host_path, busy_host, tmp_path):
    """The real one at Ctrl-C. What another signal starts here ends the host in the same way, whichever it is."""
    port, host = free_port(), host_path if how is signal.SIGINT else busy_host
    command = [
        sys.executable,
        str(ROOT / "dev.py"),
        "--python",
        sys.executable,
        "demo",
        "--port",
        str(port),
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"COMFYUI_PATH": str(host)},
        # a suite in the background is started deaf to it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("    up in"):
            break
    assert _listening(port)
    time.sleep(1.5)
    if how is signal.SIGINT:
        os.killpg(process.pid, how)  # a terminal sends it to the whole foreground group
    else:
        process.send_signal(how)
    rest = process.stdout.read()
    assert process.wait(60) == 130, rest
    assert "stopped; the host has been ended" in rest
    assert not _listening(port)


@pytest.mark.slow
def test_a_host_that_was_given_is_left_untouched(host_path, tmp_path, untouched):
    done = _dev(
        "demo", "--workflow", "demo_first_picture", "--out", str(tmp_path / "deep" / "out"), COMFYUI_PATH=str(host_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    untouched()
    pictures = sorted((tmp_path / "deep" / "out").glob("*.png"))
    assert len(pictures) == 4
    for picture in pictures:
        line = next(line for line in done.stdout.splitlines() if str(picture) in line)
        assert "background" in line  # what the judge sees
    assert "1 of 1 graphs ran" in done.stdout
