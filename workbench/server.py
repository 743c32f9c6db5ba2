"""Starting and stopping a headless host with the pack in it. Standard library only; the tests use it too."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from .host_folder import claimed, clear_leftovers

ROOT = Path(__file__).resolve().parent.parent
PACK_FOLDER = "comfyui-concepts"
_LAST_LINES = 15
_PR_SET_PDEATHSIG = 1
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy


def _die_with_parent() -> None:
    """On Linux, has the kernel end the host if we are killed without a chance to do it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class HostFailed(RuntimeError):
    """The host did not start or ended by itself; the message ends with its last lines."""


def free_port() -> int:
    """A loopback port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Refuses a port somebody listens on.

    Raises:
        HostFailed: the port is taken.
    """
    advice = "leave --port out to have a free one chosen"
    if not 0 < port < 65536:
        raise HostFailed(f"There is no port {port}, only 1 to 65535; {advice}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            reason = "is taken by another program" if error.errno == errno.EADDRINUSE else f"cannot be used ({error})"
            raise HostFailed(f"Port {port} {reason}; {advice}.") from error


class HostServer:
    """A host in a separate process, on the loopback address, with every folder it writes to in a temporary place.

    ``name`` is the pack's folder in it: the repository's, or the registry's name. Use as a context manager. Entering it
    removes what killed hosts have left. Leaving it in any way ends the host and removes its folders.
    """

    def __init__(
        self,
        host: Path,
        port: int | None = None,
        pack: Path = ROOT,
        arguments: tuple[str, ...] = (),
        name: str = PACK_FOLDER,
    ) -> None:
        self.host, self.pack, self.arguments, self.name = host, pack, arguments, name
        if port is not None:
            check_port(port)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.base, self._lock = claimed()
        self.log = self.base / "host.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> HostServer:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        clear_leftovers()
        for folder in ("custom_nodes", "models", "input", "output", "user", "temp"):
            (self.base / folder).mkdir()
        (self.base / "custom_nodes" / self.name).symlink_to(self.pack, target_is_directory=True)
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.log, "wb") as log:
            # a new session: Ctrl-C reaches us first, and we end it in order
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.host,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
                pass_fds=(self._lock,),  # should it outlive us, its folder stays
            )

    def _command(self) -> list[str]:
        """The host on this port, with every folder it writes to below ``base``."""
        address = ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch"]
        folders = ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        device = ["--cpu"] if os.environ.get("CONCEPTS_DEVICE", "cpu") == "cpu" else []
        return [sys.executable, "main.py", *address, *folders, *self.arguments, *device]

    def wait(self, seconds: float = 600) -> None:
        """Returns when the host answers.

        Raises:
            HostFailed: it ended, or did not answer in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise HostFailed(f"The host did not answer within {seconds:.0f} s. Its last lines:\n{self.last_lines()}")

    def check(self) -> None:
        """Raises HostFailed if the process has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            raise HostFailed(
                f"The host ended with code {self._process.returncode}. Its last lines:\n{self.last_lines()}"
            )

    def get(self, path: str) -> dict:
        """The JSON answer of a GET."""
        with _DIRECT.open(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def last_lines(self) -> str:
        """The end of the host's log, indented."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return "\n".join(f"  | {line}" for line in lines[-_LAST_LINES:])

    @property
    def pid(self) -> int | None:
        """The host's process id while it runs."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def stop(self) -> None:
        """Ends the host and removes its folders. Safe to call twice."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        shutil.rmtree(self.base, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
