// Nodes of a graph as the host's page has them, as far as the editor looks at them.

/** A node: `widgets` by name and value, `inputs` by name and the node at the other end, or null. */
export function fakeNode({ widgets = {}, inputs = {}, ...more }) {
  const sources = Object.values(inputs);
  return {
    widgets: Object.entries(widgets).map(([name, value]) => ({ name, value })),
    inputs: Object.entries(inputs).map(([name, source]) => ({ name, link: source ? 1 : null })),
    getInputNode: (slot) => sources[slot],
    ...more,
  };
}

/** An editor's node behind a chain of concept nodes, given first to last by their widgets. */
export function withConcepts(...concepts) {
  const last = concepts.reduce((before, widgets) => fakeNode({ widgets, inputs: { concepts: before }, title: "Concept" }), null);
  return fakeNode({ inputs: { concepts: last } });
}
