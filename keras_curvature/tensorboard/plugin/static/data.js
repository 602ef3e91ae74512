// The server's routes, and the figures they speak of.

/**
 * Figures of a layer, for the heat map and the layer's curve.
 * scale: "log" for curvature, whose sign is marked; "share" for 0 to 1.
 */
export const FIGURES = [
  {key: 'diagonal_mean', label: 'Mean', scale: 'log', error: 'diagonal_mean_standard_error',
   says: 'mean curvature', title: 'Mean of the Hessian’s diagonal'},
  {key: 'diagonal_mean_abs', label: 'Mean absolute', scale: 'log',
   says: 'mean absolute curvature', title: 'Mean absolute value of the Hessian’s diagonal'},
  {key: 'diagonal_max', label: 'Maximum', scale: 'log',
   says: 'largest curvature', title: 'Maximum of the Hessian’s diagonal'},
  {key: 'negative_share', label: 'Share negative', scale: 'share',
   says: 'share of negative curvature',
   title: 'Share of negative entries in the Hessian’s diagonal'},
  {key: 'trace', label: 'Trace', scale: 'log', error: 'trace_standard_error',
   says: 'trace', title: 'Sum of the Hessian’s diagonal'},
  {key: 'frobenius_share', label: 'Share of ‖H‖²', scale: 'share',
   says: 'share of the squared Frobenius norm',
   title: 'Share of the Hessian’s squared Frobenius norm'},
];

function address(route) {
  return new URL(route, import.meta.url);
}

async function get(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
  return response.json();
}

export async function fetchRuns() {
  return (await get(address('runs'))).runs;
}

export function fetchTable(run) {
  const url = address('table');
  url.searchParams.append('run', run);
  return get(url);
}

export function csvAddress(runs) {
  const url = address('csv');
  for (const run of runs) url.searchParams.append('run', run);
  return url.href;
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

/**
 * How near a run is to the edge of stability, or null: the largest curvature that its
 * optimizer sees as a share of the threshold, and the share's error.
 *
 * With a preconditioner that is the preconditioned Hessian's, whose bound is there before
 * the eigenvalue itself is. A threshold is only known for some optimizers.
 */
export function stabilityOf(figures) {
  const threshold = figures.stability_threshold;
  const seen = figures.hessian_preconditioned_max_eigenvalue_error
    ? 'hessian_preconditioned_max_eigenvalue' : 'hessian_max_eigenvalue';
  if (!threshold || !figures[seen]) return null;
  const share = (column) => column?.map((value, i) =>
    value === null || !(threshold[i] > 0) ? null : value / threshold[i]);
  return {shares: share(figures[seen]), errors: share(figures[`${seen}_error`])};
}
