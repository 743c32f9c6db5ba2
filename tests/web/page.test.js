// What the pages of ComfyUI do differently, each with the little of a page that the question needs.

import assert from "node:assert/strict";
import { test } from "node:test";

import { keepInSight, languageOf, passToCanvas, placeOf, tellChange } from "../../web/page.js";

const inside = (...classes) => ({ closest: (selector) => (classes.includes(selector) ? {} : null) });

test("an element is on the canvas, in a node or in a panel", () => {
  assert.equal(placeOf(inside(".dom-widget")), "canvas");
  assert.equal(placeOf(inside(".lg-node")), "node");
  assert.equal(placeOf(inside()), "panel");
});

test("an event ends here, and the canvas gets a copy of it", () => {
  const [seen, got] = [[], []];
  class Moved {
    constructor(type, { clientX }) {
      Object.assign(this, { type, clientX });
    }
    stopPropagation() {
      seen.push("stopped");
    }
    preventDefault() {
      seen.push("prevented");
    }
  }
  passToCanvas({ canvas: { canvas: { dispatchEvent: (event) => got.push(event) } } }, new Moved("pointermove", { clientX: 7 }));
  assert.deepEqual(seen, ["stopped", "prevented"]);
  assert.deepEqual(got.map(({ type, clientX }) => [type, clientX]), [["pointermove", 7]]);
});

test("a widget stays in sight when its input is linked, and goes with its node's section", () => {
  const widget = { computedDisabled: false, margin: 10, isVisible: () => false, node: { isWidgetVisible: () => true } };
  keepInSight(widget);
  assert.equal(widget.margin, 10);
  widget.computedDisabled = true;
  assert.notEqual(widget.margin, 10); // so the page looks at it again
  widget.connectionSuppressed = true; // as the newest pages say it
  assert.equal(widget.connectionSuppressed, false);
  assert.equal(widget.isVisible(), true);
  widget.hidden = true;
  assert.equal(widget.isVisible(), false);
  Object.assign(widget, { hidden: false, node: { isWidgetVisible: () => false } });
  assert.equal(widget.isVisible(), false);
  widget.node = {};
  assert.equal(widget.isVisible(), true);
});

test("a change is told the way the page knows", () => {
  const told = (...names) => {
    const calls = [];
    const changeTracker = Object.fromEntries(names.map((name) => [name, () => calls.push(name)]));
    tellChange({ extensionManager: { workflow: { activeWorkflow: { changeTracker } } } });
    return calls;
  };
  assert.deepEqual(told("checkState"), ["checkState"]);
  assert.deepEqual(told("checkState", "captureCanvasState"), ["captureCanvasState"]);
  tellChange({});
});

test("the language is what the page's settings say, else English", () => {
  assert.equal(languageOf({ extensionManager: { setting: { get: (name) => ({ "Comfy.Locale": "ja" })[name] } } }), "ja");
  assert.equal(languageOf({ ui: { settings: { getSettingValue: () => "zh" } } }), "zh");
  assert.equal(languageOf({}), "en");
});
