// Small pictures for buttons, drawn by us, as fonts differ. Lines on a grid of 16.

import { svg } from "./dom.js";

const PATHS = {
  box: "M2.5 3.5h11v9h-11z",
  brush: "M13.5 2.5L7 9M6.5 8.5c-2 0-2.5 1.5-2.7 3-.1.9-.8 1.5-1.6 1.7 2.3 1 5.8.3 5.8-2.7z",
  eraser: "M6 13.5h8M9.5 3l4 4-6 6H5l-2.5-2.5z M6 6.5l4 4",
  fresh: "M8 3v10M3 8h10",
  snap: "M5.5 2v12M10.5 2v12M2 5.5h12M2 10.5h12",
  undo: "M3 6.5h6.5a3.5 3.5 0 010 7H6M3 6.5l3-3M3 6.5l3 3",
  redo: "M13 6.5H6.5a3.5 3.5 0 000 7H10M13 6.5l-3-3M13 6.5l-3 3",
  up: "M8 13V3.5M4 7.5l4-4 4 4",
  down: "M8 3v9.5M4 8.5l4 4 4-4",
  copy: "M5.5 5.5h8v8h-8zM10.5 5.5v-3h-8v8h3",
  remove: "M4 4l8 8M12 4l-8 8",
};

/** The picture of that name. */
export function icon(name) {
  return svg("svg", { class: "concepts-icon", viewBox: "0 0 16 16", "aria-hidden": "true" }, svg("path", { d: PATHS[name] }));
}
