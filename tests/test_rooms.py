"""The arrows between the rooms of the pack point one way (CONTRIBUTING, "Rooms")."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "nodes",
    "node_helpers",
    "execution",
    "latent_preview",
    "server",
}
FORBIDDEN = {
    "methods": HOST_MODULES | {"host", "demo"},
    "host": {"nodes", "demo"},
    "nodes": HOST_MODULES - {"comfy_api"},  # the host's node API and nothing else of it
}


def _imports(path: Path) -> set[str]:
    """Top-level names a file imports, and for relative imports the room they lead to."""
    found = set()
    room_depth = len(path.relative_to(ROOT).parts) - 1
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level > room_depth:
            found |= {(node.module or alias.name).split(".")[0] for alias in node.names}
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_what_it_may(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        wrong = _imports(path) & FORBIDDEN[room]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_only_the_demo_node_knows_the_demo():
    users = {p.name for p in (ROOT / "nodes").glob("*.py") if "demo" in _imports(p) and p.name != "__init__.py"}
    assert users == {"demo.py"}


def test_the_pack_is_never_imported_by_its_folder():
    import sys

    assert str(ROOT) not in sys.path


def _calls_and_imports(path: Path) -> set[str]:
    """Names a file calls or imports, dotted as written."""
    tree = ast.parse(path.read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return called | _imports(path)


def test_what_runs_in_the_host_reads_only_safetensors_and_no_network():
    unsafe = {
        "torch.load",
        "pickle",
        "eval",
        "exec",
        "compile",
        "subprocess",
        "urllib",
        "requests",
        "socket",
        "huggingface_hub",
        "os.system",
        "os.popen",
        "aiohttp",
        "http",
        "httpx",
        "torch.hub.load",
        "marshal",
        "marshal.loads",
        "dill",
    }
    shipped = [p for room in ("host", "methods", "nodes") for p in (ROOT / room).rglob("*.py")]
    in_host = ("loader", "files", "judge", "autoencoder", "architecture", "vocabulary")
    shipped += [ROOT / "__init__.py", *(ROOT / "demo" / f"{name}.py" for name in in_host)]
    for path in shipped:
        wrong = _calls_and_imports(path) & unsafe
        assert not wrong, f"{path.relative_to(ROOT)} uses {wrong}"
