// What a region editor's text may hold. The same cases run against the Python parser (tests/methods).

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { DocumentError, LIMITS, emptyDocument, parseDocument, writeDocument } from "../../web/regions/document.js";

const CASES = JSON.parse(readFileSync(new URL("./documents.json", import.meta.url)));

for (const { name, text } of CASES.accepted) {
  test(`accepted: ${name}`, () => {
    const document = parseDocument(text);
    assert.deepEqual(parseDocument(writeDocument(document)).regions.length, document.regions.length);
    assert.equal(writeDocument(parseDocument(writeDocument(document))), writeDocument(document));
  });
}

for (const { name, text, says } of CASES.refused) {
  test(`refused: ${name}`, () => {
    assert.throws(() => parseDocument(text), (error) => error instanceof DocumentError && new RegExp(says).test(error.message));
  });
}

test("a text that is too long is not read at all", () => {
  assert.throws(() => parseDocument(" ".repeat(LIMITS.text + 1)), /at most 1000000 are read/);
});

test("nesting without end is refused", () => {
  assert.throws(() => parseDocument("[".repeat(200000)), DocumentError);
});

test("what is no text is refused", () => {
  for (const value of [null, undefined, 5, {}, []]) assert.throws(() => parseDocument(value), DocumentError);
});

test("nothing but what is known is kept, and no prototype is touched", () => {
  const { text } = CASES.accepted.find(({ name }) => name === "prototype keys");
  const [region] = parseDocument(text).regions;
  assert.deepEqual(Object.keys(region), ["label", "boxes", "strokes"]);
  assert.equal({}.polluted, undefined);
});

test("a box a hair over the edge is cut at the edge", () => {
  const { text } = CASES.accepted.find(({ name }) => name === "rounded over the edge");
  const [x, , w] = parseDocument(text).regions[0].boxes[0];
  assert.ok(x + w <= 1);
});

test("an empty document is written and read", () => {
  assert.deepEqual(parseDocument(writeDocument(emptyDocument())), emptyDocument());
});

test("numbers are written short", () => {
  const text = writeDocument({ regions: [{ label: "a", boxes: [[1 / 3, 0.1, 0.2, 0.3]], strokes: [] }] });
  assert.ok(text.includes("[0.3333,0.1,0.2,0.3]"));
});
