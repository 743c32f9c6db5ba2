// The editor without its face: what it keeps of the text it was given, and what every edit of it can take back.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { EditorModel } from "../../web/regions/model.js";

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
  model.startAnew();
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
