// What stands beside the picture: the tools above it, and below it the numbers and the list of regions.

import { colourOf } from "./colours.js";
import { LIMITS } from "./document.js";
import { html } from "./dom.js";
import { setBox } from "./edits.js";
import { icon } from "./icons.js";

const NUMBERS = [["X", "left edge"], ["Y", "top edge"], ["W", "width"], ["H", "height"]];

function button(sign, title, press) {
  return html("button", { type: "button", title, "aria-label": title, onclick: press }, sign);
}

/** The row of tools. */
export class Tools {
  constructor(model) {
    this.model = model;
    this.toggles = {
      box: button(icon("box"), "Box: drag to draw, move and resize (B)", () => model.take("box")),
      brush: button(icon("brush"), "Brush: paint the selected region (M)", () => model.take("brush")),
      eraser: button(icon("eraser"), "Eraser: wipe parts of the selected region (E)", () => model.take("eraser")),
    };
    this.fresh = button(icon("fresh"), "New region: the next drag draws one, also on top of another (N)", () => model.set({ tool: "box", armed: !model.armed }));
    this.snap = button(icon("snap"), "Snap to edges, middles and thirds (S); hold Ctrl (Cmd on a Mac) to do the opposite", () => model.set({ snap: !model.snap }));
    this.undo = button(icon("undo"), "Undo (Ctrl+Z)", () => model.undo());
    this.redo = button(icon("redo"), "Redo (Ctrl+Shift+Z)", () => model.redo());
    this.radius = html("input", {
      type: "range", min: 1, max: 30, step: 1, title: "Size of the brush, in percent of the shorter side", "aria-label": "Brush size",
      oninput: () => model.set({ radius: Number(this.radius.value) / 100 }),
    });
    this.element = html("div", { class: "concepts-tools" }, ...Object.values(this.toggles), this.radius, this.fresh,
      this.snap, html("span", { class: "concepts-space" }), this.undo, this.redo);
  }

  draw(model) {
    for (const [tool, element] of Object.entries(this.toggles)) element.setAttribute("aria-pressed", tool === model.tool);
    this.fresh.setAttribute("aria-pressed", model.armed);
    this.snap.setAttribute("aria-pressed", model.snap);
    this.undo.disabled = !model.history.past.length;
    this.redo.disabled = !model.history.future.length;
    this.radius.value = Math.round(model.radius * 100);
    this.radius.hidden = model.tool === "box";
  }
}

/** The selected box in numbers, in percent of the canvas. */
export class Numbers {
  constructor(model) {
    this.model = model;
    this.fields = NUMBERS.map(([sign, meaning], at) =>
      html("input", {
        type: "number", min: 0, max: 100, step: 1, title: `${meaning} in percent of the canvas`, "aria-label": `${sign}: ${meaning}, percent`,
        onchange: () => this.take(at),
      }),
    );
    this.which = html("span", { class: "concepts-which" });
    this.wipe = button("wipe strokes", "Remove all brush strokes of this region", () => model.wipe());
    const labelled = this.fields.map((field, at) => html("label", {}, NUMBERS[at][0], field));
    this.element = html("div", { class: "concepts-numbers" }, ...labelled, this.which, this.wipe);
  }

  take(at) {
    const { model } = this;
    const value = Number(this.fields[at].value);
    if (!model.box || this.fields[at].value === "" || !Number.isFinite(value)) return this.draw(model);
    const box = [...model.box];
    box[at] = value / 100;
    return model.apply(setBox(model.history.value, model.selection, box));
  }

  draw(model) {
    const { box, selection } = model;
    this.fields.forEach((field, at) => {
      field.disabled = !box;
      const text = box ? String(Math.round(box[at] * 1000) / 10) : "";
      if (field.value !== text) field.value = text;
    });
    const region = selection && model.document.regions[selection.region];
    this.which.textContent = region?.boxes.length > 1 ? `box ${selection.box + 1} of ${region.boxes.length}` : "";
    this.wipe.hidden = !region?.strokes.length;
  }
}

/** One line per region, front first, as they lie. Lines are reused, so a field keeps its focus. */
export class Rows {
  constructor(model, names) {
    [this.model, this.names, this.rows] = [model, names, []];
    this.element = html("div", { class: "concepts-rows" });
  }

  row() {
    const { model } = this;
    const row = { place: 0 };
    const press = (act) => () => act(row.place);
    row.swatch = button("", "Select this region", press((at) => model.select({ region: at, box: 0 })));
    row.swatch.className = "concepts-swatch";
    // a field counts an emoji as two; what is too long all the same, the model cuts
    row.label = html("input", {
      type: "text", maxlength: 2 * LIMITS.label, list: this.names, "aria-label": "Label: the concept's name", title: "Label: the name of the concept that goes here",
      spellcheck: "false", onfocus: press((at) => model.selection?.region !== at && model.select({ region: at, box: 0 })),
      onchange: press((at) => model.rename(at, row.label.value)),
    });
    row.element = html("div", { class: "concepts-row" }, row.swatch, row.label,
      button(icon("up"), "Towards the front (])", press((at) => model.reorder(1, at))),
      button(icon("down"), "Towards the back ([)", press((at) => model.reorder(-1, at))),
      button(icon("copy"), "Duplicate (Ctrl+D)", press((at) => model.duplicate(at))),
      button(icon("remove"), "Delete this region", press((at) => model.removeRegion(at))));
    return row;
  }

  draw(model) {
    const { regions } = model.document;
    while (this.rows.length < regions.length) {
      this.rows.push(this.row());
      this.element.append(this.rows.at(-1).element);
    }
    while (this.rows.length > regions.length) this.rows.pop().element.remove();
    this.rows.forEach((row, at) => {
      row.place = regions.length - 1 - at;
      const region = regions[row.place];
      row.swatch.style.background = colourOf(region, row.place, model.concepts);
      if (row.label.value !== region.label) row.label.value = region.label;
      row.element.classList.toggle("concepts-selected", model.selection?.region === row.place);
    });
  }
}
