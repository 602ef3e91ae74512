// Colours that readers with any colour vision can tell apart.

// Viridis: even steps in lightness.
const VIRIDIS = [
  [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141],
  [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37],
];

/** Red, green and blue at a place between 0 and 1. */
function viridisParts(place) {
  const at = Math.min(Math.max(place, 0), 1) * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[i].map((c, k) => Math.round(c + (at - i) * (VIRIDIS[i + 1][k] - c)));
}

/** The colour at a place between 0 and 1. */
export function viridis(place) {
  return `rgb(${viridisParts(place).join(',')})`;
}

/** Many of them, red first: a map looks its colours up. */
export const VIRIDIS_TABLE = Array.from({length: 512}, (_, i) => viridisParts(i / 511));

// After Okabe and Ito, darker on white and lighter on grey.
const RUNS = {
  light: ['#0072b2', '#d55e00', '#009e73', '#b8529a', '#b07a00', '#3b9fd6', '#6c4a9e', '#5f6368'],
  dark: ['#56b4e9', '#ff8f4f', '#2fd0a0', '#ee9fcd', '#f5c04a', '#9ccbf5', '#bfa3ea', '#bdc1c6'],
};

/** The colour of the run with this number, in the page's current theme. */
export function runColour(number) {
  const colours = RUNS[document.documentElement.dataset.theme] ?? RUNS.light;
  return colours[number % colours.length];
}

/** Which of three strokes: the colours come again after eight runs. */
export function runStroke(number) {
  return Math.floor(number / RUNS.light.length) % 3;
}
