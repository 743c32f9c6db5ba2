// The editor without its face: the document with its history, what is selected, and which tool is in hand.

import { nextLabel } from "./colours.js";
import { DocumentError, LIMITS, emptyDocument, parseDocument, writeDocument } from "./document.js";
import * as edits from "./edits.js";
import { record, redo, startHistory, undo } from "./history.js";

export const TOOLS = ["box", "brush", "eraser"];
const FULL = `That is all a drawing holds: ${LIMITS.regions} regions, ${LIMITS.boxes} boxes and ${LIMITS.strokes} strokes in each.`;

export class EditorModel {
  /** @param {(model: EditorModel, textChanged: boolean) => void} changed is called after every change */
  constructor(changed = () => {}) {
    this.changed = changed;
    this.history = startHistory(emptyDocument());
    this.draft = null; // the document while something is dragged
    this.selection = null;
    this.tool = "box";
    this.armed = false; // the next drag draws a new region, even on top of a box
    this.snap = true;
    this.radius = 0.06; // of the brush, in fractions of the shorter side
    this.concepts = []; // the connected ones: {label, names}
    this.unread = null; // a text that is no sound document, kept as it came
    this.fault = ""; // why
    this.notice = "";
  }

  /** The document as it stands, with what is being dragged. */
  get document() {
    return this.draft ?? this.history.value;
  }

  /** The text for the widget. A text that could not be read comes out as it went in. */
  get text() {
    return this.unread ?? writeDocument(this.history.value);
  }

  /** Takes the widget's text. One that is no sound document is kept and shown, never mended in silence. */
  setText(text) {
    if (text === this.text) return;
    this.draft = null;
    try {
      this.history = startHistory(parseDocument(text));
      [this.unread, this.fault] = [null, ""];
    } catch (error) {
      if (!(error instanceof DocumentError)) throw error;
      this.history = startHistory(emptyDocument());
      [this.unread, this.fault] = [typeof text === "string" ? text : (JSON.stringify(text) ?? ""), error.message];
    }
    this.selection = edits.soundSelection(this.history.value, this.selection);
    this.changed(this, false);
  }

  /** Gives up a text that could not be read and begins with an empty canvas. */
  startAnew() {
    [this.unread, this.fault] = [null, ""];
    this.history = startHistory(emptyDocument());
    this.changed(this, true);
  }

  /** Makes a changed document the one that stands; the same document again means that there was no room. */
  apply(document, selection = this.selection) {
    if (this.unread !== null) return;
    this.draft = null;
    this.notice = document === this.history.value ? FULL : "";
    this.history = record(this.history, document);
    this.selection = edits.soundSelection(document, selection);
    this.changed(this, true);
  }

  /** Shows a document while something is dragged, without keeping it. */
  show(document) {
    this.draft = document;
    this.changed(this, false);
  }

  /** Keeps what was dragged, or, if nothing moved, forgets it. */
  keep(selection = this.selection) {
    const { draft } = this;
    this.draft = null;
    if (draft && writeDocument(draft) !== writeDocument(this.history.value)) this.apply(draft, selection);
    else this.changed(this, false);
  }

  /** Forgets what is being dragged. */
  cancel() {
    this.draft = null;
    this.armed = false;
    this.changed(this, false);
  }

  undo() {
    this.travel(undo(this.history));
  }

  redo() {
    this.travel(redo(this.history));
  }

  travel(history) {
    if (history === this.history || this.unread !== null) return;
    this.history = history;
    this.draft = null;
    this.selection = edits.soundSelection(history.value, this.selection);
    this.changed(this, true);
  }

  select(selection) {
    this.selection = edits.soundSelection(this.document, selection);
    this.changed(this, false);
  }

  /** Sets fields that are no part of the document: tool, snap, radius, armed, concepts. */
  set(fields) {
    Object.assign(this, fields);
    this.changed(this, false);
  }

  /** The selected box, or null. */
  get box() {
    const { selection } = this;
    return selection && selection.box !== null ? this.document.regions[selection.region].boxes[selection.box] : null;
  }

  addRegion(content) {
    const document = this.history.value;
    const added = edits.addRegion(document, nextLabel(document, this.concepts), content);
    this.armed = false;
    this.apply(added, { region: added.regions.length - 1, box: 0 });
  }

  remove() {
    if (this.selection) this.apply(edits.removeSelected(this.history.value, this.selection));
  }

  duplicate(region = this.selection?.region) {
    if (region === undefined) return;
    this.apply(edits.duplicateRegion(this.history.value, region), { region: region + 1, box: 0 });
  }

  reorder(by, region = this.selection?.region) {
    if (region === undefined) return;
    const to = region + by;
    if (to < 0 || to >= this.document.regions.length) return;
    this.apply(edits.reorderRegion(this.history.value, region, by), { region: to, box: this.selection?.box ?? 0 });
  }

  rename(region, label) {
    if (label !== this.document.regions[region].label) this.apply(edits.renameRegion(this.history.value, region, label));
  }
}
