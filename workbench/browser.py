"""The host's page in a real browser, and what a person does on it. The browser tests use it."""

from __future__ import annotations

import base64
import json
import re
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "output" / "browser"  # git-ignored; a person looks at them
HANGS = 120.0  # seconds: a limit for what will never happen, not for what is slow

ESCAPE = "\ue00c"
T = TypeVar("T")

SETTINGS = {
    "Comfy.Locale": "en",
    "Comfy.Minimap.Visible": False,
    "Comfy.Workflow.Persist": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    # what lies over the page at the first start, or says that host and page are of different ages
    "Comfy.TutorialCompleted": True,
    "Comfy.OnboardingCoachmarks.Seen": ["appMode"],
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.VersionCompatibility.DisableWarnings": True,
    "Comfy.AppBuilder.VueNodeSwitchDismissed": True,
    "Comfy.PartnerNodesEducation.Dismissed": True,
    "Comfy.RightSidePanel.IsOpen": False,
}
"""What every test starts from; a page ignores what it does not know."""

NOT_OURS = (
    "/en.md",  # a help page asked for in English first
    "/templates/index",  # a later host's templates
    "Attempted to cleanup event listeners for graph that was never set up",  # a subgraph on page 1.32.9
    "vue.esm-browser.prod.js TypeError: Cannot set properties of null (setting 'value')",  # its search box
    '"Error fetching file size:" TypeError: Failed to fetch',  # the size of a missing model
)
"""Not of our making: the page does so without us too."""

READY = """return !!(window.app?.graph && app.extensionManager?.command && app.canvas?.ds
  && LiteGraph.registered_node_types.ConceptsDemoModel)"""

EMPTY = """const done = arguments[0];
document.querySelector('[data-testid="properties-panel"] [aria-label="Toggle properties panel"]')?.click();
if (app.extensionManager.sidebarTab) app.extensionManager.sidebarTab.activeSidebarTabId = null;
const nothing = { version: 0.4, last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [], extra: {} };
app.loadGraphData(nothing, true, true, app.extensionManager.workflow?.activeWorkflow ?? null)
  .then(() => { app.canvas.ds.reset(); app.canvas.setDirty(true, true); requestAnimationFrame(() => done()); });"""

CLOSE = """const button = document.querySelector('[role=dialog] button:has(.pi-times), .p-dialog-close-button');
button?.click();
return !!button"""
"""Presses a dialog's own button; page 1.32.9 does not close its dialog of templates on Escape."""

WHOLE = """const done = arguments[0];
app.canvas.deselectAll();
const [left, top, right, bottom] = app.graph.nodes.reduce(([l, t, r, b], { pos, size }) =>
  [Math.min(l, pos[0]), Math.min(t, pos[1] - 30), Math.max(r, pos[0] + size[0]), Math.max(b, pos[1] + size[1])],
  [1e9, 1e9, -1e9, -1e9]);
app.canvas.ds.fitToBounds([left, top, right - left, bottom - top], { zoom: 0.95 });
app.canvas.setDirty(true, true);
setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done)), 100);"""

HELP = """return document.querySelector('.node-help-content :is(.markdown-content, .comfy-markdown-content)')
  ?.innerText ?? ''"""

DROP = """const [name, data, kind] = arguments;
const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name, { type: kind }));
const there = document.querySelector('#graph-canvas');
for (const type of ['dragenter', 'dragover', 'drop'])
  there.dispatchEvent(new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true,
                                            clientX: 700, clientY: 600 }));"""


def until(met: Callable[[], T], seconds: float = HANGS, what: str = "what was waited for") -> T:
    """The first true answer of a question asked again and again, less often the longer it takes: asking costs too."""
    started = time.monotonic()
    while not (answer := met()):
        waited = time.monotonic() - started
        assert waited < seconds, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(min(0.05 + waited / 10, 0.5))
    return answer


class Page:
    """The host's page in the browser, and what a person does on it."""

    def __init__(self, driver: Any, url: str, version: str = "", renderer: str = "classic") -> None:
        self.driver, self.url, self.version, self.renderer = driver, url, version, renderer

    @property
    def age(self) -> tuple[int, ...]:
        """The version as numbers, to compare."""
        return tuple(int(number) for number in re.findall(r"\d+", self.version))

    def settings(self, **values: Any) -> None:
        """Sets settings of the page in the host; dots written as __."""
        data = json.dumps({name.replace("__", "."): value for name, value in values.items()}).encode()
        request = urllib.request.Request(
            f"{self.url}/settings", data, {"Content-Type": "application/json"}, method="POST"
        )
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60).close()

    def visit(self, **more: Any) -> None:
        """Goes to the page as somebody who was never there, past the greetings of a first start."""
        self.settings(**SETTINGS, **{"Comfy.VueNodes.Enabled": self.renderer == "modern"}, **more)
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": self.url, "storageTypes": "all"})
        self.driver.get(self.url)

    def load(self, **more: Any) -> Page:
        """Loads the page anew, with an empty graph."""
        self.visit(**more)
        until(lambda: self.js(READY), what="the page's start")
        self.clear()
        return self

    def js(self, script: str, *arguments: Any) -> Any:
        """Runs a script in the page and returns what it returns."""
        return self.driver.execute_script(script, *arguments)

    def clear(self) -> None:
        """An empty workflow at zoom 1, and no dialog."""
        for _ in range(3):
            if not self.js("return !!document.querySelector('[role=dialog], [data-testid=dialog-overlay]')"):
                break
            if not self.js(CLOSE):
                self.press(ESCAPE)
            time.sleep(0.3)  # it fades away
        self.driver.execute_async_script(EMPTY)

    def open(self, workflow: dict[str, Any]) -> None:
        """Loads a workflow as the page does itself."""
        self.driver.execute_async_script(
            "const done = arguments[1]; "
            "app.loadGraphData(arguments[0]).then(() => requestAnimationFrame(() => done()))",
            workflow,
        )

    def drop(self, name: str, data: bytes, kind: str) -> None:
        """Drops a file on the canvas."""
        self.js(DROP, name, base64.b64encode(data).decode(), kind)

    def finish(self, outputs: dict[str, Any]) -> None:
        """Tells the page what each node has put out, as the host does when it has run."""
        self.js(
            """for (const [node, output] of Object.entries(arguments[0]))
              app.api.dispatchCustomEvent('executed', { node, display_node: node, output, prompt_id: 'finished' });""",
            outputs,
        )

    def run(self) -> None:
        """Presses the page's Run."""
        self.find("[data-testid='queue-button'] button, button[data-testid='queue-button']").click()

    def help_text(self) -> str:
        """What the help panel shows of a node's page; empty until it is there."""
        return self.js(HELP)

    def workflow(self) -> dict[str, Any]:
        """The graph as the page saves it."""
        return json.loads(self.js("return JSON.stringify(app.graph.serialize())"))

    def api_graph(self) -> dict[str, Any]:
        """The graph as the page queues it."""
        return self.driver.execute_async_script("app.graphToPrompt().then(made => arguments[0](made.output))")

    def find(self, selector: str, seconds: float = HANGS) -> Any:
        """The first visible element of that kind."""

        def visible() -> Any:
            return next((e for e in self.driver.find_elements("css selector", selector) if e.is_displayed()), None)

        return until(visible, seconds, f"an element {selector}")

    def at_rest(self, element: Any) -> None:
        """Waits until an element has a size, and stays where it is."""
        where = "const r = arguments[0].getBoundingClientRect(); return [r.x, r.y, r.width, r.height].map(Math.round)"
        seen: list[list[int]] = [[]]

        def met() -> bool:
            before, seen[0] = seen[0], self.js(where, element)
            return before == seen[0] and min(seen[0][2:]) > 50

        until(met, what="the layout")

    def drag(
        self, element: Any, start: Sequence[float], end: Sequence[float], *, steps: int = 4, keys: str = ""
    ) -> None:
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
        """Keeps a screenshot under output/browser/VERSION, if asked for of the whole graph."""
        if whole:
            self.driver.execute_async_script(WHOLE)
        path = SHOTS / self.version / f"{name}-{self.renderer}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        how = {"format": "png", "optimizeForSpeed": True}  # half the work of the driver's own, in a larger file
        path.write_bytes(base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", how)["data"]))
        return path

    def errors(self) -> set[str]:
        """What the console holds of errors since it was last asked, without ports and places.

        What the page asks of servers elsewhere in the world is left out: it does so without us, whatever the answer.
        """
        lines = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        lines = [line for line in lines if not line.startswith("https://")]
        lines = [re.sub(r"(127\.0\.0\.1:)\d+|(\.js:?) ?[\d:]+|\?[^ ]*", r"\1\2", line.split("\n")[0]) for line in lines]
        return {line for line in lines if not any(known in line for known in NOT_OURS)}
