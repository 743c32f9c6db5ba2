// Every edit: what it does, that the old document stays as it was, and that undo brings it back.

import assert from "node:assert/strict";
import { test } from "node:test";

import { LIMITS, emptyDocument, parseDocument, writeDocument } from "../../web/regions/document.js";
import * as edits from "../../web/regions/edits.js";
import { record, redo, startHistory, undo } from "../../web/regions/history.js";

const stroke = { radius: 0.1, points: [0.5, 0.5, 0.6, 0.6] };

function frozen(value) {
  if (typeof value === "object" && value) Object.values(Object.freeze(value)).forEach(frozen);
  return value;
}

const two = frozen({
  version: 1,
  regions: [
    { label: "cat", boxes: [[0, 0, 0.5, 1]], strokes: [] },
    { label: "dog", boxes: [[0.5, 0, 0.5, 1], [0.1, 0.1, 0.2, 0.2]], strokes: [stroke] },
  ],
});
const labels = (document) => document.regions.map(({ label }) => label);

const EDITS = {
  addRegion: (d) => edits.addRegion(d, "new", { box: [0.2, 0.2, 0.2, 0.2] }),
  addBox: (d) => edits.addBox(d, 0, [0.2, 0.2, 0.2, 0.2]),
  addStroke: (d) => edits.addStroke(d, 0, stroke),
  setBox: (d) => edits.setBox(d, { region: 1, box: 1 }, [0.3, 0.3, 0.3, 0.3]),
  moveRegion: (d) => edits.moveRegion(d, 1, 0.1, -0.1),
  removeSelected: (d) => edits.removeSelected(d, { region: 1, box: 0 }),
  clearStrokes: (d) => edits.clearStrokes(d, 1),
  duplicateRegion: (d) => edits.duplicateRegion(d, 1),
  reorderRegion: (d) => edits.reorderRegion(d, 0, 1),
  renameRegion: (d) => edits.renameRegion(d, 0, "lion"),
};

for (const [name, edit] of Object.entries(EDITS)) {
  test(`${name} leaves the old document alone, stays sound, and can be undone`, () => {
    const before = writeDocument(two);
    const after = edit(two);
    assert.equal(writeDocument(two), before);
    assert.notEqual(writeDocument(after), before);
    parseDocument(writeDocument(after));
    let history = record(startHistory(two), after);
    history = undo(history);
    assert.equal(writeDocument(history.value), before);
    assert.equal(writeDocument(redo(history).value), writeDocument(after));
  });
}

test("every edit of this module is tested above", () => {
  assert.deepEqual(Object.keys(edits).filter((name) => name !== "soundSelection").sort(), Object.keys(EDITS).sort());
});

test("deleting the last box of a region deletes the region, deleting one of two does not", () => {
  assert.deepEqual(labels(edits.removeSelected(two, { region: 0, box: 0 })), ["dog"]);
  assert.equal(edits.removeSelected(two, { region: 1, box: 0 }).regions[1].boxes.length, 1);
  assert.deepEqual(labels(edits.removeSelected(two, { region: 1, box: null })), ["cat"]);
});

test("wiping the strokes of a region that has nothing else deletes it", () => {
  const drawn = edits.addRegion(emptyDocument(), "fog", { stroke });
  assert.deepEqual(edits.clearStrokes(drawn, 0).regions, []);
});

test("a label is cut between characters, not within one", () => {
  const cat = "\u{1f408}";
  const document = edits.renameRegion(two, 0, cat.repeat(500));
  assert.equal(document.regions[0].label, cat.repeat(LIMITS.label));
  assert.equal(edits.addRegion(two, `x${cat.repeat(500)}`, { box: [0, 0, 1, 1] }).regions[2].label, `x${cat.repeat(LIMITS.label - 1)}`);
  parseDocument(writeDocument(document));
});

test("the order stops at its ends", () => {
  assert.deepEqual(labels(edits.reorderRegion(two, 0, -1)), ["cat", "dog"]);
  assert.deepEqual(labels(edits.reorderRegion(two, 0, 1)), ["dog", "cat"]);
  assert.deepEqual(labels(edits.reorderRegion(two, 1, 5)), ["cat", "dog"]);
});

test("a copy lies beside its original and right above it", () => {
  const copied = edits.duplicateRegion(two, 0);
  assert.deepEqual(labels(copied), ["cat", "cat", "dog"]);
  assert.notDeepEqual(copied.regions[1].boxes, copied.regions[0].boxes);
});

test("the limits of a document hold for every way to add to it", () => {
  let document = emptyDocument();
  for (let round = 0; round < LIMITS.regions + 3; round++) {
    document = edits.addRegion(document, "x".repeat(500), { box: [0, 0, 1, 1] });
    document = edits.duplicateRegion(document, 0);
  }
  for (let round = 0; round < LIMITS.boxes + 3; round++) document = edits.addBox(document, 0, [0, 0, 1, 1]);
  for (let round = 0; round < LIMITS.strokes + 3; round++) document = edits.addStroke(document, 0, stroke);
  for (let round = 0; round < 100; round++) document = edits.moveRegion(document, 0, 1, -1);
  parseDocument(writeDocument(document));
});

test("a selection is mended to what is there", () => {
  assert.equal(edits.soundSelection(emptyDocument(), { region: 0, box: 0 }), null);
  assert.equal(edits.soundSelection(two, null), null);
  assert.deepEqual(edits.soundSelection(two, { region: 9, box: 9 }), { region: 1, box: 1 });
  const drawn = edits.addRegion(emptyDocument(), "fog", { stroke });
  assert.deepEqual(edits.soundSelection(drawn, { region: 0, box: 3 }), { region: 0, box: null });
});

test("a change after an undo forgets what was undone; the same value is no change", () => {
  let history = record(record(startHistory(1), 2), 3);
  history = record(undo(history), 4);
  assert.equal(redo(history).value, 4);
  assert.equal(undo(undo(history)).value, 1);
  assert.equal(undo(startHistory(1)).value, 1);
  assert.equal(record(history, 4), history);
});
