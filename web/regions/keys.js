// What a key does in the editor.

import { moveRegion, setBox } from "./edits.js";
import { moveBox, resizeBox } from "./geometry.js";

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STEP = 0.01; // of the canvas; ten times that with Shift

const PLAIN = {
  Delete: (model) => model.remove(),
  Backspace: (model) => model.remove(),
  Escape: (model) => (model.draft || model.armed ? model.cancel() : model.select(null)),
  b: (model) => model.take("box"),
  m: (model) => model.take("brush"),
  e: (model) => model.take("eraser"),
  n: (model) => model.set({ tool: "box", armed: true }),
  s: (model) => model.set({ snap: !model.snap }),
  "[": (model) => model.reorder(-1),
  "]": (model) => model.reorder(1),
  d: (model) => model.duplicate(),
};

const WITH_CONTROL = {
  z: (model, { shiftKey }) => (shiftKey ? model.redo() : model.undo()),
  y: (model) => model.redo(),
  d: (model) => model.duplicate(),
};

function arrow(model, [across, down], { shiftKey, altKey }) {
  const { selection, box } = model;
  if (!selection) return false;
  const step = shiftKey ? 10 * STEP : STEP;
  const [dx, dy] = [across * step, down * step];
  const document = model.history.value;
  if (!box) model.apply(moveRegion(document, selection.region, dx, dy));
  else model.apply(setBox(document, selection, altKey ? resizeBox(box, "se", dx, dy) : moveBox(box, dx, dy)));
  return true;
}

/** Does what a key stands for; true if it stood for something, and then nobody else should hear of it. */
export function pressKey(model, event) {
  if (Object.hasOwn(ARROWS, event.key) && !event.ctrlKey && !event.metaKey) return arrow(model, ARROWS[event.key], event);
  if (event.altKey) return false;
  const table = event.ctrlKey || event.metaKey ? WITH_CONTROL : PLAIN;
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (!Object.hasOwn(table, name)) return false;
  table[name](model, event);
  return true;
}
