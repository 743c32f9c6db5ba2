// Boxes: every result stays on the canvas, whatever is asked for.

import assert from "node:assert/strict";
import { test } from "node:test";

import { SMALLEST } from "../../web/regions/document.js";
import {
  HANDLES, boxBetween, clampBox, contains, handleAt, handlePoint, moveBox, painted, resizeBox, shapeAt, simplify, snapBox,
} from "../../web/regions/geometry.js";

const near = (actual, expected) =>
  actual.forEach((value, at) => assert.ok(Math.abs(value - expected[at]) < 1e-9, `${actual} is not ${expected}`));

function onCanvas([x, y, w, h]) {
  assert.ok(x >= 0 && y >= 0 && w >= SMALLEST && h >= SMALLEST, `${[x, y, w, h]}`);
  assert.ok(x + w <= 1 + 1e-9 && y + h <= 1 + 1e-9, `${[x, y, w, h]}`);
}

function random(seed) {
  let state = seed;
  return () => (state = (state * 16807) % 2147483647) / 2147483647;
}

test("any move and any resize stays on the canvas", () => {
  const next = random(7);
  for (let round = 0; round < 2000; round++) {
    const box = clampBox([next() * 2 - 0.5, next() * 2 - 0.5, next() * 1.5, next() * 1.5]);
    const [dx, dy] = [next() * 4 - 2, next() * 4 - 2];
    onCanvas(box);
    onCanvas(moveBox(box, dx, dy));
    for (const handle of HANDLES) onCanvas(resizeBox(box, handle, dx, dy));
    onCanvas(snapBox(box, null, [clampBox([next(), next(), next(), next()])], [0.05, 0.05]).box);
  }
});

test("a move keeps the size and stops at the edge", () => {
  near(moveBox([0.2, 0.2, 0.3, 0.4], 0.1, -0.1), [0.3, 0.1, 0.3, 0.4]);
  near(moveBox([0.2, 0.2, 0.3, 0.4], 9, 9), [0.7, 0.6, 0.3, 0.4]);
});

test("a handle moves its own sides only", () => {
  const box = [0.2, 0.2, 0.4, 0.4];
  near(resizeBox(box, "e", 0.1, 0.3), [0.2, 0.2, 0.5, 0.4]);
  near(resizeBox(box, "n", 0.3, 0.1), [0.2, 0.3, 0.4, 0.3]);
  near(resizeBox(box, "nw", 0.1, 0.1), [0.3, 0.3, 0.3, 0.3]);
  near(resizeBox(box, "se", 0.1, 0.1), [0.2, 0.2, 0.5, 0.5]);
});

test("a handle dragged past the other side turns the box over", () => {
  near(resizeBox([0.2, 0.2, 0.4, 0.4], "e", -0.5, 0), [0.1, 0.2, 0.1, 0.4]);
});

test("a box between two points does not ask for their order", () => {
  for (const [a, b] of [[[0.1, 0.2], [0.5, 0.7]], [[0.5, 0.7], [0.1, 0.2]], [[0.5, 0.2], [0.1, 0.7]]]) {
    near(boxBetween(a, b), [0.1, 0.2, 0.4, 0.5]);
  }
});

test("a handle is found where it lies, and corners win over edges", () => {
  const box = [0.2, 0.2, 0.4, 0.4];
  for (const handle of HANDLES) assert.equal(handleAt(box, handlePoint(box, handle), [0.02, 0.02]), handle);
  assert.equal(handleAt(box, [0.4, 0.4], [0.02, 0.02]), null);
  assert.equal(handleAt([0.2, 0.2, 0.02, 0.02], [0.2, 0.2], [0.05, 0.05]).length, 2);
});

test("the topmost box is hit, and the selected one before it", () => {
  const regions = [{ boxes: [[0, 0, 1, 1]] }, { boxes: [[0.2, 0.2, 0.2, 0.2], [0.25, 0.25, 0.5, 0.5]] }];
  assert.deepEqual(shapeAt(regions, [0.3, 0.3], null, 1), { region: 1, box: 1 });
  assert.deepEqual(shapeAt(regions, [0.3, 0.3], { region: 0, box: 0 }, 1), { region: 0, box: 0 });
  assert.deepEqual(shapeAt(regions, [0.9, 0.9], { region: 1, box: 0 }, 1), { region: 0, box: 0 });
  assert.equal(shapeAt([{ boxes: [[0.2, 0.2, 0.2, 0.2]] }], [0.9, 0.9], null, 1), null);
  assert.equal(shapeAt([], [0.9, 0.9], { region: 3, box: 0 }, 1), null);
  assert.ok(contains([0, 0, 1, 1], [1, 1]));
});

test("a region of strokes alone is hit on its paint, where it lies in the order", () => {
  const line = { radius: 0.1, points: [0.2, 0.5, 0.8, 0.5] };
  const box = { boxes: [[0, 0, 1, 1]], strokes: [line] };
  const paint = { boxes: [], strokes: [line, { radius: 0.05, points: [0.5, 0.5], erase: true }] };
  assert.deepEqual(shapeAt([box, paint], [0.3, 0.55], null, 1), { region: 1, box: null });
  assert.deepEqual(shapeAt([paint, box], [0.3, 0.55], null, 1), { region: 1, box: 0 });
  assert.deepEqual(shapeAt([paint, box], [0.3, 0.55], { region: 0, box: null }, 1), { region: 0, box: null });
  assert.deepEqual(shapeAt([box, paint], [0.5, 0.5], { region: 1, box: null }, 1), { region: 0, box: 0 }); // where it was erased
  assert.equal(shapeAt([paint], [0.3, 0.7], null, 1), null);
  assert.equal(shapeAt([{ boxes: [[0, 0, 0.1, 0.1]], strokes: [line] }], [0.5, 0.5], null, 1), null); // a box is picked by itself
});

test("paint reaches as far as its radius of the shorter side, whatever the proportions", () => {
  const dot = [{ radius: 0.2, points: [0.5, 0.5] }];
  for (const [aspect, x, y] of [[1, 0.2, 0.2], [2, 0.1, 0.2], [0.5, 0.2, 0.1]]) {
    for (const sign of [-1, 1]) {
      assert.ok(painted(dot, [0.5 + sign * 0.98 * x, 0.5], aspect) && painted(dot, [0.5, 0.5 + sign * 0.98 * y], aspect));
      assert.ok(!painted(dot, [0.5 + sign * 1.02 * x, 0.5], aspect) && !painted(dot, [0.5, 0.5 + sign * 1.02 * y], aspect));
    }
  }
  const wiped = [...dot, { radius: 0.1, points: [0.5, 0.5], erase: true }];
  assert.ok(!painted(wiped, [0.5, 0.5], 1) && painted(wiped, [0.65, 0.5], 1));
  assert.ok(painted([...wiped, { radius: 0.02, points: [0.5, 0.5] }], [0.5, 0.5], 1));
  assert.ok(!painted([], [0.5, 0.5], 1));
});

test("a moved box snaps with the side that is nearest a line", () => {
  const { box, guides } = snapBox([0.21, 0.51, 0.3, 0.2], null, [[0.6, 0, 0.2, 0.2]], [0.02, 0.02]);
  near(box, [0.2, 0.5, 0.3, 0.2]);
  assert.deepEqual(guides, [{ axis: 0, at: 0.5 }, { axis: 1, at: 0.5 }]);
});

test("a resized box snaps with the dragged side, the other one stays", () => {
  const { box } = snapBox([0.1, 0.1, 0.39, 0.2], "e", [], [0.02, 0.02]);
  near(box, [0.1, 0.1, 0.4, 0.2]);
  near(snapBox([0.1, 0.1, 0.39, 0.2], "s", [], [0.02, 0.02]).box.slice(0, 3), [0.1, 0.1, 0.39]);
});

test("nothing in reach, nothing snaps", () => {
  const box = [0.11, 0.12, 0.2, 0.2];
  assert.deepEqual(snapBox(box, null, [], [0.005, 0.005]), { box, guides: [] });
});

test("a long straight stroke becomes its two ends, a bent one keeps its corner", () => {
  const line = Array.from({ length: 100 }, (_, i) => [i / 100, i / 100]).flat();
  assert.deepEqual(simplify(line, 0.001), [0, 0, 0.99, 0.99]);
  assert.deepEqual(simplify([0, 0, 0.25, 0, 0.5, 0, 0.5, 0.3, 0.5, 0.5], 0.001), [0, 0, 0.5, 0, 0.5, 0.5]);
  assert.deepEqual(simplify([0.5, 0.5], 0.001), [0.5, 0.5]);
});
