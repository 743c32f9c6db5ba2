// What differs between the pages of ComfyUI, and between their two node renderers. Nothing else in this folder asks for it.
// Tested on pages 1.32.9, 1.49.6 and 1.58.1 (tests/web). What a page can do is looked for, never its version.

/** Where the page has put a widget's element: over the "canvas", in a "node" of the new renderer, or in a "panel" (App mode). */
export function placeOf(element) {
  if (element.closest(".lg-node")) return "node";
  return element.closest(".dom-widget") ? "canvas" : "panel";
}

/**
 * Gives the host's canvas a pointer or wheel event that happened on an element of ours. In the new renderer some pages
 * pass such events on themselves and others end them. Here the event always ends, and the canvas gets a copy.
 */
export function passToCanvas(app, event) {
  event.stopPropagation();
  event.preventDefault();
  app.canvas.canvas.dispatchEvent(new event.constructor(event.type, event));
}

/** Options of every widget with an element of ours. A side panel would show an empty strip: an element is in one place only. */
export const ELEMENT_OPTIONS = { hideOnZoom: false, hideInPanel: true };

/**
 * Keeps a widget in sight while its input is linked. Later pages take it off the node and may leave a hole. The page fades
 * the element then, and some pages look at that again only when it has moved: so it moves by a hundredth of a pixel.
 */
export function keepInSight(widget) {
  const { margin } = widget;
  Object.defineProperty(widget, "margin", { get: () => margin + (widget.computedDisabled ? 0.01 : 0) });
  widget.isVisible = () => !widget.hidden && (widget.node?.isWidgetVisible?.(widget) ?? true);
  Object.defineProperty(widget, "connectionSuppressed", { get: () => false, set: () => {} });
}

/** Tells the page that a widget was changed by hand, for its own undo. */
export function tellChange(app) {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  if (tracker?.captureCanvasState) tracker.captureCanvasState();
  else tracker?.checkState?.();
}

/** The language the page is in, as its settings name it. */
export function languageOf(app) {
  return app.extensionManager?.setting?.get?.("Comfy.Locale") ?? app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en";
}
