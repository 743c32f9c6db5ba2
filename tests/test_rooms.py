"""The arrows between the rooms of the pack point one way (CONTRIBUTING, "Rooms")."""

import ast
import fnmatch
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
ROOMS = ("methods", "host", "nodes", "demo", "boards", "workbench")
VERBS = ("anagram", "compose", "conduct", "erase")
FORBIDDEN = {
    "methods": HOST_MODULES | {"host", "nodes", "demo", "boards", "workbench"},
    "host": {"nodes", "demo", "boards", "workbench"},
    "nodes": HOST_MODULES | {"boards", "workbench"},  # the host's node API comes from host/schema.py, in one version
    "demo": {"nodes", "boards", "workbench"},
    "workbench": {"nodes", "host", "methods", "boards"},
}
"""What a room never imports. ``boards`` stands above all of them, so it has no line."""


def _modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def _package_imports(path: Path) -> set[tuple[str, ...]]:
    """What a file imports of the pack, as paths from its root: modules, and the names taken from them."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple(
                (node.module or "").split(".") if node.module else ()
            )
            found |= {(*base, alias.name) for alias in node.names}
    return found


def _imports(path: Path) -> set[str]:
    """Top-level names a file imports, and for relative imports the room they lead to."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    own = path.relative_to(ROOT).parts[0]
    return found | {target[0] for target in _package_imports(path)} - {own}


def _imported_modules(path: Path) -> set[Path]:
    """The files of the pack that a file imports."""
    found = set()
    for target in _package_imports(path):
        for parts in (target, target[:-1]):
            file = ROOT.joinpath(*parts)
            candidates = (file.with_suffix(".py"), file / "__init__.py")
            if there := next((c for c in candidates if c.is_file() and c != ROOT / "__init__.py"), None):
                found.add(there)
                break
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_what_it_may(room):
    files = _modules(room)
    assert files
    for path in files:
        wrong = _imports(path) & FORBIDDEN[room]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_only_the_demo_node_knows_the_demo():
    users = {p.name for p in (ROOT / "nodes").rglob("*.py") if "demo" in _imports(p) and p.name != "__init__.py"}
    assert users == {"demo.py"}


@pytest.mark.parametrize("room", ["host", "methods", "nodes"])
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_imports_another(room, verb):
    files = _modules(f"{room}/{verb}")
    assert files
    for path in files:
        others = {t[1] for t in _package_imports(path) if t[0] == room and len(t) > 1} & set(VERBS) - {verb}
        assert not others, f"{path.relative_to(ROOT)} imports {others}"


def test_what_all_verbs_share_imports_no_verb():
    for folder in ("engine", "text", "lora"):
        for path in _modules(f"host/{folder}"):
            verbs = {t[1] for t in _package_imports(path) if t[0] == "host" and len(t) > 1} & set(VERBS)
            assert not verbs, f"{path.relative_to(ROOT)} imports {verbs}"


def test_nothing_imports_the_boards():
    for room in ROOMS[:-2] + ROOMS[-1:]:
        users = [p.name for p in _modules(room) if "boards" in _imports(p)]
        assert not users


def test_there_is_no_circle_of_imports():
    imports = {path: _imported_modules(path) for room in ROOMS for path in _modules(room)}
    done: set[Path] = set()

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert path not in way, " → ".join(str(p.relative_to(ROOT)) for p in (*way, path))
        if path not in done:
            for target in imports.get(path, ()):
                visit(target, (*way, path))
            done.add(path)

    for path in imports:
        visit(path, ())


def _needed_by_nodes() -> set[Path]:
    """Every file that is imported when the host loads the pack and its nodes run."""
    found: set[Path] = set()
    waiting = [ROOT / "nodes" / "__init__.py"]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported_modules(path)
    return found


def test_a_release_holds_what_the_nodes_import_and_no_other_module():
    patterns = [line.strip() for line in (ROOT / ".comfyignore").read_text().splitlines() if line.strip()]

    def ignored(path: Path) -> bool:
        name = str(path.relative_to(ROOT))
        return any(name.startswith(p) if p.endswith("/") else fnmatch.fnmatch(name, p) for p in patterns)

    needed = _needed_by_nodes()
    assert not [path for path in needed if ignored(path)]
    shipped = {p for room in ROOMS for p in _modules(room) if not ignored(p) and p.name != "__init__.py"}
    assert not {str(p.relative_to(ROOT)) for p in shipped - needed}


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
    shipped = {ROOT / "__init__.py", *_modules("host"), *_modules("methods"), *_modules("nodes"), *_needed_by_nodes()}
    for path in shipped:
        wrong = _calls_and_imports(path) & unsafe
        assert not wrong, f"{path.relative_to(ROOT)} uses {wrong}"
