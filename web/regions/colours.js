// A region's label and colour: its concept's if one is connected, else by its place.
// methods/region_picture.py has the same colours for the preview.

export const COLOURS = [
  "#4c9fe6", "#f2a33a", "#3fc08a", "#e06aa5", "#d9d14a", "#9a7fe0", "#e8694a", "#58c6d6",
];

/** A name as names are compared: case, blanks around it and an article say nothing. */
const bare = (name) => name.trim().toLowerCase().replace(/^(an?|the) /, "");

/**
 * The index a region's colour comes from: its concept's, or its own place among the regions.
 * @param {{label: string, names: string[]}[]} concepts
 */
export function colourIndex(region, place, concepts) {
  const concept = concepts.findIndex(({ names }) => names.map(bare).includes(bare(region.label)));
  return concept >= 0 ? concept : concepts.length + place;
}

/** The colour of a region, as CSS writes it. */
export function colourOf(region, place, concepts) {
  return COLOURS[colourIndex(region, place, concepts) % COLOURS.length];
}

/** A label for the next region: the first connected concept that has no region yet, else "region N". */
export function nextLabel(document, concepts) {
  const taken = new Set(document.regions.map(({ label }) => bare(label)));
  const free = concepts.find(({ label, names }) => ![label, ...names].some((name) => taken.has(bare(name))));
  if (free !== undefined) return free.label;
  let number = document.regions.length + 1;
  while (taken.has(`region ${number}`)) number++;
  return `region ${number}`;
}
