"""Starts a module of the pack next to a host, outside of any server: ``python workbench/run.py MODULE [ARGUMENTS]``.

The host has a top-level module called ``nodes`` and so has the pack: the pack's folder must not be on ``sys.path``.
The pack is imported as one package under a fixed name, as the host itself does. The environment variable
``COMFYUI_PATH`` names the host; ``dev.py`` sets it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
from pathlib import Path

PACKAGE = "comfyui_concepts"
ROOT = Path(__file__).resolve().parent.parent


def import_pack(root: Path = ROOT, name: str = PACKAGE) -> None:
    """Imports the pack's folder as the package ``name`` (once)."""
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def enter_host(host: Path) -> None:
    """Puts the host on ``sys.path`` and tells it to stay on the CPU, before anything of it is imported."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [str(host)] + [entry for entry in sys.path if entry not in (here, str(ROOT), "")]
    import comfy.cli_args

    if os.environ.get("CONCEPTS_DEVICE", "cpu") == "cpu":
        comfy.cli_args.args.cpu = True


def end_in_order() -> None:
    """Lets a terminate or a hang-up end this process as Ctrl-C does: a host it has started is ended too."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)


def main() -> int:
    """Runs ``main(arguments)`` of the named module of the pack and returns its exit code."""
    end_in_order()
    module, arguments = sys.argv[1], sys.argv[2:]
    sys.argv = sys.argv[:1]  # the host reads the command line when it is imported
    enter_host(Path(os.environ["COMFYUI_PATH"]))
    import_pack()
    return importlib.import_module(f"{PACKAGE}.{module}").main(arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
