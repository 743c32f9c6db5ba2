// What the editor learns from the graph. The cases of colours.json run against the preview's colours too (tests/nodes).

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { COLOURS, colourIndex, colourOf, nextLabel } from "../../web/regions/colours.js";
import { LIMITS } from "../../web/regions/document.js";
import { backgroundAddress, canvasSize, conceptNames, forgetBackground, sourceOf } from "../../web/regions/surroundings.js";
import { fakeNode, withConcepts } from "./nodes.js";

const CASES = JSON.parse(readFileSync(new URL("./colours.json", import.meta.url)));
const drawn = (...labels) => ({ regions: labels.map((label) => ({ label })) });

for (const { name, concepts, labels, colours } of CASES) {
  test(`colours: ${name}`, () => {
    const known = conceptNames(withConcepts(...concepts));
    assert.deepEqual(labels.map((label, place) => colourIndex({ label }, place, known)), colours);
  });
}

test("colours go round", () => {
  assert.equal(colourOf({ label: "" }, COLOURS.length + 1, []), COLOURS[1]);
});

test("a concept is labelled by its phrase, else its file, else its node's title", () => {
  const labels = (...widgets) => conceptNames(withConcepts(...widgets)).map(({ label }) => label);
  assert.deepEqual(labels({ lora: "x/a.safetensors", phrase: " a lion " }, { lora: "x/b.safetensors", phrase: "" }, {}), ["a lion", "b", "Concept"]);
  assert.deepEqual(conceptNames(fakeNode({})), []);
  assert.deepEqual(conceptNames(fakeNode({ inputs: { concepts: {} } })), [{ label: "", names: [] }]);
});

test("a chain that goes round is followed to its limit only", () => {
  const round = fakeNode({ widgets: { phrase: "lion" }, inputs: { concepts: null } });
  round.inputs[0].link = 1;
  round.getInputNode = () => round;
  assert.equal(conceptNames(round).length, 64);
});

test("the next region gets the first concept without one, by whichever name", () => {
  const concepts = conceptNames(withConcepts({ lora: "lion.safetensors", phrase: "a lion" }, { lora: "tiger.safetensors", phrase: "a tiger" }));
  assert.equal(nextLabel(drawn(), concepts), "a lion");
  assert.equal(nextLabel(drawn("LION "), concepts), "a tiger");
  assert.equal(nextLabel(drawn("a tiger"), concepts), "a lion");
  assert.equal(nextLabel(drawn("lion", "A Tiger"), concepts), "region 3");
  assert.equal(nextLabel(drawn("region 2"), []), "region 3");
});

test("a phrase too long for a label is given once all the same", () => {
  const concepts = conceptNames(withConcepts({ phrase: "x".repeat(500) }));
  const label = nextLabel(drawn(), concepts);
  assert.equal(label.length, LIMITS.label);
  assert.equal(nextLabel(drawn(label), concepts), "region 2");
});

test("the background is that of the last run, else what the connected node shows", () => {
  const picture = { imgs: [{ src: "shown.png" }] };
  const node = (source) => fakeNode({ inputs: { background: source } });
  assert.equal(backgroundAddress(node(picture), ""), "shown.png");
  assert.equal(backgroundAddress(node(picture), "run.png"), "run.png");
  assert.equal(backgroundAddress(node({}), "run.png"), "run.png");
  for (const source of [{}, { imgs: [] }, { imgs: [{ src: {} }] }]) assert.equal(backgroundAddress(node(source), ""), "");
  assert.equal(backgroundAddress(node(null), "run.png"), ""); // nothing is connected any more
  assert.equal(backgroundAddress(fakeNode({}), "run.png"), "");
});

test("only a change at the background forgets the last run's", () => {
  const node = fakeNode({ inputs: { background: {}, boxes: {}, concepts: {} } });
  const told = { background: "run.png", width: 64 };
  for (const change of [[1, 1, true], [1, 2, false], [2, 0, true], [1, 9, true], [1, undefined, true], []]) {
    forgetBackground(node, told, change);
    assert.equal(told.background, "run.png", `${change}`);
  }
  forgetBackground(node, told, [1, 0, true]);
  assert.deepEqual(told, { background: "", width: 64 });
});

test("the canvas has the size of the widgets, and of a linked one what the last run said", () => {
  const node = (widgets, inputs = {}) => fakeNode({ widgets, inputs });
  assert.deepEqual(canvasSize(node({ width: 640, height: "480" }), {}), { width: 640, height: 480 });
  const linked = node({ width: 640, height: 480 }, { width: {} });
  assert.deepEqual(canvasSize(linked, { width: 1024, height: 99 }), { width: 1024, height: 480 });
  assert.deepEqual(canvasSize(node({ width: 640, height: 480 }, { width: null }), { width: 9 }), { width: 640, height: 480 });
  assert.deepEqual(canvasSize(node({ width: 1, height: 1 }, { width: {}, height: {} }), { width: 96, height: 64 }), { width: 96, height: 64 });
});

test("a canvas of which a side is not known is square", () => {
  const square = { width: 1, height: 1 };
  const linked = fakeNode({ widgets: { width: 640, height: 480 }, inputs: { width: {} } });
  for (const told of [undefined, {}, { width: 0 }, { width: -5 }, { width: "wide" }, { width: Infinity }]) {
    assert.deepEqual(canvasSize(linked, told), square);
  }
  assert.deepEqual(canvasSize(fakeNode({}), {}), square);
});

test("a source is looked for only where there is a link", () => {
  assert.equal(sourceOf(fakeNode({ inputs: { a: null } }), "a"), null);
  assert.equal(sourceOf({ inputs: [{ name: "a", link: 3 }] }, "a"), null); // a host without getInputNode
  assert.equal(sourceOf({}, "a"), null);
});
