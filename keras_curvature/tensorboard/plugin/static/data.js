// The server's routes, and the figures they speak of.

import {remembered} from './remembered.js';

/**
 * Figures of a layer, for the heat map and the layer's curve.
 * scale: "log" for curvature, whose sign is marked; "share" for 0 to 1.
 * together: how the figures of several layers make one of a group.
 */
export const FIGURES = [
  {key: 'diagonal_mean', label: 'Mean', scale: 'log', error: 'diagonal_mean_standard_error',
   together: 'mean', says: 'mean curvature', title: 'Mean of the Hessian’s diagonal'},
  {key: 'diagonal_mean_abs', label: 'Mean absolute', scale: 'log', together: 'mean',
   says: 'mean absolute curvature', title: 'Mean absolute value of the Hessian’s diagonal'},
  {key: 'diagonal_max', label: 'Maximum', scale: 'log', together: 'max',
   says: 'largest curvature', title: 'Maximum of the Hessian’s diagonal'},
  {key: 'negative_share', label: 'Share negative', scale: 'share', together: 'mean',
   says: 'share of negative curvature',
   title: 'Share of negative entries in the Hessian’s diagonal'},
  {key: 'trace', label: 'Trace', scale: 'log', error: 'trace_standard_error',
   together: 'sum', says: 'trace', title: 'Sum of the Hessian’s diagonal'},
  {key: 'frobenius_share', label: 'Share of ‖H‖²', scale: 'share', together: 'sum',
   says: 'share of the squared Frobenius norm',
   title: 'Share of the Hessian’s squared Frobenius norm'},
  {key: 'gradient_norm', label: 'Gradient norm', scale: 'log', together: 'norm',
   says: 'norm of the gradient', title: 'Norm of the gradient'},
  {key: 'update_ratio', label: 'Update / weights', scale: 'log', together: 'max',
   says: 'change of its weights in a step',
   title: 'Change of the weights in a step over their norm'},
];

function address(route, query = {}) {
  const url = new URL(route, import.meta.url);
  for (const [name, values] of Object.entries(query)) {
    for (const value of [values].flat()) url.searchParams.append(name, value);
  }
  return url;
}

async function answer(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
  return response;
}

async function get(url) {
  return (await answer(url)).json();
}

export async function fetchRuns() {
  return (await get(address('runs'))).runs;
}

export function fetchTable(run) {
  return get(address('table', {run}));
}

/** What of a run is asked for, so that it has the steps of a table. */
function partOf(run, {every, steps}) {
  return {run, every, last: steps.at(-1)};
}

/** One figure of all layers, rows of layers, at the steps of a table; null if unknown. */
export async function fetchLayers(run, figure, table) {
  const response = await answer(address('layers', {...partOf(run, table), figure}));
  const values = new Float32Array(await response.arrayBuffer());
  if (!values.length) return null;
  const count = values.length / table.layers.length;
  // As in JSON, what is not there is null.
  return table.layers.map((_, i) => {
    const row = new Array(count);
    for (let j = 0; j < count; j++) {
      const value = values[i * count + j];
      row[j] = Number.isFinite(value) ? value : null;
    }
    return row;
  });
}

/** All figures of one layer, at the steps of a table. */
export async function fetchLayer(run, layer, table) {
  return (await get(address('layer', {...partOf(run, table), layer}))).figures;
}

export function fetchDensity(run) {
  return get(address('density', {run}));
}

export function fetchHistogram(run, tag) {
  return get(address('histogram', {run, tag}));
}

export function csvAddress(runs) {
  return address('csv', {run: runs}).href;
}

export function styleAddress() {
  return address('curvature.css').href;
}

/** The last value of a column and its place, or null. */
export function lastOf(column) {
  if (!column) return null;
  for (let i = column.length - 1; i >= 0; i--) {
    if (column[i] !== null) return {at: i, value: column[i]};
  }
  return null;
}

export function firstOf(column) {
  const at = column ? column.findIndex((value) => value !== null) : -1;
  return at < 0 ? null : {at, value: column[at]};
}

export function median(column) {
  const known = (column ?? []).filter((value) => value !== null).sort((a, b) => a - b);
  return known.length ? known[known.length >> 1] : null;
}

/** An eigenvalue has converged when its bound is no more than this share of it. */
export const CONVERGED = 0.25;

/**
 * How near a run is to the edge of stability, or null: the largest curvature that its
 * optimizer sees as a share of the threshold, and the share's error.
 *
 * With a preconditioner that is the preconditioned Hessian's, whose bound is there before
 * the eigenvalue itself is. A threshold is only known for some optimizers.
 */
export const stabilityOf = remembered((figures) => {
  const threshold = figures.stability_threshold;
  const seen = figures.hessian_preconditioned_max_eigenvalue_error
    ? 'hessian_preconditioned_max_eigenvalue' : 'hessian_max_eigenvalue';
  if (!threshold || !figures[seen]) return null;
  const share = (column) => column?.map((value, i) =>
    value === null || !(threshold[i] > 0) ? null : value / threshold[i]);
  return {shares: share(figures[seen]), errors: share(figures[`${seen}_error`])};
});
