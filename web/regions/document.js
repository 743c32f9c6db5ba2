// The document a region editor keeps in its widget: JSON text in, checked regions out, and back.
//
// {"version": 1, "regions": [{"label": "cat", "boxes": [[x, y, w, h]], "strokes": [{"radius": r, "points": [x, y, …]}]}]}
// x and w are fractions of the canvas's width, y and h of its height, a radius of its shorter side. A stroke with
// "erase": true takes away. The same rules in Python: methods/drawing.py; both are held to tests/web/documents.json.

export const VERSION = 1;
export const LIMITS = { text: 1_000_000, regions: 32, boxes: 16, strokes: 256, points: 4096, total: 20_000, label: 120 };
export const SMALLEST = 0.002; // of a box's side
const SLACK = 1e-3; // rounding may carry a box this far over the edge
const LARGEST = 1e9; // any number in a document; NaN and infinities fail this too

/** What is wrong with a document, in a sentence for the person who made it. */
export class DocumentError extends Error {}

/** A document without regions. */
export function emptyDocument() {
  return { version: VERSION, regions: [] };
}

function refuse(sentence) {
  throw new DocumentError(sentence);
}

/** A text's characters as Python counts them: an emoji is one, though it takes two units of a JavaScript text. */
function characters(text) {
  return Array.from(text);
}

/** A label cut to its longest. */
export function cutLabel(text) {
  return characters(String(text)).slice(0, LIMITS.label).join("");
}

/** Any value as a short text for a sentence; never as markup. */
function shown(value) {
  let text;
  try {
    text = JSON.stringify(value) ?? String(value);
  } catch {
    text = "something that is no JSON";
  }
  const first = characters(text.slice(0, 100));
  return first.length > 40 ? `${first.slice(0, 40).join("")}…` : text;
}

function isRecord(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isList(value, most) {
  return Array.isArray(value) && value.length <= most;
}

function isNumber(value) {
  return typeof value === "number" && Math.abs(value) <= LARGEST;
}

function checkedBox(box, where) {
  if (!isList(box, 4) || box.length !== 4 || !box.every(isNumber)) {
    refuse(`${where} is ${shown(box)}; a box is four numbers [x, y, width, height] in fractions of the canvas.`);
  }
  const [x, y, w, h] = box;
  if (w < SMALLEST || h < SMALLEST) {
    refuse(`${where} is ${shown(box)}; its width and height must be at least ${SMALLEST}.`);
  }
  if (x < -SLACK || y < -SLACK || x + w > 1 + SLACK || y + h > 1 + SLACK) {
    refuse(`${where} is ${shown(box)}, which leaves the canvas; x + width and y + height may be at most 1.`);
  }
  const left = Math.min(Math.max(x, 0), 1 - SMALLEST);
  const top = Math.min(Math.max(y, 0), 1 - SMALLEST);
  return [left, top, Math.min(w, 1 - left), Math.min(h, 1 - top)];
}

function checkedStroke(stroke, where) {
  if (!isRecord(stroke)) refuse(`${where} is ${shown(stroke)}; a stroke is {"radius": …, "points": [x, y, …]}.`);
  const { radius, points, erase = false } = stroke;
  if (!isNumber(radius) || radius <= 0 || radius > 1) {
    refuse(`${where} has the radius ${shown(radius)}; it must lie above 0 and up to 1.`);
  }
  if (typeof erase !== "boolean") refuse(`${where}: "erase" is ${shown(erase)}; it must be true or false.`);
  if (!isList(points, 2 * LIMITS.points)) {
    refuse(`${where}: "points" must be a list of at most ${LIMITS.points} points.`);
  }
  const inside = (value) => isNumber(value) && value >= -1 && value <= 2;
  if (points.length === 0 || points.length % 2 || !points.every(inside)) {
    refuse(`${where}: "points" must be pairs of numbers [x, y, x, y, …] in fractions of the canvas.`);
  }
  return erase ? { radius, points: [...points], erase } : { radius, points: [...points] };
}

function checkedRegion(region, where) {
  if (!isRecord(region)) refuse(`${where} is ${shown(region)}; a region is {"label": …, "boxes": …, "strokes": …}.`);
  const { label = "", boxes = [], strokes = [] } = region;
  if (typeof label !== "string" || characters(label).length > LIMITS.label) {
    refuse(`${where} has the label ${shown(label)}; a label is a text of at most ${LIMITS.label} characters.`);
  }
  if (!isList(boxes, LIMITS.boxes)) refuse(`${where}: "boxes" must be a list of at most ${LIMITS.boxes} boxes.`);
  if (!isList(strokes, LIMITS.strokes)) {
    refuse(`${where}: "strokes" must be a list of at most ${LIMITS.strokes} strokes.`);
  }
  if (!boxes.length && !strokes.length) refuse(`${where} has neither a box nor a stroke; draw one or delete it.`);
  return {
    label,
    boxes: boxes.map((box, index) => checkedBox(box, `${where}, box ${index + 1}`)),
    strokes: strokes.map((stroke, index) => checkedStroke(stroke, `${where}, stroke ${index + 1}`)),
  };
}

/**
 * The document in a text. An empty text is a document without regions.
 * @param {string} text
 * @throws {DocumentError} with a sentence, if the text is anything but a whole and sound document
 */
export function parseDocument(text) {
  if (typeof text !== "string") refuse(`The regions are ${shown(text)}; they must be a JSON text.`);
  if (text.length > LIMITS.text) {
    refuse(`The regions are ${text.length} characters long; at most ${LIMITS.text} are read.`);
  }
  if (!text.trim()) return emptyDocument();
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    refuse("The regions are no JSON; draw them in the editor, or mend the text.");
  }
  if (!isRecord(value)) refuse(`The regions are ${shown(value)}; they must be {"version": 1, "regions": […]}.`);
  if (value.version !== VERSION) {
    refuse(`The regions have the version ${shown(value.version)}; this pack reads version ${VERSION}.`);
  }
  if (!isList(value.regions, LIMITS.regions)) {
    refuse(`"regions" must be a list of at most ${LIMITS.regions} regions.`);
  }
  const regions = value.regions.map((region, index) => checkedRegion(region, `Region ${index + 1}`));
  if (pointCount({ regions }) > LIMITS.total) {
    refuse(`The strokes have ${pointCount({ regions })} points together; at most ${LIMITS.total} are read.`);
  }
  return { version: VERSION, regions };
}

/** How many points all strokes of a document have together. */
export function pointCount({ regions }) {
  return regions.flatMap(({ strokes }) => strokes).reduce((sum, { points }) => sum + points.length / 2, 0);
}

const rounded = (value) => Math.round(value * 1e4) / 1e4;

/** The text of a document: numbers to four decimals, nothing that can be left out. */
export function writeDocument(document) {
  const regions = document.regions.map(({ label, boxes, strokes }) => ({
    label,
    ...(boxes.length && { boxes: boxes.map((box) => box.map(rounded)) }),
    ...(strokes.length && {
      strokes: strokes.map(({ radius, points, erase }) => ({
        radius: rounded(radius),
        ...(erase && { erase }),
        points: points.map(rounded),
      })),
    }),
  }));
  return JSON.stringify({ version: VERSION, regions });
}
