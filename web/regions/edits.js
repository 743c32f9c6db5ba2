// Every change a person can make to a document, as a function from document to document. The old one is never touched.
//
// A selection is {region, box}: indices into the document; box is null when the region has strokes only.

import { LIMITS, cutLabel, pointCount } from "./document.js";
import { clampBox, moveBox } from "./geometry.js";

const STEP_ASIDE = 0.03; // from an original to its copy

function withRegions(document, regions) {
  return { ...document, regions };
}

function withRegion(document, index, change) {
  return withRegions(
    document,
    document.regions.map((region, at) => (at === index ? { ...region, ...change(region) } : region)),
  );
}

const fits = (list, limit) => list.length < limit;
const fitsPoints = (document, strokes) => pointCount(document) + pointCount({ regions: [{ strokes }] }) <= LIMITS.total;

/** A new region on top, or the document as it is when there is no room for one. */
export function addRegion(document, label, { box = null, stroke = null } = {}) {
  if (!fits(document.regions, LIMITS.regions) || (!box && !stroke)) return document;
  if (stroke && !fitsPoints(document, [stroke])) return document;
  const region = { label: cutLabel(label), boxes: box ? [clampBox(box)] : [], strokes: stroke ? [stroke] : [] };
  return withRegions(document, [...document.regions, region]);
}

/** One more box for a region, or the document as it is when there is no room for it. */
export function addBox(document, region, box) {
  if (!fits(document.regions[region].boxes, LIMITS.boxes)) return document;
  return withRegion(document, region, ({ boxes }) => ({ boxes: [...boxes, clampBox(box)] }));
}

/** One more stroke for a region, or the document as it is when there is no room for it. */
export function addStroke(document, region, stroke) {
  if (!fits(document.regions[region].strokes, LIMITS.strokes) || !fitsPoints(document, [stroke])) return document;
  return withRegion(document, region, ({ strokes }) => ({ strokes: [...strokes, stroke] }));
}

/** Another place or size for a box. */
export function setBox(document, { region, box }, changed) {
  return withRegion(document, region, ({ boxes }) => ({
    boxes: boxes.map((old, at) => (at === box ? clampBox(changed) : old)),
  }));
}

/** A region's boxes and strokes moved by (dx, dy); a box stops at the edge. */
export function moveRegion(document, index, dx, dy) {
  return withRegion(document, index, ({ boxes, strokes }) => ({
    boxes: boxes.map((box) => moveBox(box, dx, dy)),
    strokes: strokes.map((stroke) => movedStroke(stroke, dx, dy)),
  }));
}

/** A region without the selected box; without any box and stroke left it goes too. */
export function removeSelected(document, { region, box }) {
  const { boxes, strokes } = document.regions[region];
  const left = boxes.filter((_, at) => at !== box);
  if (box === null || (!left.length && !strokes.length)) {
    return withRegions(
      document,
      document.regions.filter((_, at) => at !== region),
    );
  }
  return withRegion(document, region, () => ({ boxes: left }));
}

/** A region's brush strokes wiped; a region with nothing else goes too. */
export function clearStrokes(document, region) {
  if (!document.regions[region].boxes.length) return removeSelected(document, { region, box: null });
  return withRegion(document, region, () => ({ strokes: [] }));
}

function movedStroke(stroke, dx, dy) {
  const within = (value) => Math.min(Math.max(value, -1), 2); // as far as a document may hold; all of it out of sight
  return { ...stroke, points: stroke.points.map((value, at) => within(value + (at % 2 ? dy : dx))) };
}

/** A copy of a region, a little aside, right above it. */
export function duplicateRegion(document, index) {
  const { strokes } = document.regions[index];
  if (!fits(document.regions, LIMITS.regions) || !fitsPoints(document, strokes)) return document;
  const shifted = moveRegion({ regions: [document.regions[index]] }, 0, STEP_ASIDE, STEP_ASIDE);
  const [copy] = shifted.regions;
  return withRegions(document, [...document.regions.slice(0, index + 1), copy, ...document.regions.slice(index + 1)]);
}

/** A region moved up (+1, towards the front) or down (−1) in the order; stops at the ends. */
export function reorderRegion(document, index, by) {
  const to = Math.min(Math.max(index + by, 0), document.regions.length - 1);
  const regions = [...document.regions];
  const [region] = regions.splice(index, 1);
  regions.splice(to, 0, region);
  return withRegions(document, regions);
}

/** Another label for a region. */
export function renameRegion(document, index, label) {
  return withRegion(document, index, () => ({ label: cutLabel(label) }));
}

/** A selection that a document has, as near as possible to the one asked for; null when it has no regions. */
export function soundSelection(document, selection) {
  if (!selection || !document.regions.length) return null;
  const region = Math.min(Math.max(selection.region, 0), document.regions.length - 1);
  const boxes = document.regions[region].boxes.length;
  return { region, box: boxes ? Math.min(selection.box ?? 0, boxes - 1) : null };
}
