// What was chosen, in the address: a link shows another what one sees.

const MARK = 'p.curvature.';

/** The window whose address the reader sees; our own where that is not ours to read. */
function outer() {
  try {
    return window.parent.location.href ? window.parent : window;
  } catch {
    return window;  // Another origin: a notebook may wrap the page once more.
  }
}

/** The choices in the address: a dictionary of texts. */
export function readState() {
  const found = {};
  for (const [key, value] of new URL(outer().location.href).searchParams) {
    if (key.startsWith(MARK)) found[key.slice(MARK.length)] = value;
  }
  return found;
}

/** Puts choices into the address, and no new entry into the browser's history. */
export function writeState(state) {
  const view = outer();
  const url = new URL(view.location.href);
  for (const key of [...url.searchParams.keys()]) {
    if (key.startsWith(MARK)) url.searchParams.delete(key);
  }
  for (const [key, value] of Object.entries(state)) {
    if (value !== null && value !== undefined && value !== '') {
      url.searchParams.set(MARK + key, value);
    }
  }
  if (url.href !== view.location.href) view.history.replaceState(view.history.state, '', url);
}
