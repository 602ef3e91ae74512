// Layers over steps: one row a layer or a group of them, one column a probe.

import {followWidth, html, hideTooltip, showTooltip} from './elements.js';
import {formatNumber, formatShare, formatStep, formatWithError, logTicks} from './format.js';
import {viridis, VIRIDIS_TABLE} from './palette.js';

const DECADES = 6;

/** The interval of colours over several matrices, so that runs can be compared. */
export function colourScale(matrices, figure) {
  let [top, largest, smallest, negative] = [0, 0, Infinity, false];
  for (const rows of matrices) {
    for (const row of rows) {
      for (const value of row) {
        if (value === null) continue;
        const size = Math.abs(value);
        if (value > top) top = value;
        if (value < 0) negative = true;
        if (size > largest) largest = size;
        if (size > 0 && size < smallest) smallest = size;
      }
    }
  }
  if (figure.scale === 'share') {
    const high = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].find((t) => t >= top) ?? 1;
    return {kind: 'share', low: 0, high, place: (v) => v / high, zero: largest === 0};
  }
  const zero = largest === 0;
  largest = largest || 1;
  const low = Math.max(roundDown(Math.min(smallest, largest)), largest * 10 ** -DECADES);
  const high = Math.max(roundUp(largest), low * 10);
  const width = Math.log10(high / low);
  const place = (v) => (v === 0 ? 0 : Math.log10(Math.abs(v) / low) / width);
  return {kind: 'log', low, high, place, negative, zero};
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
   * onSelect(layer) when a row is chosen, onFold(group) when a group's row is, and
   * onStep(step or null) while the pointer moves.
   */
  constructor({onSelect, onFold, onStep}) {
    Object.assign(this, {onSelect, onFold, onStep});
    this.labels = html('div', {
      class: 'row-labels', role: 'listbox', 'aria-label': 'Layers',
      onkeydown: (event) => this.press(event),
    });
    this.canvas = html('canvas', {
      role: 'img',
      onpointermove: (event) => this.hover(event),
      onpointerleave: () => this.leave(),
      onclick: (event) => this.choose(event),
    });
    // What follows the pointer is drawn above the picture, which stays as it is.
    this.frame = html('div', {class: 'frame', hidden: true});
    this.axis = html('div', {class: 'steps', 'aria-hidden': 'true'});
    this.under = html('div', {class: 'under'}, html('div', {class: 'step-title'}, 'step'), this.axis);
    this.legend = html('div', {class: 'legend'});
    this.note = html('p', {class: 'note-line', hidden: true});
    this.plot = html('div', {class: 'plot'}, this.canvas, this.frame);
    this.scroll = html('div', {class: 'scroll', tabindex: -1}, this.labels, this.plot);
    this.node = html(
      'div', {class: 'heat-map'}, this.note, this.scroll, this.under, this.legend);
    this.pointer = null;
    this.width = followWidth(this.plot, () => this.draw());
  }

  /**
   * rows: [{name, label, values, errors, size, group, folded, level}], where `group` marks
   * the row of a group; steps: those of the columns; columns: [first, last] to show.
   */
  update({rows, steps, columns, figure, scale, selected, note}) {
    Object.assign(this, {rows, steps, columns, figure, scale, selected});
    this.row = rows.length <= 14 ? 28 : rows.length <= 40 ? 20 : 16;
    this.labels.style.lineHeight = `${this.row}px`;
    const key = JSON.stringify([
      selected, rows.map(({name, group, folded, size}) => [name, group, folded, size])]);
    if (key !== this.labelled) {
      this.labelled = key;
      const focused = document.activeElement?.dataset?.name;
      this.labels.replaceChildren(...rows.map((row) => this.label(row)));
      if (focused) {
        [...this.labels.children].find((one) => one.dataset.name === focused)?.focus();
      }
    }
    this.note.textContent = note ?? (scale.zero ? 'All values are zero.' : '');
    this.note.hidden = !this.note.textContent;
    this.legend.hidden = this.under.hidden = rows.length === 0;
    this.drawLegend();
    this.draw();
  }

  label(row) {
    const mark = row.group ? html('span', {class: 'fold'}, row.folded ? '▸ ' : '▾ ') : null;
    return html('button', {
      class: `row-label${row.group ? ' group' : ''}${row.level ? ' inner' : ''}`,
      role: 'option', title: describe(row), 'data-name': row.name,
      'aria-expanded': row.group ? String(!row.folded) : null,
      'aria-selected': String(!row.group && row.name === this.selected),
      onclick: () => (row.group ? this.onFold(row.name) : this.onSelect(row.name)),
    }, mark, row.label);
  }

  draw() {
    const width = this.width();
    if (!this.rows || width < 40) return;
    const [first, last] = this.columns;
    const count = last - first + 1;
    const height = this.row * this.rows.length;
    const dense = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * dense);
    this.canvas.height = Math.max(1, Math.round(height * dense));
    this.canvas.style.height = `${height}px`;
    this.canvas.setAttribute(
      'aria-label', `${this.figure.title}, layers over steps. The curve below has the numbers.`);
    const ink = getComputedStyle(this.node);
    const missing = channels(ink.getPropertyValue('--missing'));
    const pen = this.canvas.getContext('2d');
    if (!this.rows.length) return;
    // One pixel a cell, then stretched: a hundred thousand cells cost no more than that.
    const small = document.createElement('canvas');
    [small.width, small.height] = [count, this.rows.length];
    const image = small.getContext('2d').createImageData(count, this.rows.length);
    const {data} = image;
    const end = VIRIDIS_TABLE.length - 1;
    let at = 0;
    for (const {values} of this.rows) {
      for (let column = first; column <= last; column++) {
        const value = values[column] ?? null;
        const place = value === null ? 0 : Math.min(Math.max(this.scale.place(value), 0), 1);
        const [red, green, blue] = value === null
          ? missing : VIRIDIS_TABLE[Math.round(place * end)];
        data[at++] = red;
        data[at++] = green;
        data[at++] = blue;
        data[at++] = 255;
      }
    }
    small.getContext('2d').putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, 0, 0, this.canvas.width, this.canvas.height);
    pen.scale(dense, dense);
    pen.fillStyle = ink.getPropertyValue('--card');
    for (let i = 1; i <= this.rows.length; i++) pen.fillRect(0, i * this.row - 1, width, 1);
    if (this.scale.kind === 'log') {
      this.rows.forEach((row, i) => this.markNegative(pen, row, i, width / count));
    }
    pen.strokeStyle = ink.getPropertyValue('--accent');
    pen.lineWidth = 2;
    const chosen = this.rows.findIndex((row) => !row.group && row.name === this.selected);
    if (chosen >= 0) pen.strokeRect(1, chosen * this.row, width - 2, this.row - 1);
    this.drawAxis(width);
  }

  /** A line through what is negative, dark in light cells' and light in dark cells' sight. */
  markNegative(pen, row, i, width) {
    const [first, last] = this.columns;
    const y = i * this.row + (this.row - 1) / 2;
    for (let column = first; column <= last; column++) {
      if (!(row.values[column] < 0)) continue;
      let end = column;
      while (end < last && row.values[end + 1] < 0) end++;
      const inset = Math.min(3, width / 4);
      const [left, right] = [(column - first) * width + inset, (end - first + 1) * width - inset];
      for (const [colour, line] of [['rgba(0,0,0,.75)', 3], ['rgba(255,255,255,.95)', 1.2]]) {
        pen.strokeStyle = colour;
        pen.lineWidth = line;
        pen.beginPath();
        pen.moveTo(left, y);
        pen.lineTo(right, y);
        pen.stroke();
      }
      column = end;
    }
  }

  drawAxis(width) {
    const [first, last] = this.columns;
    const count = last - first + 1;
    const every = Math.max(1, Math.ceil(count / Math.max(2, Math.floor(width / 90))));
    const labels = [];
    for (let column = 0; column < count; column += every) {
      const label = html('span', {}, formatStep(this.steps[first + column]));
      label.style.left = `${((column + 0.5) * width) / count}px`;
      labels.push(label);
    }
    this.axis.style.marginLeft = `${this.labels.offsetWidth - 34}px`;
    this.axis.style.width = `${width}px`;
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
    const [first, last] = this.columns;
    const column = first + Math.floor(
      ((event.clientX - box.left) / box.width) * (last - first + 1));
    const row = Math.floor((event.clientY - box.top) / this.row);
    const inside = column >= first && column <= last && row >= 0 && row < this.rows.length;
    return inside ? {column, row} : null;
  }

  hover(event) {
    if (!this.rows) return;
    const pointer = this.place(event);
    if (!pointer) return this.leave();
    const row = this.rows[pointer.row];
    const [first, last] = this.columns;
    const width = this.plot.clientWidth / (last - first + 1);
    this.frame.hidden = false;
    Object.assign(this.frame.style, {
      left: `${(pointer.column - first) * width}px`, top: `${pointer.row * this.row}px`,
      width: `${Math.max(width, 2)}px`, height: `${this.row - 1}px`});
    const format = this.figure.scale === 'share' ? formatShare : formatNumber;
    const value = row.values[pointer.column] ?? null;
    const error = row.errors?.[pointer.column];
    showTooltip(event, [
      html('strong', {}, row.group ? `${row.name} (${row.size} layers)` : row.name),
      `step ${formatStep(this.steps[pointer.column])}`,
      `${this.figure.label}: ${formatWithError(value, error, format)}`,
    ]);
    this.onStep(this.steps[pointer.column]);
  }

  leave() {
    this.frame.hidden = true;
    hideTooltip();
    this.onStep(null);
  }

  choose(event) {
    const pointer = this.rows && this.place(event);
    if (!pointer) return;
    const row = this.rows[pointer.row];
    if (row.group) this.onFold(row.name);
    else this.onSelect(row.name);
  }

  press(event) {
    const move = {ArrowUp: -1, ArrowDown: 1}[event.key];
    if (!move) return;
    event.preventDefault();
    const rows = [...this.labels.children];
    const next = rows[rows.indexOf(document.activeElement) + move];
    if (!next) return;
    next.focus();
    const row = this.rows[rows.indexOf(next)];
    if (!row.group) this.onSelect(row.name);
  }
}

function describe(row) {
  if (row.group) return `${row.name}: ${row.size} layers. Press to ${row.folded ? 'un' : ''}fold.`;
  return row.size ? `${row.name}: ${formatStep(row.size)} parameters` : row.name;
}

/** Red, green and blue of a colour like #dadce0. */
function channels(colour) {
  const digits = colour.trim().replace('#', '');
  const wide = digits.length === 3 ? [...digits].map((d) => d + d).join('') : digits;
  return [0, 2, 4].map((i) => parseInt(wide.slice(i, i + 2), 16));
}
