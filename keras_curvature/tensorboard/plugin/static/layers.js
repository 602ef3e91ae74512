// Names of layers and runs: what they have in common, and which belong together.

import {remembered} from './remembered.js';

/** What all of some names begin with, cut behind a separator. */
export function commonPrefix(names) {
  if (names.length < 2) return '';
  let end = 0;
  while (names.every((name) => end < name.length && name[end] === names[0][end])) end++;
  const prefix = names[0].slice(0, end);
  const cut = Math.max(...['/', '\\', '_', '-', '.'].map((mark) => prefix.lastIndexOf(mark)));
  return prefix.slice(0, cut + 1);
}

/** A layer's name without the numbers by which Keras tells models in a process apart. */
function plain(name) {
  return name.split('/').map((part) => part.replace(/_\d+$/, '')).join('/');
}

/**
 * Which layer of another model is which of this one: by its name, or else by the name
 * without Keras' counters and by its place among those that share it.
 */
export const matched = remembered((layers, others) => {
  const known = new Set(others);
  const places = new Map();
  for (const other of others) {
    const key = plain(other);
    places.set(key, [...(places.get(key) ?? []), other]);
  }
  const seen = new Map();
  return new Map(layers.map((layer) => {
    const key = plain(layer);
    const place = seen.get(key) ?? 0;
    seen.set(key, place + 1);
    return [layer, known.has(layer) ? layer : places.get(key)?.[place] ?? null];
  }));
});

function stem(name) {
  const slash = name.lastIndexOf('/');
  if (slash > 0) return name.slice(0, slash);
  const parts = name.split('_');
  return parts.length > 2 ? parts.slice(0, 2).join('_') : '';
}

/** Neighbouring layers whose names begin alike: [{name, rows}], '' for a single one. */
export function groupsOf(layers) {
  const groups = [];
  layers.forEach((layer, row) => {
    const name = stem(layer);
    const last = groups.at(-1);
    if (last && name && last.name === name) last.rows.push(row);
    else groups.push({name, rows: [row]});
  });
  return groups.map((group) => (group.rows.length > 1 ? group : {name: '', rows: group.rows}));
}

/** One figure for several layers at each step. */
export function together(rows, sizes, how) {
  return rows[0].map((_, column) => {
    let [sum, weight, seen] = [how === 'max' ? -Infinity : 0, 0, false];
    rows.forEach((row, i) => {
      const value = row[column];
      if (value === null) return;
      seen = true;
      weight += sizes[i] || 1;
      if (how === 'max') sum = Math.max(sum, value);
      else if (how === 'norm') sum += value ** 2;
      else sum += how === 'mean' ? value * (sizes[i] || 1) : value;
    });
    if (!seen) return null;
    return how === 'norm' ? Math.sqrt(sum) : how === 'mean' ? sum / weight : sum;
  });
}
