"""Every name of the host that the pack uses is there, says comfy-import-guard: it reads both, and runs neither."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from comfyui_concepts.workbench.checkers import checkers

GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")


@pytest.fixture(scope="module")
def verdicts(host_path, unpacked, tmp_path_factory):
    """What the guard says of the pack as released, and of one that uses a name no host has, by folder."""
    folder = tmp_path_factory.mktemp("guard")
    clone, packs = folder / "cache" / "ComfyUI", folder / "custom_nodes"
    _commit(host_path, clone)
    shutil.copytree(unpacked, packs / "released", ignore=shutil.ignore_patterns("*.safetensors"))
    (packs / "broken").mkdir()
    (packs / "broken" / "__init__.py").write_text("from comfy.model_management import no_host_has_this\n")
    command = [checkers() / "comfy-import-guard", "check", "--comfy-dir", folder, "--cache-dir", clone.parent]
    command += ["--offline", "--no-update", "--target", "HEAD", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    return {pack["pack"]: pack for pack in json.loads(done.stdout)["packs"]}


def _commit(host, clone):
    """The host's Python files as the one commit of a repository: the guard reads a commit, and a wheel has none."""
    for file in host.rglob("*.py"):
        name = file.relative_to(host)
        if name.parts[0] != "custom_nodes":
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes(file.read_bytes())
    for command in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "the host")):
        subprocess.run([*GIT, *command], cwd=clone, check=True, capture_output=True)


def test_the_host_has_every_name_that_the_pack_uses(verdicts):
    ours = verdicts["released"]
    assert ours["references"] > 100
    assert (ours["verdict"], ours["breaking"], ours["soft"], ours["signature_drift"]) == ("SAFE", [], [], [])


def test_a_name_that_no_host_has_is_seen(verdicts):
    assert "no_host_has_this" in json.dumps(verdicts["broken"]["breaking"])
