"""The pages that the browser tests show: the host's own and later ones; the first alone with CONCEPTS_PAGES=own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path

from .cache import CACHE

PACKAGE = "comfyui-frontend-package"


def own_page() -> tuple[str, Path]:
    """Version and folder of the page that the host's requirements have installed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return importlib.metadata.version(PACKAGE), Path(spec.submodule_search_locations[0]) / "static"


def all_pages() -> dict[str, Path]:
    """Version to folder of every page to show: the host's own first, the others from old to new."""
    own, folder = own_page()
    return {own: folder} | ({} if os.environ.get("CONCEPTS_PAGES") == "own" else _later_pages(own))


def _later_pages(own: str) -> dict[str, Path]:
    """Version to folder of the pages in the cache, from old to new."""

    def age(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    found = {folder.name.removeprefix("page-"): folder for folder in CACHE.glob("page-*.*.*") if folder.is_dir()}
    found = {version: folder for version, folder in found.items() if (folder / "index.html").is_file()}
    return {version: found[version] for version in sorted(found, key=age) if version != own}


class ServedPage:
    """A folder for the host's ``--front-end-root``, in which one page takes the place of another while the host runs.

    The host looks for a file by its name at every request. Whatever folder has the name is the page.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "shown"
        for version, page in all_pages().items():
            shutil.copytree(page, folder / version, ignore=shutil.ignore_patterns("*.map"))
        self.version, _ = own_page()
        (folder / self.version).rename(self.root)

    def show(self, version: str) -> None:
        """Has the host serve that page from now on."""
        self.root.rename(self.folder / self.version)
        (self.folder / version).rename(self.root)
        self.version = version
