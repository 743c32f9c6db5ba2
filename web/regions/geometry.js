// Boxes on a canvas, in fractions: [x, y, width, height], each 0..1. No DOM, no state.

import { SMALLEST } from "./document.js";

export const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** The box inside the canvas that is nearest to a box: its size is kept where it fits. */
export function clampBox([x, y, w, h]) {
  const width = clamp(w, SMALLEST, 1);
  const height = clamp(h, SMALLEST, 1);
  return [clamp(x, 0, 1 - width), clamp(y, 0, 1 - height), width, height];
}

/** The box between two points, in any order, cut at the canvas. */
export function boxBetween([x0, y0], [x1, y1]) {
  const [left, right] = [clamp(Math.min(x0, x1), 0, 1), clamp(Math.max(x0, x1), 0, 1)];
  const [top, bottom] = [clamp(Math.min(y0, y1), 0, 1), clamp(Math.max(y0, y1), 0, 1)];
  return clampBox([left, top, right - left, bottom - top]);
}

/** A box moved by (dx, dy), stopped at the edge of the canvas. */
export function moveBox([x, y, w, h], dx, dy) {
  return clampBox([x + dx, y + dy, w, h]);
}

/**
 * A box resized by dragging a handle by (dx, dy). The opposite side stays; dragged past it, the box turns over.
 * @param {string} handle one of HANDLES
 */
export function resizeBox([x, y, w, h], handle, dx, dy) {
  const sides = { left: x, top: y, right: x + w, bottom: y + h };
  if (handle.includes("w")) sides.left += dx;
  if (handle.includes("e")) sides.right += dx;
  if (handle.includes("n")) sides.top += dy;
  if (handle.includes("s")) sides.bottom += dy;
  return boxBetween([sides.left, sides.top], [sides.right, sides.bottom]);
}

/** Where a handle of a box lies: [x, y]. */
export function handlePoint([x, y, w, h], handle) {
  const across = handle.includes("w") ? 0 : handle.includes("e") ? 1 : 0.5;
  const down = handle.includes("n") ? 0 : handle.includes("s") ? 1 : 0.5;
  return [x + across * w, y + down * h];
}

/** The handle of a box within reach of a point, corners first, or null. `reach` is [in x, in y]. */
export function handleAt(box, [px, py], [rx, ry]) {
  const near = HANDLES.filter((handle) => {
    const [x, y] = handlePoint(box, handle);
    return Math.abs(px - x) <= rx && Math.abs(py - y) <= ry;
  });
  return near.sort((a, b) => b.length - a.length)[0] ?? null;
}

/** Whether a point lies in a box. */
export function contains([x, y, w, h], [px, py]) {
  return px >= x && px <= x + w && py >= y && py <= y + h;
}

/** Whether strokes have painted a point: the last one over it counts, which may be the eraser's. */
export function painted(strokes, [px, py], aspect) {
  const covers = ({ radius, points }) => {
    // measured in heights of the canvas, as a radius is as long in both directions
    const line = points.map((value, at) => (at % 2 ? value : value * aspect));
    const reach = radius * Math.min(1, aspect);
    return line.some((_, at) => at % 2 === 0 && distanceToSegment([px * aspect, py], line, Math.max(at - 2, 0), at) <= reach);
  };
  const last = strokes.findLast(covers);
  return last !== undefined && !last.erase;
}

/** Which box of a region holds a point, topmost first; null for the paint of one that has no boxes, undefined for nothing. */
function partAt({ boxes, strokes }, point, aspect) {
  if (!boxes.length) return painted(strokes, point, aspect) ? null : undefined;
  const box = boxes.findLastIndex((one) => contains(one, point));
  return box < 0 ? undefined : box;
}

/**
 * The box under a point, or the region of strokes alone: of those that hold it the topmost; the selected one goes first,
 * so that what is under another can still be dragged once it is selected.
 * @param {{boxes: number[][], strokes: object[]}[]} regions bottom to top
 * @param {{region: number, box: number | null} | null} selected
 * @param {number} aspect the canvas's width by its height
 * @returns {{region: number, box: number | null} | null}
 */
export function shapeAt(regions, point, selected, aspect) {
  const chosen = selected && regions[selected.region];
  const chosenBox = chosen?.boxes[selected.box];
  if (chosenBox ? contains(chosenBox, point) : chosen && partAt(chosen, point, aspect) === null) return selected;
  for (let region = regions.length - 1; region >= 0; region--) {
    const box = partAt(regions[region], point, aspect);
    if (box !== undefined) return { region, box };
  }
  return null;
}

/** The lines a box may snap to along one axis: edges, middle and thirds of the canvas, edges and middles of boxes. */
export function snapLines(boxes, axis) {
  const lines = [0, 1 / 3, 0.5, 2 / 3, 1];
  for (const box of boxes) lines.push(box[axis], box[axis] + box[axis + 2] / 2, box[axis] + box[axis + 2]);
  return lines;
}

/** The least step that brings one of `values` onto one of `lines` within `reach`: {step, line}, or a step of 0. */
export function snapStep(values, lines, reach) {
  let best = { step: 0, line: null };
  let least = reach;
  for (const value of values) {
    for (const line of lines) {
      if (Math.abs(line - value) <= least) {
        least = Math.abs(line - value);
        best = { step: line - value, line };
      }
    }
  }
  return best;
}

/**
 * What of a box moves with a handle along one axis (0 is x): its two edges and middle when the whole box moves, one
 * edge when a handle does, nothing when the handle does not move along this axis.
 */
function movingValues(box, handle, axis) {
  const [start, size] = [box[axis], box[axis + 2]];
  if (handle === null) return [start, start + size / 2, start + size];
  if (handle.includes(axis ? "n" : "w")) return [start];
  return handle.includes(axis ? "s" : "e") ? [start + size] : [];
}

/**
 * A box that was moved (handle null) or resized, snapped to the lines of others.
 * @returns {{box: number[], guides: {axis: 0 | 1, at: number}[]}} the guides are the lines it now lies on
 */
export function snapBox(box, handle, others, [rx, ry]) {
  const guides = [];
  const steps = [rx, ry].map((reach, axis) => {
    const { step, line } = snapStep(movingValues(box, handle, axis), snapLines(others, axis), reach);
    if (line !== null) guides.push({ axis, at: line });
    return step;
  });
  return { box: handle === null ? moveBox(box, ...steps) : resizeBox(box, handle, ...steps), guides };
}

/**
 * A stroke's points with those left out that lie within `tolerance` of the line between the ones kept
 * (Ramer, Douglas and Peucker), so that a long stroke stays a short text.
 * @param {number[]} points [x, y, x, y, …]
 */
export function simplify(points, tolerance) {
  const last = points.length / 2 - 1;
  if (last < 2) return [...points];
  const keep = new Set([0, last]);
  const spans = [[0, last]];
  while (spans.length) {
    const [from, to] = spans.pop();
    let [far, distance] = [-1, tolerance];
    for (let index = from + 1; index < to; index++) {
      const away = distanceToSegment([points[2 * index], points[2 * index + 1]], points, 2 * from, 2 * to);
      if (away > distance) [far, distance] = [index, away];
    }
    if (far < 0) continue;
    keep.add(far);
    spans.push([from, far], [far, to]);
  }
  return [...keep].sort((a, b) => a - b).flatMap((index) => [points[2 * index], points[2 * index + 1]]);
}

/** From a point to the line between two points of a list, given by where their x stand. */
function distanceToSegment([x, y], points, from, to) {
  const [x0, y0] = [points[from], points[from + 1]];
  const [dx, dy] = [points[to] - x0, points[to + 1] - y0];
  const length = dx * dx + dy * dy;
  const along = length ? clamp(((x - x0) * dx + (y - y0) * dy) / length, 0, 1) : 0;
  return Math.hypot(x - x0 - along * dx, y - y0 - along * dy);
}
