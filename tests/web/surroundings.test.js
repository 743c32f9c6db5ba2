// What the editor learns from the graph. The cases of colours.json run against the preview's colours too (tests/nodes).

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { COLOURS, colourIndex, colourOf, nextLabel } from "../../web/regions/colours.js";
import { LIMITS } from "../../web/regions/document.js";
import { conceptNames } from "../../web/regions/surroundings.js";
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
