// The region editor: a model, its face, and the pointer and keys between them. It knows nothing of the host.

import { html } from "./dom.js";
import { abandonGesture, beginGesture } from "./gestures.js";
import { pressKey } from "./keys.js";
import { EditorModel } from "./model.js";
import { Numbers, Rows, Tools } from "./panel.js";
import { Stage } from "./stage.js";

const LINKED = "The regions come from the connected node. What is drawn here is not used.";
let editors = 0;

export class RegionEditor {
  /** @param {(text: string) => void} textChanged is called with the new text after every change by hand */
  constructor(textChanged) {
    this.textChanged = textChanged;
    this.disabled = () => false;
    this.linked = false;
    this.model = new EditorModel((model, byHand) => this.draw(model, byHand));
    this.names = html("datalist", { id: `concepts-names-${++editors}` });
    this.stage = new Stage();
    this.tools = new Tools(this.model);
    this.numbers = new Numbers(this.model);
    this.rows = new Rows(this.model, this.names.id);
    this.notice = html("div", { class: "concepts-notice", role: "status" });
    this.fault = this.faultLine();
    this.element = html("div", { class: "concepts-editor widget-expands" }, this.tools.element, this.stage.element,
      this.fault.element, this.notice, this.numbers.element, this.rows.element, this.names);
    this.addListeners();
    new ResizeObserver(() => this.stage.draw(this.model)).observe(this.stage.svg);
    this.draw(this.model, false);
  }

  faultLine() {
    const text = html("p");
    const raw = html("code");
    const restart = html("button", { type: "button", onclick: () => this.model.startEmpty() }, "Start with an empty canvas");
    return { element: html("div", { class: "concepts-fault", role: "alert", hidden: true }, text, raw, restart), text, raw };
  }

  draw(model, byHand) {
    for (const part of [this.stage, this.tools, this.numbers, this.rows]) part.draw(model);
    this.fault.element.hidden = model.unread === null;
    this.fault.text.textContent = model.fault;
    this.fault.raw.textContent = (model.unread ?? "").slice(0, 300);
    this.notice.textContent = this.linked ? LINKED : model.notice;
    if (byHand) this.textChanged(model.text);
  }

  /** What the connected nodes say: the concepts' names, the canvas's size, a picture under it, or all of the regions. */
  setSurroundings({ concepts, width, height, background, linked }) {
    this.setLinked(linked);
    const turned = this.stage.setCanvas(width, height);
    this.stage.setBackground(background);
    if (JSON.stringify(concepts) !== JSON.stringify(this.model.concepts)) {
      this.names.replaceChildren(...concepts.map(({ label }) => html("option", { value: label })));
      this.model.set({ concepts });
    } else if (turned) this.stage.draw(this.model);
  }

  /** Whether the regions come from another node: then these are shown faded, with a line that says so. */
  setLinked(linked) {
    if (linked === this.linked) return;
    this.linked = this.stage.linked = linked;
    this.element.classList.toggle("concepts-linked", linked);
    this.draw(this.model, false);
  }

  addListeners() {
    const { keys, svg } = this.stage;
    svg.addEventListener("pointerdown", (event) => this.press(event));
    svg.addEventListener("pointermove", (event) => this.drag(event));
    svg.addEventListener("pointerup", () => this.release());
    svg.addEventListener("pointercancel", () => this.abandon());
    keys.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["copy", "cut", "paste"]) keys.addEventListener(name, (event) => event.stopPropagation());
  }

  press(event) {
    if (event.button !== 0 || this.disabled()) return;
    this.stage.keys.focus({ preventScroll: true });
    event.preventDefault();
    this.gesture = beginGesture(this.model, this.stage.point(event), this.stage.reach, event, this.stage.aspect);
    if (this.gesture) this.stage.svg.setPointerCapture(event.pointerId);
  }

  drag(event) {
    this.gesture?.move(this.stage.point(event), this.stage.reach, event);
  }

  release() {
    const { gesture } = this;
    this.gesture = null;
    this.model.guides = [];
    gesture?.end();
  }

  abandon() {
    this.gesture = null;
    abandonGesture(this.model);
  }

  key(event) {
    if (this.disabled()) return;
    if (event.key === "Escape" && this.gesture) this.abandon();
    else if (this.gesture || !pressKey(this.model, event)) return;
    event.preventDefault();
    event.stopPropagation();
  }
}
