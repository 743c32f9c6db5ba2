// The picture of Animate Anagram on its node: the film plays while the pointer is on it, a click or a key turns it by hand.

import { html } from "./regions/dom.js";

const NEXT = new Set([" ", "Enter", "ArrowRight", "ArrowDown"]);
const BACK = new Set(["ArrowLeft", "ArrowUp"]);

/** The place after `by` steps in a ring of `count`. */
export function turned(place, by, count) {
  return count > 0 ? (((place + by) % count) + count) % count : 0;
}

export class FlipPicture {
  /** @param {(file: object) => string} addressOf turns a file as the host names it into its address */
  constructor(addressOf) {
    this.addressOf = addressOf;
    this.views = [];
    this.film = "";
    this.place = 0;
    this.plays = false;
    this.image = html("img", { class: "concepts-flip-picture", alt: "", draggable: "false" });
    this.caption = html("div", { class: "concepts-flip-caption", role: "status" });
    // a real input takes the keys: the host leaves those alone
    this.keys = html("input", { class: "concepts-keys", readonly: true, "aria-label": "Views of the anagram: arrow keys or Space turn it" });
    this.element = html("div", { class: "concepts-flip widget-expands", title: "Point at it to play; click, Space or the arrows turn it" }, this.keys, this.image, this.caption);
    this.addListeners();
    this.draw();
  }

  /** What a run has made: `{film: file, views: [file with its name]}`. Anything else is no picture. */
  show(made) {
    const named = Array.isArray(made?.views) ? made.views.filter((view) => typeof view?.filename === "string") : [];
    this.views = named.map((view) => ({ name: String(view.name ?? ""), address: this.addressOf(view) }));
    this.film = typeof made?.film?.filename === "string" ? this.addressOf(made.film) : "";
    this.place = 0;
    this.draw();
  }

  turn(by) {
    this.place = turned(this.place, by, this.views.length);
    this.plays = false;
    this.draw();
  }

  play(plays) {
    this.plays = plays && this.film !== "";
    this.draw();
  }

  draw() {
    const view = this.views[this.place];
    const address = this.plays ? this.film : (view?.address ?? "");
    this.image.hidden = address === "";
    if (address && this.image.getAttribute("src") !== address) this.image.setAttribute("src", address);
    const which = view ? `${this.place + 1} of ${this.views.length}: ${view.name}` : "Run the graph to see it turn";
    this.caption.textContent = this.plays ? "playing" : which;
  }

  addListeners() {
    const { element, keys } = this;
    element.addEventListener("pointerenter", () => this.play(true));
    element.addEventListener("pointerleave", () => this.play(false));
    element.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      keys.focus({ preventScroll: true });
      this.turn(1);
    });
    keys.addEventListener("keydown", (event) => {
      const by = NEXT.has(event.key) ? 1 : BACK.has(event.key) ? -1 : 0;
      if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      this.turn(by);
    });
  }
}
