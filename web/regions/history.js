// Undo and redo over values that are never changed in place.

const LONGEST = 100;

/** A history that stands at `value`. */
export function startHistory(value) {
  return { past: [], value, future: [] };
}

/** The history after a change; what was undone before it is gone. The same value again is no change. */
export function record(history, value) {
  if (value === history.value) return history;
  return { past: [...history.past, history.value].slice(-LONGEST), value, future: [] };
}

/** One step back, or the same history at its beginning. */
export function undo(history) {
  if (!history.past.length) return history;
  return { past: history.past.slice(0, -1), value: history.past.at(-1), future: [history.value, ...history.future] };
}

/** One step forward again, or the same history at its end. */
export function redo(history) {
  if (!history.future.length) return history;
  return { past: [...history.past, history.value], value: history.future[0], future: history.future.slice(1) };
}
