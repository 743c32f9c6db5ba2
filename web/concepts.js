// The pack's extensions of the host's page: the widget of Region Editor, and the picture that turns on Animate Anagram.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { FlipPicture } from "./flip.js";
import { ownTranslations, translate } from "./languages.js";
import { ELEMENT_OPTIONS, keepInSight, languageOf, passToCanvas, placeOf, tellChange } from "./page.js";
import { RegionEditor } from "./regions/editor.js";
import { backgroundAddress, canvasSize, conceptNames, forgetBackground } from "./regions/surroundings.js";

const WIDGET = "CONCEPTS_REGIONS"; // the name host/schema.py gives the input's widget
const editors = new WeakMap(); // by node
const FLIPPED = "ConceptsAnagramAnimate"; // the node with the picture that turns
const FLIP_HEIGHT = 260;
const [LEAST_WIDTH, LEAST_HEIGHT] = [400, 460];

function loadStyle() {
  const address = new URL("./concepts.css", import.meta.url).href;
  if (document.querySelector(`link[href="${address}"]`)) return;
  document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href: address }));
}

/** The address of a file as the host names it. */
function addressOf({ filename, subfolder = "", type = "temp" }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

/** Calls `more` after a method of an object; the method itself stays as it is. */
function after(object, method, more) {
  const before = object[method];
  object[method] = function (...given) {
    const result = before?.apply(this, given);
    more(...given);
    return result;
  };
}

/** Lets the host's canvas have what it uses itself: the middle button, the wheel, and a drag with Space held. */
function shareWithCanvas(element) {
  const isCanvasDrag = (event) => event.button === 1 || (event.buttons & 4) === 4 || app.canvas?.read_only;
  for (const name of ["pointerdown", "pointermove", "pointerup"]) {
    element.addEventListener(name, (event) => {
      if (isCanvasDrag(event) && placeOf(element) !== "panel") passToCanvas(app, event);
      else event.stopPropagation();
    });
  }
  element.addEventListener("wheel", (event) => {
    if (placeOf(element) === "panel") return; // which scrolls
    const list = event.target.closest?.(".concepts-rows, .concepts-fault");
    if (list && list.scrollHeight > list.clientHeight && !event.ctrlKey) event.stopPropagation();
    else passToCanvas(app, event);
  }, { passive: false });
}

/** Keeps an editor's surroundings up to date. */
function watchGraph(node, editor) {
  const canvasMessage = {};
  const update = () => {
    const surroundings = { concepts: conceptNames(node), background: backgroundAddress(node, canvasMessage.background) };
    editor.setSurroundings({ ...surroundings, ...canvasSize(node, canvasMessage), linked: editor.disabled() });
  };
  for (const name of ["width", "height"]) {
    const widget = node.widgets?.find((one) => one.name === name);
    if (widget) after(widget, "callback", update);
  }
  after(node, "onConnectionsChange", (...change) => {
    forgetBackground(node, canvasMessage, change);
    update();
  });
  for (const name of ["onConfigure", "onAdded"]) after(node, name, update); // a page may fill in widgets when the node is added
  after(node, "onExecuted", (message) => {
    const [canvas, background] = [message?.concepts_canvas?.[0], message?.concepts_background?.[0]];
    Object.assign(canvasMessage, canvas);
    if (background) canvasMessage.background = addressOf(background);
    update();
  });
  editor.element.addEventListener("pointerenter", update);
  update();
}

function regionsWidget(node, name) {
  let widget = null;
  const editor = new RegionEditor((text) => {
    widget.callback?.(text);
    node.graph?.setDirtyCanvas?.(true, true);
    tellChange(app);
  });
  editor.disabled = () => node.inputs?.some((input) => input.name === name && input.link != null) ?? false;
  widget = node.addDOMWidget(name, "concepts_regions", editor.element, {
    getValue: () => editor.model.text,
    setValue: (text) => editor.model.setText(text),
    getMinHeight: () => LEAST_HEIGHT,
    ...ELEMENT_OPTIONS,
  });
  keepInSight(widget);
  shareWithCanvas(editor.element);
  editors.set(node, editor);
  return { widget, minWidth: LEAST_WIDTH, minHeight: LEAST_HEIGHT };
}

app.registerExtension({
  name: "concepts.regions",
  getCustomWidgets() {
    loadStyle();
    return { [WIDGET]: regionsWidget };
  },
  nodeCreated(node) {
    // now it has its other widgets, and nobody has copied their callbacks yet
    if (editors.has(node)) watchGraph(node, editors.get(node));
  },
});

app.registerExtension({
  name: "concepts.flip",
  nodeCreated(node) {
    if (node.comfyClass !== FLIPPED) return;
    loadStyle();
    const picture = new FlipPicture(addressOf);
    // nothing of it is saved: what it shows comes from the last run
    const widget = node.addDOMWidget("concepts_flip", "concepts_flip", picture.element, {
      serialize: false, getMinHeight: () => FLIP_HEIGHT, ...ELEMENT_OPTIONS,
    });
    widget.serialize = false;
    shareWithCanvas(picture.element);
    after(node, "onExecuted", (message) => picture.show(message?.concepts_flip?.[0]));
  },
});

app.registerExtension({
  name: "concepts.languages",
  async addCustomNodeDefs(definitions) {
    const language = languageOf(app);
    if (language === "en") return;
    const served = await api.fetchApi("/i18n").then((answer) => (answer.ok ? answer.json() : {}));
    translate(definitions, ownTranslations(served, language));
  },
});
