// The little of a browser's page that panel.js needs: elements that remember what they were given and can be pressed.

class FakeElement {
  constructor(tag) {
    Object.assign(this, { tag, attributes: {}, listeners: {}, children: [], parent: null, style: {}, classes: new Set() });
    this.classList = { toggle: (name, on) => (on ? this.classes.add(name) : this.classes.delete(name)) };
  }

  setAttribute(name, value) {
    this.attributes[name] = String(value);
  }

  addEventListener(name, listener) {
    this.listeners[name] = listener;
  }

  append(...children) {
    for (const child of children) if (child instanceof FakeElement) child.parent = this;
    this.children.push(...children);
  }

  remove() {
    this.parent.children = this.parent.children.filter((child) => child !== this);
  }

  /** All elements in this one, in their order. */
  get inside() {
    return this.children.filter((child) => child instanceof FakeElement).flatMap((child) => [child, ...child.inside]);
  }

  /** The first element in this one whose title begins so. */
  titled(title) {
    return this.inside.find(({ attributes }) => attributes.title?.startsWith(title));
  }

  press() {
    this.listeners.click();
  }

  /** What a person types or drags a slider to. */
  enter(value, event = "change") {
    this.value = value;
    this.listeners[event]();
  }
}

globalThis.document = { createElement: (tag) => new FakeElement(tag), createElementNS: (_, tag) => new FakeElement(tag) };
