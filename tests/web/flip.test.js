import assert from "node:assert/strict";
import { test } from "node:test";
import { turned } from "../../web/flip.js";

test("turning goes round both ways, and nowhere where there is nothing", () => {
  assert.deepEqual([0, 1, 2].map((place) => turned(place, 1, 3)), [1, 2, 0]);
  assert.deepEqual([0, 1, 2].map((place) => turned(place, -1, 3)), [2, 0, 1]);
  assert.equal(turned(0, 1, 0), 0);
  assert.equal(turned(0, 1, 1), 0);
});
