// What the editor reads from the graph around its node. It changes nothing there.

import { cutLabel } from "./document.js";

const FARTHEST = 64; // links followed in a chain of concepts
const INPUT = 1; // how the host says that a connection changed at an input, not at an output

const widgetOf = (node, name) => node?.widgets?.find((widget) => widget.name === name);

/** The node at the other end of an input's link, or null. */
export function sourceOf(node, input) {
  const slot = node.inputs?.findIndex(({ name }) => name === input) ?? -1;
  if (slot < 0 || node.inputs[slot].link == null) return null;
  return node.getInputNode?.(slot) ?? null;
}

const written = (node, name) => String(widgetOf(node, name)?.value ?? "").trim();

/** A LoRA's name as in host/lora/files.py: its file without folder and ending; of a PEFT adapter, its folder. */
function fileName(path) {
  const parts = path.split(/[\\/]/);
  const file = parts.pop().replace(/\.[^.]*$/, "");
  return file === "adapter_model" && parts.length ? parts.at(-1) : file;
}

/** A concept's label for a new region, and all names under which a region finds it when the graph runs. */
function concept(node) {
  const [phrase, file] = [written(node, "phrase"), fileName(written(node, "lora"))];
  const names = [phrase || written(node, "prompt"), file].filter(Boolean);
  return { label: cutLabel(phrase || file || node.title || ""), names };
}

/** The concepts in a chain of their nodes, first to last. Each node's chain goes on through its own `concepts` input. */
export function conceptNames(node) {
  const concepts = [];
  let link = sourceOf(node, "concepts");
  while (link && concepts.length < FARTHEST) {
    concepts.unshift(concept(link));
    link = sourceOf(link, "concepts");
  }
  return concepts;
}

/** The canvas's size from the widgets, or from the message of the last run where an input is linked. */
export function canvasSize(node, canvasMessage) {
  const side = (name) => {
    const linked = node.inputs?.some((input) => input.name === name && input.link != null);
    const value = Number(linked ? canvasMessage?.[name] : widgetOf(node, name)?.value);
    return Number.isFinite(value) && value > 0 ? value : 1;
  };
  const size = { width: side("width"), height: side("height") };
  return size.width === 1 || size.height === 1 ? { width: 1, height: 1 } : size;
}

/** The address of the background: the last run's while it is connected, else the picture that the node there shows. */
export function backgroundAddress(node, lastAddress) {
  const source = sourceOf(node, "background");
  if (!source) return "";
  const shown = source.imgs?.[0]?.src;
  return lastAddress || (typeof shown === "string" ? shown : "");
}

/** Drops the last run's background when its own connection changes. */
export function forgetBackground(node, canvasMessage, [direction, slot]) {
  if (direction === INPUT && node.inputs?.[slot]?.name === "background") canvasMessage.background = "";
}
