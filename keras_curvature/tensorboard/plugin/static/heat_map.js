// Layers over steps: one row a layer, one column a probe.

import {html, hideTooltip, showTooltip} from './elements.js';
import {formatNumber, formatShare, formatStep, formatWithError, logTicks} from './format.js';
import {viridis} from './palette.js';

const DECADES = 6;

/** The interval of colours over several tables, so that runs can be compared. */
export function colourScale(tables, figure) {
  const values = tables
    .flatMap((table) => Object.values(table.layer_figures[figure.key] ?? {}))
    .flat()
    .filter((value) => value !== null);
  if (figure.scale === 'share') {
    const top = values.reduce((a, b) => Math.max(a, b), 0);
    const high = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].find((t) => t >= top) ?? 1;
    return {kind: 'share', low: 0, high, place: (v) => v / high};
  }
  const sizes = values.map(Math.abs).filter((size) => size > 0);
  const largest = sizes.reduce((a, b) => Math.max(a, b), 0) || 1;
  const smallest = sizes.reduce((a, b) => Math.min(a, b), largest);
  const low = Math.max(roundDown(smallest), largest * 10 ** -DECADES);
  const high = Math.max(roundUp(largest), low * 10);
  const width = Math.log10(high / low);
  const place = (v) => (v === 0 ? 0 : Math.log10(Math.abs(v) / low) / width);
  return {kind: 'log', low, high, place, negative: values.some((v) => v < 0)};
}

function roundDown(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [5, 2, 1].find((u) => u * power <= value * 1.0001) * power;
}

function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((u) => u * power >= value * 0.9999) * power;
}

export class HeatMap {
  /**
   * onSelect(layer) when a row is chosen, onStep(step or null) while the pointer moves.
   */
  constructor({onSelect, onStep}) {
    this.onSelect = onSelect;
    this.onStep = onStep;
    this.labels = html('div', {class: 'row-labels', role: 'listbox', 'aria-label': 'Layers'});
    this.canvas = html('canvas', {
      role: 'img',
      onpointermove: (event) => this.hover(event),
      onpointerleave: () => this.leave(),
      onclick: (event) => this.choose(event),
    });
    this.axis = html('div', {class: 'steps', 'aria-hidden': 'true'});
    this.legend = html('div', {class: 'legend'});
    this.plot = html('div', {class: 'plot'}, this.canvas, this.axis);
    this.node = html(
      'div', {class: 'heat-map'},
      html('div', {class: 'scroll'}, this.labels, this.plot), this.legend,
    );
    this.pointer = null;
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  update({table, figure, scale, selected}) {
    Object.assign(this, {table, figure, scale, selected});
    const layers = table.layers;
    this.row = layers.length <= 14 ? 28 : layers.length <= 40 ? 20 : 14;
    this.labels.style.lineHeight = `${this.row}px`;
    this.labels.replaceChildren(
      ...layers.map((layer, i) =>
        html('button', {
          class: 'row-label', role: 'option', title: this.describe(layer, i),
          'aria-selected': String(layer === selected),
          onclick: () => this.onSelect(layer),
        }, layer)),
    );
    this.drawLegend();
    this.draw();
  }

  describe(layer, i) {
    const size = this.table.sizes[i];
    return size ? `${layer}: ${formatStep(size)} parameters` : layer;
  }

  value(layer, column) {
    return this.table.layer_figures[this.figure.key]?.[layer]?.[column] ?? null;
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!this.table || width < 40) return;
    const {layers, steps} = this.table;
    const height = this.row * layers.length;
    const dense = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * dense);
    this.canvas.height = Math.round(height * dense);
    this.canvas.style.height = `${height}px`;
    this.canvas.setAttribute(
      'aria-label', `${this.figure.label} of the Hessian's diagonal, layers over steps`);
    const ink = getComputedStyle(this.node);
    const missing = ink.getPropertyValue('--missing');
    const pen = this.canvas.getContext('2d');
    pen.scale(dense, dense);
    const edge = (column) => Math.round((column * width * dense) / steps.length) / dense;
    layers.forEach((layer, i) => {
      for (let column = 0; column < steps.length; column++) {
        const value = this.value(layer, column);
        const left = edge(column);
        const right = edge(column + 1);
        pen.fillStyle = value === null ? missing : viridis(this.scale.place(value));
        pen.fillRect(left, i * this.row, right - left, this.row - 1);
        if (value < 0 && this.scale.kind === 'log') {
          markNegative(pen, left, i * this.row, right - left, this.row - 1);
        }
      }
    });
    pen.strokeStyle = ink.getPropertyValue('--accent');
    pen.lineWidth = 2;
    const chosen = layers.indexOf(this.selected);
    if (chosen >= 0) pen.strokeRect(1, chosen * this.row, width - 2, this.row - 1);
    if (this.pointer) {
      pen.strokeStyle = ink.getPropertyValue('--text');
      pen.lineWidth = 1.5;
      const left = edge(this.pointer.column);
      const right = edge(this.pointer.column + 1);
      pen.strokeRect(left, this.pointer.row * this.row, right - left, this.row - 1);
    }
    this.drawAxis(width);
  }

  drawAxis(width) {
    const {steps} = this.table;
    const every = Math.max(1, Math.ceil(steps.length / Math.max(2, Math.floor(width / 90))));
    const labels = [];
    for (let column = 0; column < steps.length; column += every) {
      const label = html('span', {}, formatStep(steps[column]));
      label.style.left = `${((column + 0.5) * width) / steps.length}px`;
      labels.push(label);
    }
    this.axis.replaceChildren(...labels);
  }

  drawLegend() {
    const {low, high, kind, negative} = this.scale;
    const stops = Array.from({length: 17}, (_, i) => viridis(i / 16)).join(',');
    const bar = html('div', {class: 'legend-bar'});
    bar.style.background = `linear-gradient(to right, ${stops})`;
    const format = kind === 'share' ? formatShare : formatNumber;
    const ticks = kind === 'share' ? [0, high / 2, high] : logTicks(low, high, 5);
    const marks = html('div', {class: 'legend-marks'}, ...ticks.map((value) => {
      const mark = html('span', {}, format(value));
      const place = kind === 'share' ? value / high : this.scale.place(value);
      mark.style.left = `${100 * place}%`;
      return mark;
    }));
    const notes = [html('span', {class: 'swatch missing'}), 'no value'];
    if (negative) notes.unshift(html('span', {class: 'swatch negative'}), 'negative');
    this.legend.replaceChildren(
      html('div', {class: 'legend-scale'}, bar, marks),
      html('div', {class: 'legend-notes'}, ...notes));
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor(
      ((event.clientX - box.left) / box.width) * this.table.steps.length);
    const row = Math.floor((event.clientY - box.top) / this.row);
    const inside = column >= 0 && column < this.table.steps.length &&
      row >= 0 && row < this.table.layers.length;
    return inside ? {column, row} : null;
  }

  hover(event) {
    if (!this.table) return;
    const pointer = this.place(event);
    if (!pointer) return this.leave();
    const moved = pointer.column !== this.pointer?.column || pointer.row !== this.pointer?.row;
    this.pointer = pointer;
    if (moved) this.draw();
    const {layers, steps, layer_figures: figures} = this.table;
    const layer = layers[pointer.row];
    const value = this.value(layer, pointer.column);
    const format = this.figure.scale === 'share' ? formatShare : formatNumber;
    const error = figures[this.figure.error]?.[layer]?.[pointer.column];
    showTooltip(event, [
      html('strong', {}, layer),
      `step ${formatStep(steps[pointer.column])}`,
      `${this.figure.label}: ${formatWithError(value, error, format)}`,
    ]);
    this.onStep(steps[pointer.column]);
  }

  leave() {
    this.pointer = null;
    hideTooltip();
    this.onStep(null);
    this.draw();
  }

  choose(event) {
    const pointer = this.table && this.place(event);
    if (pointer) this.onSelect(this.table.layers[pointer.row]);
  }
}

// A stroke across the cell, dark in light cells' and light in dark cells' sight alike.
function markNegative(pen, x, y, width, height) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, width, height);
  pen.clip();
  for (const [colour, line] of [['rgba(0,0,0,.75)', 3], ['rgba(255,255,255,.95)', 1.2]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = line;
    pen.beginPath();
    pen.moveTo(x + width / 2 - 4, y + height / 2);
    pen.lineTo(x + width / 2 + 4, y + height / 2);
    pen.stroke();
  }
  pen.restore();
}
