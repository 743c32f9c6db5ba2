// What a drag on the canvas does. Points are fractions of the canvas; `reach` is how near is near, in both directions.

import { addBox, addStroke, moveRegion, setBox } from "./edits.js";
import { boxBetween, clampBox, handleAt, moveBox, resizeBox, shapeAt, simplify, snapBox } from "./geometry.js";

const LEAST_DRAG = 0.5; // of the reach: less is a click
const OUTSIDE = [-1, 2]; // how far a stroke may leave the canvas

/** All boxes of a document but the selected one: what it may snap to. */
function others(document, selection) {
  return document.regions.flatMap(({ boxes }, region) =>
    boxes.filter((_, box) => region !== selection.region || box !== selection.box),
  );
}

/** Whether a drag snaps: Ctrl does the opposite, and so does Cmd, as Ctrl and a press open a menu on a Mac. */
function snaps(model, { ctrlKey, metaKey }) {
  return model.snap !== Boolean(ctrlKey || metaKey);
}

/** Says of every point of a drag whether it is still a click. Once it has gone far enough, it is not. */
function clickAt(start) {
  let moved = false;
  return (point, reach) => {
    moved ||= [0, 1].some((axis) => Math.abs(point[axis] - start[axis]) > LEAST_DRAG * reach[axis]);
    return !moved;
  };
}

/** Dragging the selected box (handle null) or one of its handles. */
function changing(model, handle, start) {
  const { selection, box: original } = model;
  const document = model.history.value;
  const isClick = clickAt(start); // which must not even snap
  return {
    move(point, reach, event) {
      if (isClick(point, reach)) return;
      const [dx, dy] = [point[0] - start[0], point[1] - start[1]];
      let box = handle === null ? moveBox(original, dx, dy) : resizeBox(original, handle, dx, dy);
      let guides = [];
      if (snaps(model, event)) ({ box, guides } = snapBox(box, handle, others(document, selection), reach));
      model.guides = guides;
      model.show(setBox(document, selection, box));
    },
    end: () => model.keep(),
  };
}

/** Dragging the selected region, which has only strokes: nothing on it snaps. */
function sliding(model, start) {
  const { region } = model.selection;
  const document = model.history.value;
  const isClick = clickAt(start);
  return {
    move(point, reach) {
      if (isClick(point, reach)) return;
      const [dx, dy] = point.map((value, axis) => Math.min(Math.max(value, 0), 1) - start[axis]); // some of it stays in sight
      model.show(moveRegion(document, region, dx, dy));
    },
    end: () => model.keep(),
  };
}

/** Drawing a box: a new region's, or with Shift one more of the selected region. */
function drawing(model, start, { shiftKey }) {
  const region = shiftKey && model.selection ? model.selection.region : null;
  let drawn = null;
  return {
    move(point, reach, event) {
      let box = boxBetween(start, point);
      model.guides = [];
      if (snaps(model, event)) {
        const handle = (point[1] < start[1] ? "n" : "s") + (point[0] < start[0] ? "w" : "e");
        const all = model.history.value.regions.flatMap(({ boxes }) => boxes);
        ({ box, guides: model.guides } = snapBox(box, handle, all, reach));
      }
      const far = Math.abs(point[0] - start[0]) > LEAST_DRAG * reach[0] && Math.abs(point[1] - start[1]) > LEAST_DRAG * reach[1];
      drawn = far ? clampBox(box) : null;
      model.set({ pending: drawn });
    },
    end() {
      model.pending = null;
      if (!drawn) model.select(null);
      else if (region === null) model.addRegion({ box: drawn });
      else {
        const added = addBox(model.history.value, region, drawn);
        model.apply(added, { region, box: added.regions[region].boxes.length - 1 });
      }
    },
  };
}

/** Painting or wiping with the brush: on the selected region, or a new one. */
function brushing(model, start, aspect) {
  const erase = model.tool === "eraser";
  const region = model.selection?.region ?? null;
  const points = [...start];
  const stroke = () => {
    // measured where both directions are as long, or a flat canvas would lose its curves
    const scaled = points.map((value, at) => value * (at % 2 ? 1 : aspect));
    const simplified = simplify(scaled, (model.radius * Math.min(1, aspect)) / 12).map((value, at) => value / (at % 2 ? 1 : aspect));
    const inside = simplified.map((value) => Math.min(Math.max(value, OUTSIDE[0]), OUTSIDE[1]));
    return erase ? { radius: model.radius, points: inside, erase } : { radius: model.radius, points: inside };
  };
  if (erase && region === null) return null;
  const show = () => model.set({ pendingStroke: { region, stroke: stroke() } });
  show();
  return {
    move(point) {
      points.push(...point);
      show();
    },
    end() {
      model.pendingStroke = null;
      if (region === null) model.addRegion({ stroke: stroke() });
      else model.apply(addStroke(model.history.value, region, stroke()));
    },
  };
}

/**
 * Begins what a press at a point means; null when it means nothing.
 * @returns {{move: Function, end: Function} | null} `move(point, reach, event)` for every move, `end()` at the release
 */
export function beginGesture(model, point, reach, event, aspect) {
  if (model.unread !== null) return null;
  model.guides = [];
  if (model.tool !== "box") return brushing(model, point, aspect);
  if (model.armed || event.shiftKey) return drawing(model, point, event);
  const handle = model.box && handleAt(model.box, point, reach);
  if (handle) return changing(model, handle, point);
  const hit = shapeAt(model.document.regions, point, model.selection, aspect);
  if (!hit) return drawing(model, point, event);
  model.select(hit);
  return hit.box === null ? sliding(model, point) : changing(model, null, point);
}

/** Ends a gesture without keeping anything. */
export function abandonGesture(model) {
  [model.pending, model.pendingStroke, model.guides] = [null, null, []];
  model.cancel();
}
