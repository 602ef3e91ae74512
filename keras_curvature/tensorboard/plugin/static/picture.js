// Saves a pane as SVG or PNG, with the look it has on the page.

import {svg} from './elements.js';

const LOOK = [
  'fill', 'stroke', 'stroke-width', 'stroke-dasharray', 'opacity', 'font-size',
  'font-family', 'font-weight', 'text-anchor',
];

function dressed(original) {
  const copy = original.cloneNode(true);
  const before = [original, ...original.querySelectorAll('*')];
  const after = [copy, ...copy.querySelectorAll('*')];
  before.forEach((node, i) => {
    const style = getComputedStyle(node);
    for (const name of LOOK) after[i].style[name] = style.getPropertyValue(name);
  });
  copy.querySelector('.marker')?.remove();
  return copy;
}

function label(text, x, y, style, anchor = 'start') {
  return svg('text', {
    x, y, 'text-anchor': anchor, fill: style.color, 'font-family': style.fontFamily,
    'font-size': 12}, text);
}

/** A pane as one SVG: its title, its key, and what `draws` puts below: {node, height}. */
function composed(card, body) {
  const style = getComputedStyle(card);
  const key = [...card.querySelectorAll('.key > .key-entry')].map((entry) => entry.textContent);
  const width = body.width + 24;
  const height = body.height + 56;
  const picture = svg('svg', {
    xmlns: 'http://www.w3.org/2000/svg', width, height, viewBox: `0 0 ${width} ${height}`});
  picture.append(
    svg('rect', {width, height, fill: style.backgroundColor}),
    label(card.querySelector('h3').textContent, 12, 20, style));
  let x = 12;
  for (const [i, text] of key.entries()) {
    const sample = card.querySelectorAll('.key > .key-entry .sample')[i];
    const mark = dressed(sample);
    mark.setAttribute('x', x);
    mark.setAttribute('y', 30);
    picture.append(mark, label(text, x + 24, 38, style));
    x += 44 + 7 * text.length;
  }
  const content = svg('g', {transform: 'translate(12 46)'}, ...body.nodes);
  picture.append(content);
  return picture;
}

function bodyOf(card) {
  const chart = card.querySelector('.plot > svg');
  if (chart) {
    return {nodes: [dressed(chart)], width: chart.clientWidth || +chart.getAttribute('width'),
            height: +chart.getAttribute('height')};
  }
  // A map: its picture, and the names and steps around it as text.
  const canvas = card.querySelector('canvas');
  const style = getComputedStyle(card);
  const left = 190;
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  const nodes = [svg('image', {
    href: canvas.toDataURL(), x: left, y: 0, width, height, preserveAspectRatio: 'none'})];
  for (const row of card.querySelectorAll('.row-label')) {
    const y = row.offsetTop - row.parentElement.offsetTop + row.offsetHeight / 2 + 4;
    nodes.push(label(row.textContent.slice(-28), left - 8, y, style, 'end'));
  }
  for (const step of card.querySelectorAll('.steps span')) {
    nodes.push(label(step.textContent, left + step.offsetLeft, height + 16, style, 'start'));
  }
  return {nodes, width: left + width, height: height + 24};
}

function save(url, name) {
  const link = document.createElement('a');
  Object.assign(link, {href: url, download: name});
  link.click();
}

/** The pane as text of an SVG file. */
export function asSvg(card) {
  return new XMLSerializer().serializeToString(composed(card, bodyOf(card)));
}

/** Saves a pane; kind is "svg" or "png". */
export async function saveCard(card, kind) {
  const name = `curvature-${card.dataset.chart ?? card.id}.${kind}`;
  const url = URL.createObjectURL(new Blob([asSvg(card)], {type: 'image/svg+xml'}));
  if (kind === 'svg') {
    save(url, name);
  } else {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [2 * image.width, 2 * image.height];
    canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
    save(canvas.toDataURL('image/png'), name);
  }
  URL.revokeObjectURL(url);
}
