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
    this.armed = false; // whether the next drag draws a new region, even on top of a box
    this.snap = true;
    this.radius = 0.06; // of the brush, in fractions of the shorter side
    this.concepts = []; // the connected ones: {label, names}
    this.sources = new WeakMap(); // by document, the text it came from: {text, fault}
    this.notice = "";
  }

  /** The current document, with what is being dragged. */
  get document() {
    return this.draft ?? this.history.value;
  }

  /**
   * The text for the widget. As long as nothing is edited it comes out as it went in: what a later pack has written into
   * it is not lost by loading and saving.
   */
  get text() {
    return this.source?.text ?? writeDocument(this.history.value);
  }

  /** The text that the current document was read from, and its fault; nothing after an edit. */
  get source() {
    return this.sources.get(this.history.value);
  }

  /** A text that is not a sound document, as it came; else null. */
  get unread() {
    return this.source?.fault ? this.source.text : null;
  }

  /** Why it could not be read. */
  get fault() {
    return this.source?.fault ?? "";
  }

  /** Takes the widget's text. One that is not a sound document stays as it came, with its fault shown. */
  setText(text) {
    if (text === this.text) return;
    this.draft = null;
    this.history = startHistory(this.read(text));
    this.selection = edits.soundSelection(this.history.value, this.selection);
    this.changed(this, false);
  }

  /** The document in a text; an empty one in its place if the text is not a sound document. */
  read(text) {
    let [document, fault] = [emptyDocument(), ""];
    try {
      document = parseDocument(text);
    } catch (error) {
      if (!(error instanceof DocumentError)) throw error;
      fault = error.message;
    }
    this.sources.set(document, { text: typeof text === "string" ? text : (JSON.stringify(text) ?? ""), fault });
    return document;
  }

  /** Puts an empty canvas in the place of a text that could not be read; undo brings that back. */
  startEmpty() {
    this.history = record(this.history, emptyDocument());
    this.changed(this, true);
  }

  /** Makes a changed document the current one; the same document again means that there was no room. */
  apply(document, selection = this.selection) {
    if (this.unread !== null) return;
    this.draft = null;
    const full = document === this.history.value;
    this.notice = full ? FULL : "";
    this.history = record(this.history, document);
    this.selection = edits.soundSelection(document, full ? this.selection : selection);
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
    if (history === this.history) return;
    this.history = history;
    this.draft = null;
    this.notice = "";
    this.selection = edits.soundSelection(history.value, this.selection);
    this.changed(this, true);
  }

  select(selection) {
    this.selection = edits.soundSelection(this.document, selection);
    this.changed(this, false);
  }

  /** Sets fields outside of the document: tool, snap, radius, armed, concepts. */
  set(fields) {
    Object.assign(this, fields);
    this.changed(this, false);
  }

  /** Selects a tool. A pending new region is cancelled. */
  take(tool) {
    this.set({ tool, armed: false });
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

  /** Deletes a region with all that is in it. */
  removeRegion(region) {
    this.apply(edits.removeSelected(this.history.value, { region, box: null }), { region, box: 0 });
  }

  /** Removes all strokes of the selected region. */
  wipe() {
    if (this.selection) this.apply(edits.clearStrokes(this.history.value, this.selection.region));
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
