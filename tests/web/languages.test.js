import assert from "node:assert/strict";
import { test } from "node:test";
import { translate } from "../../web/languages.js";

const defined = () => ({
  A: { display_name: "A", input: { required: { x: ["INT", { tooltip: "an x" }], y: ["IMAGE"] } }, output_tooltips: ["out"] },
  B: { display_name: "B" },
});

test("names and tooltips are put over the English ones, and nothing else is touched", () => {
  const nodes = defined();
  translate(nodes, { A: { display_name: "甲", inputs: { x: { tooltip: "一", name: "叉" }, z: { tooltip: "?" } }, outputs: { 0: { tooltip: "出" } } }, C: {} });
  assert.equal(nodes.A.display_name, "甲");
  assert.deepEqual(nodes.A.input.required, { x: ["INT", { tooltip: "一", display_name: "叉" }], y: ["IMAGE"] });
  assert.deepEqual(nodes.A.output_tooltips, ["出"]);
  assert.deepEqual(nodes.B, defined().B);
});

test("no translations change nothing", () => {
  const nodes = defined();
  translate(nodes, undefined);
  assert.deepEqual(nodes, defined());
});
