import assert from "node:assert/strict";
import { test } from "node:test";
import { ownTranslations, translate } from "../../web/languages.js";

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

test("of what the host serves, only our nodes in the page's language are taken", () => {
  const served = { zh: { nodeDefs: { ConceptsA: { display_name: "甲" }, KSampler: { display_name: "乙" } } }, ja: {} };
  assert.deepEqual(ownTranslations(served, "zh"), { ConceptsA: { display_name: "甲" } });
  assert.deepEqual(ownTranslations(served, "ja"), {});
  assert.deepEqual(ownTranslations(served, "fr"), {});
});

test("a form of a language takes the language's texts, unless it has its own", () => {
  const zh = { nodeDefs: { ConceptsA: { display_name: "视图" } } };
  const form = { nodeDefs: { ConceptsA: { display_name: "視圖" } } };
  assert.deepEqual(ownTranslations({ zh }, "zh-TW"), zh.nodeDefs);
  assert.deepEqual(ownTranslations({ zh, "zh-TW": form }, "zh-TW"), form.nodeDefs);
});
