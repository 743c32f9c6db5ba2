"""The archive for the registry, made once for all tests that look at it."""

from __future__ import annotations

import zipfile

import pytest
from comfyui_concepts.workbench import release


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """The archive, made by comfy-cli as for the registry."""
    return release.make(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="session")
def unpacked(archive, tmp_path_factory):
    """What a user has who installs the pack from the registry."""
    folder = tmp_path_factory.mktemp("installed") / release.NAME
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder
