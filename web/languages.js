// Our nodes in the page's language. Hosts around 0.3.75 fetch a pack's translations and then lose them when they load their own
// for that language; so what of ours is still in English is filled in before the nodes are registered. Text only.

/**
 * The pack's own translations among those of all packs, as the host serves them by language. A form of a language that has
 * none takes those of the language: whoever reads traditional Chinese (zh-TW) gets Chinese names instead of English ones.
 */
export function ownTranslations(served, language) {
  const there = served[language] ?? served[language.split("-")[0]];
  return Object.fromEntries(Object.entries(there?.nodeDefs ?? {}).filter(([id]) => id.startsWith("Concepts")));
}

/** Puts translations over the definitions of nodes: names, descriptions, tooltips. Both as the host serves them. */
export function translate(definitions, translations) {
  for (const [id, texts] of Object.entries(translations ?? {})) {
    const node = definitions[id];
    if (!node) continue;
    if (texts.display_name) node.display_name = texts.display_name;
    if (texts.description) node.description = texts.description;
    for (const section of Object.values(node.input ?? {})) {
      for (const [name, declared] of Object.entries(section ?? {})) {
        const { tooltip, name: shown } = texts.inputs?.[name] ?? {};
        const options = Array.isArray(declared) ? declared[1] : null;
        if (!options || typeof options !== "object") continue;
        if (tooltip) options.tooltip = tooltip;
        if (shown) options.display_name = shown;
      }
    }
    for (const [at, { tooltip }] of Object.entries(texts.outputs ?? {})) {
      if (tooltip && node.output_tooltips) node.output_tooltips[at] = tooltip;
    }
  }
}
