"""A real browser on the real host's page, in the classic and in the new node renderer."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SHOTS = ROOT / "output" / "browser"  # git-ignored; a person looks at them
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
INSTALL = "apt-get install -y chromium chromium-driver"
RENDERERS = {"classic": False, "modern": True}  # Comfy.VueNodes.Enabled
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
    "--window-size=1500,1100", "--force-device-scale-factor=1", "--lang=en",
)  # fmt: skip


WHOLE = """const done = arguments[0];
app.canvas.deselectAll();
const [left, top, right, bottom] = app.graph.nodes.reduce(([l, t, r, b], { pos, size }) =>
  [Math.min(l, pos[0]), Math.min(t, pos[1] - 30), Math.max(r, pos[0] + size[0]), Math.max(b, pos[1] + size[1])],
  [1e9, 1e9, -1e9, -1e9]);
app.canvas.ds.fitToBounds([left, top, right - left, bottom - top], { zoom: 0.95 });
app.canvas.setDirty(true, true);
setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done)), 100);"""


def until(met, seconds: float = 20, what: str = "what was waited for"):
    """The first true answer of a question asked again and again."""
    deadline = time.monotonic() + seconds
    while not (answer := met()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.05)
    return answer


class Page:
    """The host's page in the browser, and what a person does on it."""

    def __init__(self, driver, url: str) -> None:
        self.driver, self.url = driver, url

    def settings(self, **values: Any) -> None:
        """Sets settings of the page in the host; dots written as __."""
        data = json.dumps({name.replace("__", "."): value for name, value in values.items()}).encode()
        request = urllib.request.Request(
            f"{self.url}/settings", data, {"Content-Type": "application/json"}, method="POST"
        )
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).close()

    def load(self, modern: bool, **more: Any) -> Page:
        """Loads the page anew, with an empty graph."""
        fixed = {"Comfy__Locale": "en", "Comfy__Minimap__Visible": False, "LiteGraph__Canvas__MinFontSizeForLOD": 0}
        self.settings(
            Comfy__TutorialCompleted=True,
            Comfy__VueNodes__Enabled=modern,
            Comfy__Workflow__Persist=False,
            **fixed | more,
        )
        self.driver.get("about:blank")
        self.driver.get(self.url)
        ready = (
            "return !!(window.app?.graph && app.extensionManager && LiteGraph.registered_node_types.ConceptsDemoModel)"
        )
        until(lambda: self.js(ready), 60, "the page's start")
        self.clear()
        return self

    def js(self, script: str, *arguments: Any) -> Any:
        """Runs a script in the page and returns what it returns; ``until``-style scripts return promises too."""
        return self.driver.execute_script(script, *arguments)

    def clear(self) -> None:
        """An empty graph at zoom 1, and no dialog."""
        self.js("app.graph.clear(); app.canvas.ds.reset(); app.canvas.setDirty(true, true)")
        self.js(
            "document.querySelectorAll('.p-dialog-close-button, .p-dialog button:has(.pi-times)')"
            ".forEach(b => b.click())"
        )

    def open(self, workflow: dict) -> None:
        """Loads a workflow as the page does itself."""
        self.driver.execute_async_script(
            "const done = arguments[1]; "
            "app.loadGraphData(arguments[0]).then(() => requestAnimationFrame(() => done()))",
            workflow,
        )

    def drop(self, name: str, data: bytes, kind: str) -> None:
        """Drops a file on the canvas."""
        self.js(
            """const [name, data, kind] = arguments;
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: kind }));
            const there = document.querySelector('#graph-canvas');
            for (const type of ['dragenter', 'dragover', 'drop'])
              there.dispatchEvent(new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true,
                                                        clientX: 700, clientY: 600 }));""",
            name,
            base64.b64encode(data).decode(),
            kind,
        )

    def finish(self, outputs: dict) -> None:
        """Tells the page what each node has put out, as the host does when it has run."""
        self.js(
            """for (const [node, output] of Object.entries(arguments[0]))
              app.api.dispatchCustomEvent('executed', { node, display_node: node, output, prompt_id: 'finished' });""",
            outputs,
        )

    def workflow(self) -> dict:
        """The graph as the page saves it."""
        return json.loads(self.js("return JSON.stringify(app.graph.serialize())"))

    def api_graph(self) -> dict:
        """The graph as the page queues it."""
        return self.driver.execute_async_script("app.graphToPrompt().then(made => arguments[0](made.output))")

    def find(self, selector: str, seconds: float = 20):
        """The first visible element of that kind."""

        def visible():
            return next((e for e in self.driver.find_elements("css selector", selector) if e.is_displayed()), None)

        return until(visible, seconds, f"an element {selector}")

    def drag(self, element, start, end, *, steps: int = 4, keys: str = "") -> None:
        """Drags with the left button between two places of an element, given as fractions of its size."""
        from selenium.webdriver.common.action_chains import ActionChains

        size = element.rect
        places = [[a + (b - a) * s / steps for a, b in zip(start, end, strict=True)] for s in range(steps + 1)]
        chain = ActionChains(self.driver, duration=10)
        for key in keys:
            chain.key_down(key)
        for at, (x, y) in enumerate(places):
            chain.move_to_element_with_offset(element, (x - 0.5) * size["width"], (y - 0.5) * size["height"])
            if at == 0:
                chain.click_and_hold()
        chain.release()
        for key in keys:
            chain.key_up(key)
        chain.perform()

    def press(self, *keys: str, held: str = "") -> None:
        """Presses keys one after another, with another held."""
        from selenium.webdriver.common.action_chains import ActionChains

        chain = ActionChains(self.driver)
        if held:
            chain.key_down(held)
        for key in keys:
            chain.send_keys(key)
        if held:
            chain.key_up(held)
        chain.perform()

    def shot(self, name: str, whole: bool = False) -> Path:
        """Keeps a screenshot under output/browser, if asked for of the whole graph."""
        if whole:
            self.driver.execute_async_script(WHOLE)
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SHOTS / f"{name}.png"))
        return SHOTS / f"{name}.png"

    def errors(self) -> set[str]:
        """What the console holds of errors since it was last asked, without ports and places.

        What the page asks of servers elsewhere in the world is left out: it does so without us, whatever the answer.
        """
        lines = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        lines = [line for line in lines if not line.startswith("https://")]
        lines = [line for line in lines if "/en.md" not in line]  # it asks for a help page in English, then for ours
        return {re.sub(r"(127\.0\.0\.1:)\d+|(\.js:?) ?[\d:]+|\?[^ ]*", r"\1\2", line.split("\n")[0]) for line in lines}


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
    started.set_script_timeout(60)
    yield started
    started.quit()


@pytest.fixture(scope="session")
def bare_errors(driver, host_path, tmp_path_factory):
    """The errors the host's page logs without our pack, in both renderers."""
    from comfyui_concepts.workbench.server import HostServer

    empty = tmp_path_factory.mktemp("empty-pack")
    (empty / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    found: set[str] = set()
    with HostServer(host_path, pack=empty) as bare:
        bare.wait()
        page = Page(driver, bare.url)
        for modern in RENDERERS.values():
            page.settings(Comfy__TutorialCompleted=True, Comfy__VueNodes__Enabled=modern)
            driver.get("about:blank")
            driver.get(bare.url)
            until(lambda: page.js("return !!(window.app?.graph && app.extensionManager)"), 60, "the page's start")
            time.sleep(1)
            found |= page.errors()
        driver.get("about:blank")  # before its host goes away
    page.errors()
    return found


@pytest.fixture(scope="session", params=RENDERERS)
def loaded(request, driver, bare_errors, server):
    """The page with our pack, in one renderer."""
    page = Page(driver, server.url).load(RENDERERS[request.param])
    page.renderer = request.param
    return page


@pytest.fixture
def page(loaded, bare_errors):
    """The page with an empty graph; afterwards the console must hold nothing that the bare host's does not."""
    loaded.clear()
    yield loaded
    assert loaded.errors() <= bare_errors


@pytest.fixture(name="until")
def until_fixture():
    """``until(met, seconds, what)``: waits for a question to be answered with yes."""
    return until
