// The picture with the regions on it, redrawn from the model whenever that changes.

import { colourOf } from "./colours.js";
import { html, svg } from "./dom.js";
import { HANDLES, handlePoint } from "./geometry.js";

const HEIGHT = 1000; // of the canvas in the drawing's own units
const HANDLE = 4; // half a handle's side, in pixels of the layout
const REACH = 7; // how near the pointer must be to a handle or a snapping line
let stages = 0; // masks need names of their own in the page

/** Where a drag draws, and what it shows. */
export class Stage {
  constructor() {
    this.id = `concepts-stage-${++stages}`;
    this.aspect = 1;
    this.background = "";
    this.linked = false; // whether the regions come from another node
    this.paper = svg("rect", { class: "concepts-paper", x: 0, y: 0, height: HEIGHT });
    this.image = svg("image", { x: 0, y: 0, height: HEIGHT, preserveAspectRatio: "xMidYMid slice" });
    this.thirds = svg("path", { class: "concepts-thirds" });
    this.drawing = svg("g");
    this.svg = svg("svg", { class: "concepts-drawing", preserveAspectRatio: "xMidYMid meet" }, this.paper, this.image, this.thirds, this.drawing);
    // a real input takes the keys: the host leaves those alone, as it does for every field one types into
    this.keys = html("input", { class: "concepts-keys", readonly: true, "aria-label": "Region canvas: arrow keys move, Delete removes, N draws, Ctrl+Z undoes" });
    this.element = html("div", { class: "concepts-stage" }, this.keys, this.svg);
    this.setCanvas(1, 1);
  }

  /** The canvas's proportions. */
  setCanvas(width, height) {
    const aspect = width > 0 && height > 0 ? width / height : 1;
    if (aspect === this.aspect && this.svg.hasAttribute("viewBox")) return false;
    this.aspect = aspect;
    const across = HEIGHT * aspect;
    this.svg.setAttribute("viewBox", `0 0 ${across} ${HEIGHT}`);
    for (const element of [this.paper, this.image]) element.setAttribute("width", across);
    const lines = [1 / 3, 2 / 3].map((at) => `M${at * across} 0V${HEIGHT}M0 ${at * HEIGHT}H${across}`);
    this.thirds.setAttribute("d", lines.join(""));
    return true;
  }

  /** The picture under the regions; an empty address for none. */
  setBackground(address) {
    if (address === this.background) return;
    this.background = address;
    if (address) this.image.setAttribute("href", address);
    else this.image.removeAttribute("href");
  }

  /** A pointer's place as fractions of the canvas, whatever the zoom. */
  point(event) {
    const { left, top, width, height } = this.paper.getBoundingClientRect();
    return [(event.clientX - left) / (width || 1), (event.clientY - top) / (height || 1)];
  }

  /** How near is near, as fractions of the canvas's width and height. */
  get reach() {
    const unit = REACH * this.pixel;
    return [unit / (HEIGHT * this.aspect), unit / HEIGHT];
  }

  /** One pixel of the layout in the drawing's units. */
  get pixel() {
    const { clientWidth, clientHeight } = this.svg;
    const scale = Math.min(clientWidth / (HEIGHT * this.aspect), clientHeight / HEIGHT);
    return scale > 0 ? 1 / scale : 2;
  }

  /** Draws what a model holds. */
  draw(model) {
    const { regions } = model.document;
    const parts = regions.flatMap((region, place) => this.region(model, region, place));
    if (model.pending) parts.push(this.rect(model.pending, { class: "concepts-pending" }));
    parts.push(...this.guides(model.guides ?? []));
    if (model.box && model.tool === "box") parts.push(...this.handles(model.box));
    if (!regions.length && !model.pending && !model.pendingStroke && !this.linked) parts.push(this.hint(model));
    this.drawing.replaceChildren(...parts);
    this.element.dataset.tool = model.tool;
  }

  region(model, region, place) {
    const colour = colourOf(region, place, model.concepts);
    const selected = model.selection?.region === place;
    const pending = model.pendingStroke;
    const strokes = pending?.region === place ? [...region.strokes, pending.stroke] : region.strokes;
    const parts = this.fill(region.boxes, strokes, colour, place, selected);
    region.boxes.forEach((box, at) => {
      const isSelected = selected && model.selection.box === at;
      parts.push(this.rect(box, { class: `concepts-box${isSelected ? " concepts-selected" : ""}`, stroke: colour, "data-region": place }));
    });
    parts.push(this.label(region, strokes, colour));
    if (place === model.document.regions.length - 1 && pending && pending.region === null) {
      parts.push(...this.fill([], [pending.stroke], "#ffffff", place + 1, true));
    }
    return parts;
  }

  /** The area of a region: its boxes, then its strokes in order, some of which take away. */
  fill(boxes, strokes, colour, place, selected) {
    const across = HEIGHT * this.aspect;
    const name = `${this.id}-${place}`;
    const shapes = boxes.map((box) => this.rect(box, { fill: "white" }));
    shapes.push(...strokes.map((stroke) => this.stroke(stroke)));
    return [
      svg("mask", { id: name, maskUnits: "userSpaceOnUse", x: 0, y: 0, width: across, height: HEIGHT }, ...shapes),
      svg("rect", {
        x: 0, y: 0, width: across, height: HEIGHT, fill: colour, mask: `url(#${name})`,
        class: `concepts-area${selected ? " concepts-selected" : ""}`,
      }),
    ];
  }

  stroke({ radius, points, erase }) {
    const across = HEIGHT * this.aspect;
    const wide = 2 * radius * Math.min(across, HEIGHT);
    let path = "";
    for (let at = 0; at < points.length; at += 2) path += `${at ? "L" : "M"}${points[at] * across} ${points[at + 1] * HEIGHT}`;
    if (points.length === 2) path += "h0.01"; // a dot
    return svg("path", { d: path, class: "concepts-stroke", stroke: erase ? "black" : "white", "stroke-width": wide });
  }

  rect([x, y, w, h], properties) {
    const across = HEIGHT * this.aspect;
    return svg("rect", { x: x * across, y: y * HEIGHT, width: w * across, height: h * HEIGHT, ...properties });
  }

  label(region, strokes, colour) {
    const [x, y] = region.boxes[0] ?? strokes[0].points;
    const size = 13 * this.pixel;
    return svg("text", {
      class: "concepts-label", fill: colour, "font-size": size,
      x: Math.min(Math.max(x, 0), 0.95) * HEIGHT * this.aspect + size / 3,
      y: Math.min(Math.max(y, 0), 0.95) * HEIGHT + size * 1.1,
    }, region.label);
  }

  handles(box) {
    const half = HANDLE * this.pixel;
    return HANDLES.map((handle) => {
      const [x, y] = handlePoint(box, handle);
      return svg("rect", {
        class: `concepts-handle concepts-${handle}`, width: 2 * half, height: 2 * half,
        x: x * HEIGHT * this.aspect - half, y: y * HEIGHT - half,
      });
    });
  }

  guides(guides) {
    const across = HEIGHT * this.aspect;
    return guides.map(({ axis, at }) =>
      svg("path", { class: "concepts-guide", d: axis ? `M0 ${at * HEIGHT}H${across}` : `M${at * across} 0V${HEIGHT}` }),
    );
  }

  hint(model) {
    const text = model.unread === null ? "Drag to draw a region" : "These regions could not be read";
    return svg("text", {
      class: "concepts-hint", "font-size": 15 * this.pixel, x: (HEIGHT * this.aspect) / 2, y: HEIGHT / 2,
    }, text);
  }
}
