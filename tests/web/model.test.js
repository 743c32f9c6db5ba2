// The editor without its picture: what it keeps of the text it was given, and what its buttons, keys and drags do.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { LIMITS } from "../../web/regions/document.js";
import { abandonGesture, beginGesture } from "../../web/regions/gestures.js";
import { pressKey } from "../../web/regions/keys.js";
import { EditorModel } from "../../web/regions/model.js";
import { Numbers, Rows, Tools } from "../../web/regions/panel.js";
import "./elements.js";

const CASES = JSON.parse(readFileSync(new URL("./documents.json", import.meta.url)));
const EMPTY = '{"version":1,"regions":[]}';
const TWO = JSON.stringify({
  version: 1,
  regions: [
    { label: "cat", boxes: [[0.1, 0.1, 0.3, 0.5]] },
    { label: "dog", boxes: [[0.55, 0.2, 0.3, 0.5], [0.6, 0.8, 0.1, 0.1]], strokes: [{ radius: 0.1, points: [0.5, 0.5] }] },
  ],
});

/** A model that has read a text, with one region selected; `told` counts what its face and its host hear. */
function modelOf(text = TWO, selection = null) {
  const told = { draws: 0, texts: [] };
  const model = new EditorModel((changed, byHand) => {
    told.draws++;
    if (byHand) told.texts.push(changed.text);
  });
  model.setText(text);
  model.select(selection);
  return Object.assign(model, { told });
}

for (const { name, text } of [...CASES.accepted, ...CASES.refused]) {
  test(`loaded and saved as it was: ${name}`, () => {
    const model = modelOf(text);
    model.select({ region: 0, box: 0 });
    model.set({ tool: "brush" });
    model.cancel();
    assert.equal(model.text, text);
    assert.deepEqual(model.told.texts, []); // nothing was changed by hand
  });
}

test("fields of a later pack stay until the first edit, and come back with its undo", () => {
  const { text } = CASES.accepted.find(({ name }) => name === "fields of a later pack");
  const model = modelOf(text);
  model.rename(0, "lion");
  assert.equal(model.text, '{"version":1,"regions":[{"label":"lion","boxes":[[0.1,0.1,0.5,0.5]]}]}');
  model.undo();
  assert.equal(model.text, text);
  model.redo();
  assert.match(model.text, /lion/);
});

test("a new text takes the place of the old one with all that could be undone", () => {
  const model = modelOf(TWO);
  model.rename(0, "lion");
  model.setText("");
  assert.equal(model.text, "");
  model.undo();
  assert.equal(model.text, "");
});

test("the host's own setting of the text it was told changes nothing", () => {
  const model = modelOf(TWO);
  model.rename(0, "lion");
  model.setText(model.text);
  model.undo();
  assert.equal(model.text, TWO);
});

test("a text that could not be read is not edited, and undo brings it back after starting anew", () => {
  const model = modelOf("<script>");
  assert.match(model.fault, /no JSON/);
  model.addRegion({ box: [0, 0, 1, 1] });
  assert.deepEqual([model.text, model.unread], ["<script>", "<script>"]);
  model.startEmpty();
  assert.deepEqual([model.text, model.unread, model.fault], [EMPTY, null, ""]);
  model.addRegion({ box: [0, 0, 1, 1] });
  assert.equal(model.document.regions.length, 1);
  model.undo();
  model.undo();
  assert.deepEqual([model.text, model.unread], ["<script>", "<script>"]);
  assert.match(model.fault, /no JSON/);
  assert.equal(model.selection, null);
  model.redo();
  assert.deepEqual([model.text, model.unread], [EMPTY, null]);
  assert.equal(model.told.texts.at(-2), "<script>"); // the host was told each time
});

test("what is no text at all is kept as its JSON", () => {
  for (const value of [12, null, true, { regions: "all" }, [[1, 2], "x"]]) {
    assert.equal(modelOf(value).text, JSON.stringify(value));
  }
});

const labels = (model) => model.document.regions.map(({ label }) => label);
const boxes = (model) => JSON.parse(model.text).regions.map((region) => region.boxes ?? []);
const key = (model, name, held = {}) => pressKey(model, { key: name, ctrlKey: false, metaKey: false, shiftKey: false, altKey: false, ...held });
const CONTROL = { ctrlKey: true };

/** A part of the face, drawn from its model. */
function faceOf(Part, model) {
  const part = new Part(model, "names");
  part.draw(model);
  return part;
}

/** The row of a region, given by its place in the document; rows stand front first. */
const rowOf = (rows, model, place) => rows.rows[model.document.regions.length - 1 - place];

test("up, down, copy and delete of a row do so to its own region, whichever is selected", () => {
  const press = (title, place, selection) => {
    const model = modelOf(TWO, selection);
    rowOf(faceOf(Rows, model), model, place).element.titled(title).press();
    model.after = labels(model);
    if (model.told.texts.length) {
      model.undo();
      assert.equal(model.text, TWO);
      model.redo();
    }
    return model;
  };
  for (const selection of [null, { region: 0, box: 0 }, { region: 1, box: 1 }]) {
    const up = press("Towards the front", 0, selection);
    assert.deepEqual([up.after, up.selection.region], [["dog", "cat"], 1]);
    const down = press("Towards the back", 1, selection);
    assert.deepEqual([down.after, down.selection.region], [["dog", "cat"], 0]);
    const copy = press("Duplicate", 0, selection);
    assert.deepEqual([copy.after, copy.selection.region], [["cat", "cat", "dog"], 1]);
    assert.deepEqual(press("Delete", 1, selection).after, ["cat"]); // with both of its boxes
    assert.deepEqual(press("Delete", 0, selection).after, ["dog"]);
  }
  for (const [title, place] of [["Towards the front", 1], ["Towards the back", 0]]) {
    const stays = press(title, place, null);
    assert.deepEqual([stays.after, stays.told.texts], [["cat", "dog"], []]);
  }
});

test("the rows follow the regions, and a row selects and renames its own", () => {
  const model = modelOf(TWO);
  const rows = faceOf(Rows, model);
  rowOf(rows, model, 1).swatch.press();
  assert.deepEqual(model.selection, { region: 1, box: 0 });
  rowOf(rows, model, 0).label.enter("lion");
  assert.deepEqual(labels(model), ["lion", "dog"]);
  model.removeRegion(0);
  rows.draw(model);
  assert.deepEqual(rows.rows.map(({ label }) => label.value), ["dog"]);
  assert.equal(rows.element.children.length, 1);
  rowOf(rows, model, 0).label.enter("dog"); // the same again is no edit
  assert.equal(model.told.texts.length, 2);
});

test("tools are taken by button and by key, and each puts off a new region that was asked for", () => {
  const model = modelOf();
  const tools = faceOf(Tools, model);
  const choices = { box: ["Box", "b"], brush: ["Brush", "m"], eraser: ["Eraser", "E"] };
  for (const [tool, [title, letter]] of Object.entries(choices)) {
    for (const take of [() => tools.element.titled(title).press(), () => assert.ok(key(model, letter))]) {
      model.set({ tool: "none", armed: true });
      take();
      tools.draw(model);
      assert.deepEqual([model.tool, model.armed], [tool, false]);
      assert.equal(tools.toggles[tool].attributes["aria-pressed"], "true");
      assert.equal(tools.radius.hidden, tool === "box");
    }
  }
});

test("a new region is asked for by N or its button, and Esc puts it off before it drops the selection", () => {
  const model = modelOf(TWO, { region: 0, box: 0 });
  const fresh = faceOf(Tools, model).element.titled("New region");
  model.take("brush");
  key(model, "n");
  assert.deepEqual([model.tool, model.armed], ["box", true]);
  fresh.press();
  assert.equal(model.armed, false);
  fresh.press();
  key(model, "Escape");
  assert.deepEqual([model.armed, model.selection], [false, { region: 0, box: 0 }]);
  key(model, "Escape");
  assert.equal(model.selection, null);
  assert.equal(model.text, TWO);
});

test("snapping is turned by S and its button", () => {
  const model = modelOf();
  const tools = faceOf(Tools, model);
  tools.element.titled("Snap").press();
  tools.draw(model);
  assert.deepEqual([model.snap, tools.snap.attributes["aria-pressed"]], [false, "false"]);
  key(model, "s");
  assert.equal(model.snap, true);
});

test("the slider sets the brush's size, and a stroke has it", () => {
  const model = modelOf("");
  const tools = faceOf(Tools, model);
  assert.equal(tools.radius.value, 6);
  tools.radius.enter("15", "input");
  model.take("brush");
  beginGesture(model, [0.5, 0.5], REACH, {}, 1).end();
  assert.equal(model.document.regions[0].strokes[0].radius, 0.15);
});

test("strokes are wiped off the selected region, and a region without boxes goes with them", () => {
  const model = modelOf(TWO, { region: 1, box: 1 });
  const numbers = faceOf(Numbers, model);
  assert.equal(numbers.wipe.hidden, false);
  numbers.wipe.press();
  numbers.draw(model);
  assert.deepEqual([model.document.regions[1].strokes, model.selection, numbers.wipe.hidden], [[], { region: 1, box: 1 }, true]);
  model.undo();
  assert.equal(model.text, TWO);
  const paint = modelOf('{"version":1,"regions":[{"label":"fog","strokes":[{"radius":0.1,"points":[0.5,0.5]}]}]}', { region: 0, box: 0 });
  paint.wipe();
  assert.deepEqual([labels(paint), paint.selection], [[], null]);
  paint.wipe(); // nothing is selected
  assert.equal(paint.told.texts.length, 1);
});

test("numbers set the selected box in percent, and what is no number sets nothing", () => {
  const model = modelOf(TWO, { region: 0, box: 0 });
  const numbers = faceOf(Numbers, model);
  assert.deepEqual(numbers.fields.map(({ value }) => value), ["10", "10", "30", "50"]);
  numbers.fields[0].enter("25");
  assert.deepEqual(boxes(model)[0], [[0.25, 0.1, 0.3, 0.5]]);
  for (const typed of ["", "x", "Infinity"]) numbers.fields[1].enter(typed);
  assert.equal(numbers.fields[1].value, "10");
  assert.equal(model.told.texts.length, 1);
});

test("arrows move the selected box, with Shift ten times as far, with Alt they resize it", () => {
  const after = (name, held) => {
    const model = modelOf(TWO, { region: 0, box: 0 });
    assert.ok(key(model, name, held));
    return boxes(model)[0][0];
  };
  assert.deepEqual(after("ArrowLeft"), [0.09, 0.1, 0.3, 0.5]);
  assert.deepEqual(after("ArrowDown", { shiftKey: true }), [0.1, 0.2, 0.3, 0.5]);
  assert.deepEqual(after("ArrowRight", { altKey: true }), [0.1, 0.1, 0.31, 0.5]);
  assert.deepEqual(after("ArrowUp", { altKey: true, shiftKey: true }), [0.1, 0.1, 0.3, 0.4]);
});

test("arrows move a region of strokes alone, and nothing when nothing is selected", () => {
  const model = modelOf('{"version":1,"regions":[{"label":"fog","strokes":[{"radius":0.1,"points":[0.5,0.5]}]}]}', { region: 0, box: 0 });
  key(model, "ArrowLeft", { shiftKey: true });
  assert.deepEqual(JSON.parse(model.text).regions[0].strokes[0].points, [0.4, 0.5]);
  assert.equal(key(modelOf(TWO), "ArrowLeft"), false); // the host may have it
  assert.equal(key(model, "ArrowLeft", CONTROL), false);
});

test("brackets order, D copies, Delete takes the box and then the region", () => {
  const model = modelOf(TWO, { region: 0, box: 0 });
  key(model, "]");
  assert.deepEqual([labels(model), model.selection.region], [["dog", "cat"], 1]);
  key(model, "]");
  key(model, "[");
  assert.deepEqual([labels(model), model.selection.region], [["cat", "dog"], 0]);
  key(model, "[");
  assert.equal(model.told.texts.length, 2); // at the ends there is nothing to do
  key(model, "d");
  key(model, "d", { metaKey: true });
  assert.deepEqual(labels(model), ["cat", "cat", "cat", "dog"]);
  for (const name of ["Delete", "Backspace"]) {
    model.select({ region: 0, box: 0 });
    key(model, name);
  }
  model.select({ region: 1, box: 1 });
  key(model, "Delete");
  assert.deepEqual([labels(model), boxes(model)[1].length], [["cat", "dog"], 1]);
});

test("Ctrl+Z goes back, Ctrl+Shift+Z and Ctrl+Y go forward, with Cmd as well", () => {
  for (const held of [CONTROL, { metaKey: true }]) {
    const model = modelOf(TWO, { region: 0, box: 0 });
    const tools = faceOf(Tools, model);
    model.rename(0, "lion");
    model.rename(0, "tiger");
    const back = () => key(model, "z", held);
    back();
    assert.deepEqual(labels(model), ["lion", "dog"]);
    back();
    back(); // at the beginning it stays
    assert.equal(model.text, TWO);
    key(model, "Z", { ...held, shiftKey: true });
    key(model, "y", held);
    assert.deepEqual(labels(model), ["tiger", "dog"]);
    tools.draw(model);
    assert.deepEqual([tools.undo.disabled, tools.redo.disabled], [false, true]);
    tools.undo.press();
    tools.redo.press();
    assert.deepEqual(labels(model), ["tiger", "dog"]);
  }
});

test("other keys are left to the host", () => {
  const model = modelOf(TWO, { region: 0, box: 0 });
  const others = [["q"], ["Enter"], ["constructor"], ["c", CONTROL], ["b", CONTROL], ["b", { altKey: true }], ["z"]];
  for (const [name, held] of others) assert.equal(key(model, name, held), false, name);
  assert.deepEqual([model.text, model.tool], [TWO, "box"]);
});

test("where there is no room, that is said, the selection stays, and the next edit or undo takes it back", () => {
  const full = { version: 1, regions: Array.from({ length: LIMITS.regions }, () => ({ label: "x", boxes: [[0, 0, 1, 1]] })) };
  const model = modelOf(JSON.stringify(full), { region: 3, box: 0 });
  model.rename(3, "y");
  key(model, "d");
  assert.match(model.notice, /all a drawing holds/);
  assert.deepEqual([model.selection, model.document.regions.length], [{ region: 3, box: 0 }, LIMITS.regions]);
  model.undo();
  assert.equal(model.notice, "");
});

const REACH = [0.01, 0.01];

/** A drag over points, the last one kept. */
function drag(model, points, held = {}, aspect = 1) {
  const gesture = beginGesture(model, points[0], REACH, held, aspect);
  for (const point of points.slice(1)) gesture.move(point, REACH, held);
  gesture.end();
  return model;
}

test("a drag snaps, and with Ctrl or Cmd it does not; where snapping is off, the other way round", () => {
  const path = [[0.25, 0.3], [0.3, 0.3], [0.348, 0.306]]; // the first box; its right edge comes near the middle
  const dragged = (held, snap) => {
    const model = modelOf(TWO);
    model.set({ snap });
    return boxes(drag(model, path, held))[0][0];
  };
  const near = ([x, y], wanted) => assert.ok(Math.hypot(x - wanted[0], y - wanted[1]) < 1e-3, `${[x, y]}`);
  const free = dragged({}, false);
  near(free, [0.198, 0.106]);
  near(dragged({}, true), [0.2, 0.106]);
  for (const held of [CONTROL, { metaKey: true }]) {
    assert.deepEqual(dragged(held, true), free);
    assert.deepEqual(dragged(held, false), dragged({}, true));
  }
  const drawn = (held) => drag(modelOf(""), [[0.1, 0.1], [0.498, 0.498]], held).document.regions[0].boxes[0];
  assert.deepEqual(drawn({}).slice(2), [0.4, 0.4]);
  for (const held of [CONTROL, { metaKey: true }]) assert.notDeepEqual(drawn(held).slice(2), [0.4, 0.4]);
});

test("a click selects, and a click on nothing drops the selection; neither is an edit", () => {
  const model = drag(modelOf(TWO), [[0.25, 0.3], [0.251, 0.3]]);
  assert.deepEqual(model.selection, { region: 0, box: 0 });
  drag(model, [[0.95, 0.05]]);
  assert.deepEqual([model.selection, model.text, model.told.texts], [null, TWO, []]);
});

test("a region of strokes alone is picked and dragged by its paint", () => {
  const model = modelOf('{"version":1,"regions":[{"label":"fog","strokes":[{"radius":0.1,"points":[0.2,0.5,0.4,0.5]}]}]}');
  const before = model.text;
  drag(model, [[0.3, 0.52], [0.3, 0.521]]);
  assert.deepEqual([model.selection, model.text], [{ region: 0, box: null }, before]);
  drag(model, [[0.3, 0.52], [0.35, 0.6], [0.5, 0.62]]);
  assert.deepEqual(JSON.parse(model.text).regions[0].strokes[0].points, [0.4, 0.6, 0.6, 0.6]);
  assert.equal(model.told.texts.length, 1);
  model.undo();
  assert.equal(model.text, before);
  drag(model, [[0.3, 0.52], [5, 5]]); // far out, some of it stays in sight
  assert.deepEqual(JSON.parse(model.text).regions[0].strokes[0].points, [0.9, 0.98, 1.1, 0.98]);
});

test("with a new region asked for, a drag on paint or a box draws one", () => {
  const model = modelOf(TWO);
  key(model, "n");
  drag(model, [[0.15, 0.15], [0.35, 0.5]]);
  assert.deepEqual([labels(model), model.armed], [["cat", "dog", "region 3"], false]);
  drag(model, [[0.5, 0.7], [0.7, 0.9]], { shiftKey: true });
  assert.equal(model.document.regions[2].boxes.length, 2);
});

test("the brush paints a new region or the selected one, the eraser the selected one only", () => {
  const model = modelOf("");
  model.take("eraser");
  assert.equal(beginGesture(model, [0.5, 0.5], REACH, {}, 1), null);
  model.take("brush");
  drag(model, [[0.2, 0.5], [0.5, 0.5], [0.8, 0.5]]);
  model.take("eraser");
  drag(model, [[0.5, 0.4], [0.5, 0.6]]);
  const { strokes } = model.document.regions[0];
  assert.deepEqual(strokes.map(({ erase = false }) => erase), [false, true]);
  assert.deepEqual(strokes[0].points, [0.2, 0.5, 0.8, 0.5]);
});

test("a drag that is given up leaves the text as it was", () => {
  const model = modelOf(TWO);
  beginGesture(model, [0.25, 0.3], REACH, {}, 1).move([0.5, 0.5], REACH, {});
  assert.notDeepEqual(model.document, model.history.value);
  abandonGesture(model);
  assert.deepEqual([model.draft, model.text, model.told.texts], [null, TWO, []]);
});

test("a text that could not be read takes no drag", () => {
  assert.equal(beginGesture(modelOf("<script>"), [0.5, 0.5], REACH, {}, 1), null);
});
