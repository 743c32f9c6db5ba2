"""The archive that the registry gets: what is in it, what is not, and that it is all a host needs."""

from __future__ import annotations

import ast
import asyncio
import io
import json
import re
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath

import pytest
from comfyui_concepts.nodes import NODES
from comfyui_concepts.workbench import brand, release
from comfyui_concepts.workbench.client import run_graph
from comfyui_concepts.workbench.server import HostServer
from comfyui_concepts.workbench.templates import to_api
from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT, NAME = release.PROJECT, release.NAME
FOLDERS = {"demo", "host", "locales", "methods", "nodes", "subgraphs", "web", "workflows"}
FILES = {"CHANGELOG.md", "LICENSE", "README.md", "__init__.py", "pyproject.toml"}


def test_it_is_small_and_holds_what_nodes_and_pages_need(archive):
    assert archive.stat().st_size < release.LIMIT
    with zipfile.ZipFile(archive) as packed:
        names = [PurePosixPath(name) for name in packed.namelist()]
    assert {str(n) for n in names if len(n.parts) == 1} == FILES
    assert {n.parts[0] for n in names if len(n.parts) > 1} <= FOLDERS
    assert {n.suffix for n in names} <= {
        "",
        ".css",
        ".jpg",
        ".js",
        ".json",
        ".md",
        ".py",
        ".safetensors",
        ".toml",
        ".webp",
    }


def test_every_picture_that_a_help_page_shows_is_in_it(unpacked):
    docs = unpacked / "web" / "docs"  # the page looks for pictures from here, in every language
    shown = {
        docs / address
        for page in docs.rglob("*.md")
        for address in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
    }
    assert shown
    assert not [path for path in shown if not path.is_file()]


def _imported_at_the_top(path: Path) -> set[str]:
    """Packages that a module imports without a condition, the pack's own left out."""
    statements = ast.parse(path.read_text()).body
    whole = {alias.name for s in statements if isinstance(s, ast.Import) for alias in s.names}
    parts = {s.module for s in statements if isinstance(s, ast.ImportFrom) and not s.level}
    return {name.split(".")[0] for name in whole | parts}


def test_a_host_has_every_package_it_imports(unpacked, host_path):
    required = re.findall(r"^[\w-]+", (host_path / "requirements.txt").read_text(), re.MULTILINE)
    wanted = {name.lower().replace("_", "-") for name in required}
    providers = {k: {d.lower().replace("_", "-") for d in v} for k, v in packages_distributions().items()}
    imported = {name for path in unpacked.rglob("*.py") for name in _imported_at_the_top(path)}
    assert "torch" in imported
    foreign = imported - set(sys.stdlib_module_names) - {path.stem for path in host_path.iterdir()}
    assert not {name for name in foreign if not providers.get(name, set()) & wanted}


def test_it_has_none_of_the_words_that_the_registrys_scanner_holds_back(archive):
    assert release.findings(archive) == []


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("import subprocess", "subprocess"),
        ("a page about a Socket", "Socket"),
        ("from urllib.request import x", "urllib"),
        ("import aiohttp", "aiohttp"),
        ("import ctypes", "ctypes"),
        ("HOME = os.environ['HOME']", "os.environ"),
        ("importlib.import_module(name)", "importlib"),
        ("node.connect(0, other, 1)", ".connect("),
        ("this.draw.bind(this)", ".bind("),
        ("model.eval()", "eval("),
        ("exec(text)", "exec("),
        ("requests.get(address)", "requests."),
        ("base64.b64decode(text)", "base64"),
    ],
)
def test_a_word_is_found_in_any_kind_of_file(line, word, tmp_path):
    made = tmp_path / "node.zip"
    with zipfile.ZipFile(made, "w") as packed:
        for name in ("nodes/a.py", "web/a.js", "README.md", "workflows/a.json"):
            packed.writestr(name, f"nothing\n{line}\n")
    found = release.findings(made)
    assert len(found) == 4
    assert found[0].startswith("nodes/a.py:2: ")
    assert found[0].endswith(f": {word}")


def test_comfy_cli_has_nothing_against_the_pack(unpacked):
    said = release.comfy_node("validate", unpacked)
    assert "All validation checks passed" in said
    assert "Warning" not in said


def test_comfy_cli_warns_of_what_the_registry_forbids(tmp_path):
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "__init__.py").write_text("def run(text):\n    exec(text)\n")
    assert "Security warnings found" in release.comfy_node("validate", tmp_path)


def test_the_name_is_one_the_registry_takes_and_advises():
    assert re.fullmatch(r"[a-z][a-z0-9]*(?:[-_.][a-z0-9]+)*", NAME)
    assert len(NAME) < 100
    assert "comfyui" not in NAME


def test_the_registry_is_told_where_to_read_and_to_complain():
    assert {"Repository", "Documentation", "Bug Tracker"} <= set(PROJECT["project"]["urls"])
    assert "Operating System :: OS Independent" in PROJECT["project"]["classifiers"]


def test_the_icon_and_the_banner_are_in_the_repository_in_the_shapes_the_registry_asks_for():
    address = PROJECT["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    icon, banner = (PROJECT["tool"]["comfy"][key] for key in ("Icon", "Banner"))
    assert icon.startswith(address)
    assert banner.startswith(address)
    with Image.open(ROOT / icon.removeprefix(address)) as picture:
        assert picture.width == picture.height <= 400
    with Image.open(ROOT / banner.removeprefix(address)) as picture:
        assert picture.width * 9 == picture.height * 21


@pytest.mark.parametrize(("draw", "file"), [(brand.icon, "icon.png"), (brand.banner, "banner.jpg")])
def test_the_icon_and_the_banner_show_the_pictures_of_now(draw, file):
    """Within what a JPEG changes."""
    made = draw().convert("RGB")
    with Image.open(ROOT / "docs" / file) as kept:
        differences = ImageStat.Stat(ImageChops.difference(made, kept.convert("RGB")))
    assert max(differences.mean) < 3, "draw them anew with: python3 -m workbench.brand"


@pytest.mark.slow
def test_the_archive_alone_works_in_a_bare_host(unpacked, host_path):
    with HostServer(host_path, pack=unpacked, name=NAME) as server:
        server.wait()
        there = server.get("/object_info")
        assert {node.GET_SCHEMA().node_id for node in NODES} <= set(there)
        assert "IMPORT FAILED" not in server.log.read_text()
        assert [p.name for p in (server.base / "custom_nodes").iterdir()] == [NAME]
        assert len(server.get("/workflow_templates")[NAME]) == len(list((ROOT / "workflows").glob("*.json")))
        assert f"/extensions/{NAME}/concepts.js" in server.get("/extensions")
        template = server.get(f"/api/workflow_templates/{NAME}/demo_first_picture.json")
        pictures = asyncio.run(run_graph(server.url, to_api(template, there), workflow=template))
    assert len(pictures) == 4
    with Image.open(io.BytesIO(pictures[0].data)) as picture:
        assert json.loads(picture.info["workflow"])["id"] == template["id"]
