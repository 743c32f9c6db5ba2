"""A real browser on the real host, in the classic and in the new node renderer, on one page or on all.

On the host's own page all of them run, and on the later ones those with the mark ``every_page``: what a person meets
first, and what has failed there. With ``CONCEPTS_PAGES=all`` all run on all pages but those with the mark ``own_page``;
with ``CONCEPTS_PAGES=own`` none on the later ones. All run in both renderers but those with the mark ``one_renderer``.
"""

from __future__ import annotations

import os
import shutil
import time

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
INSTALL = "apt-get install -y chromium chromium-driver"
RENDERERS = ("classic", "modern")
MARKS = (
    "every_page: on the later pages too; the others only with CONCEPTS_PAGES=all",
    "own_page: on the host's own page only; what it tests is the host's or the pack's, not the page's",
    "one_renderer: in the classic renderer only; no node is drawn in it, or the graph is the same",
    "area(name): the column of the table of pages in docs/RESULTS.md",
)
COLUMNS = {"app": "App mode", "blueprints": "templates", "languages": "help", "pictures": "run"}
"""What the tests of a file are about that have no mark of their own."""
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
    "--disable-features=BackForwardCache",  # a page that was left would go on beside the next one
    "--window-size=1500,1100", "--force-device-scale-factor=1", "--lang=en",
)  # fmt: skip


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", mark)


def pytest_generate_tests(metafunc):
    """Runs a test on the pages and in the renderers that its marks leave."""
    if "loaded" not in metafunc.fixturenames:
        return
    from comfyui_concepts.workbench.pages import all_pages

    marked = metafunc.definition.get_closest_marker
    everywhere = marked("every_page") or (os.environ.get("CONCEPTS_PAGES") == "all" and not marked("own_page"))
    pages = list(all_pages())[: None if everywhere else 1]
    renderers = RENDERERS[: 1 if marked("one_renderer") else None]
    wanted = [(version, renderer) for version in pages for renderer in renderers]
    metafunc.parametrize("loaded", wanted, indirect=True, scope="session", ids="-".join)


def pytest_runtest_setup(item):
    """Tells the report which page, renderer and column of the table a test is about."""
    if "loaded" in item.fixturenames:
        version, renderer = item.callspec.params["loaded"]
        area = item.get_closest_marker("area")
        column = area.args[0] if area else COLUMNS.get(item.path.stem.removeprefix("test_browser_"), "editor")
        told = {"page": version, "renderer": renderer, "area": column}
        item.user_properties.extend(told.items())


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """The browser, headless."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip(f"the browser tests need Chromium and its driver; install them with: {INSTALL}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    started.set_script_timeout(120)
    yield started
    started.quit()


@pytest.fixture(scope="session")
def bare_errors(driver, host_path, tmp_path_factory):
    """``bare_errors(version)``: the errors that page logs without our pack, in both renderers."""
    from comfyui_concepts.workbench.browser import Page
    from comfyui_concepts.workbench.pages import ServedPage
    from comfyui_concepts.workbench.server import HostServer

    empty = tmp_path_factory.mktemp("empty-pack")
    (empty / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    served = ServedPage(tmp_path_factory.mktemp("bare-pages"))
    known: dict[str, set[str]] = {}

    with HostServer(host_path, pack=empty, arguments=("--front-end-root", str(served.root))) as bare:
        bare.wait()

        def errors(version: str) -> set[str]:
            if version not in known:
                served.show(version)
                known[version] = set().union(*(_bare(Page(driver, bare.url, version, name)) for name in RENDERERS))
            return known[version]

        yield errors
        driver.get("about:blank")  # before its host goes away


def _bare(page):
    """The errors of a page when nobody does anything on it."""
    from comfyui_concepts.workbench.browser import until

    page.visit()
    until(lambda: page.js("return !!(window.app?.graph && app.extensionManager)"), what="the page's start")
    time.sleep(1)
    return page.errors()


@pytest.fixture(scope="session")
def loaded(request, driver, bare_errors, server, served_page):
    """A page with our pack, in one renderer."""
    from comfyui_concepts.workbench.browser import Page

    version, renderer = request.param
    bare_errors(version)
    driver.get("about:blank")
    served_page.show(version)
    return Page(driver, server.url, version, renderer).load()


@pytest.fixture
def page(loaded, bare_errors):
    """The page with an empty graph; afterwards the console must hold nothing that the bare host's does not."""
    loaded.clear()
    yield loaded
    assert loaded.errors() <= bare_errors(loaded.version)


@pytest.fixture(scope="module")
def as_before(loaded):
    """After the tests of the file the page is loaded anew, for they leave something in it."""
    yield
    loaded.load()
    loaded.errors()


@pytest.fixture(name="until")
def until_fixture():
    """``until(met, seconds, what)``: waits for a question to be answered with yes."""
    from comfyui_concepts.workbench.browser import until

    return until
