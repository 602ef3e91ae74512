// A distribution at each probe, side by side: step to the right, value upwards.

import {cardHead} from './curves.js';
import {followWidth, hideTooltip, html, isShown, showTooltip, svg} from './elements.js';
import {formatNumber, formatShare, formatStep, linearTicks} from './format.js';
import {viridis} from './palette.js';

const HEIGHT = 236;
const MARGIN = {left: 66, right: 14, top: 10, bottom: 40};
const THRESHOLD = 1e-8;

/** Curvature at a place on the histograms' axis; see signed_log.py. */
function fromAxis(place) {
  return Math.sign(place) * THRESHOLD * (10 ** Math.abs(place) - 1);
}

export class Strata {
  constructor({id, text}) {
    this.title = html('h3', {});
    this.plot = html('div', {
      class: 'plot', onpointermove: (event) => this.hover(event), onpointerleave: hideTooltip});
    this.note = html('p', {class: 'note'});
    this.node = html('section', {class: 'card chart', 'data-chart': id},
      cardHead(this.title, text, () => this.node), this.plot, this.note);
    this.width = followWidth(this.plot, () => this.draw());
  }

  /**
   * columns: [{step, bins: [[low, high, weight]]}]; colours are logarithmic in the weight.
   * signedLog: whether the ends of bins are places on the histograms' axis.
   */
  update(wanted) {
    if (isShown(this, Object.values(wanted))) return;
    const {title, axis, columns, signedLog, absent, says, zoom} = wanted;
    Object.assign(this, {axis, signedLog, says});
    this.columns = columns.filter(
      ({step}) => !zoom || (step >= zoom[0] && step <= zoom[1]));
    this.title.textContent = title;
    this.note.textContent = absent;
    this.note.hidden = this.columns.length > 0;
    this.plot.hidden = !this.columns.length;
    this.draw();
  }

  draw() {
    const width = this.width();
    if (!this.columns?.length || width < 120) return;
    const {columns} = this;
    const bins = columns.flatMap((column) => column.bins).filter((bin) => bin[2] > 0);
    let low = Math.min(...bins.map((bin) => bin[0]));
    let high = Math.max(...bins.map((bin) => bin[1]));
    if (!bins.length) [low, high] = [0, 1];
    const most = Math.max(...bins.map((bin) => bin[2]), 0);
    const least = Math.max(Math.min(...bins.map((bin) => bin[2])), most * 1e-5);
    const shade = (weight) => (most > least ? Math.log(weight / least) / Math.log(most / least) : 1);
    const across = width - MARGIN.left - MARGIN.right;
    const down = HEIGHT - MARGIN.top - MARGIN.bottom;
    const y = (value) => MARGIN.top + ((high - value) / (high - low)) * down;
    const each = across / columns.length;
    Object.assign(this, {low, high, each});
    const picture = svg('svg', {
      width, height: HEIGHT, role: 'img', 'aria-label': this.title.textContent});
    columns.forEach((column, i) => {
      for (const [from, to, weight] of column.bins) {
        if (!(weight >= least)) continue;
        picture.append(svg('rect', {
          x: MARGIN.left + i * each, y: y(to), width: Math.max(each - 0.4, 0.6),
          height: Math.max(y(from) - y(to), 0.6), fill: viridis(shade(weight))}));
      }
    });
    const ticks = this.signedLog
      ? linearTicks(low, high, 12).filter(Number.isInteger) : linearTicks(low, high, 6);
    for (const tick of ticks) {
      const label = formatNumber(this.signedLog ? round(fromAxis(tick)) : tick);
      picture.append(svg('text', {
        class: 'tick', x: MARGIN.left - 8, y: y(tick) + 4, 'text-anchor': 'end'}, label));
    }
    if (low < 0 && high > 0) {
      picture.append(svg('line', {
        class: 'zero', x1: MARGIN.left, x2: width - MARGIN.right, y1: y(0), y2: y(0)}));
    }
    const every = Math.max(1, Math.ceil(columns.length / Math.floor(width / 90)));
    for (let i = 0; i < columns.length; i += every) {
      picture.append(svg('text', {
        class: 'tick', x: MARGIN.left + (i + 0.5) * each, y: HEIGHT - MARGIN.bottom + 16,
        'text-anchor': 'middle'}, formatStep(columns[i].step)));
    }
    const middle = MARGIN.top + down / 2;
    picture.append(
      svg('text', {class: 'axis', x: MARGIN.left + across / 2, y: HEIGHT - 6,
                   'text-anchor': 'middle'}, 'step of training'),
      svg('text', {class: 'axis', x: 12, y: middle, 'text-anchor': 'middle',
                   transform: `rotate(-90 12 ${middle})`}, this.axis));
    this.plot.replaceChildren(picture);
  }

  hover(event) {
    if (!this.each) return;
    const box = this.plot.getBoundingClientRect();
    const column = this.columns[Math.floor((event.clientX - box.left - MARGIN.left) / this.each)];
    const down = HEIGHT - MARGIN.top - MARGIN.bottom;
    const at = this.high -
      ((event.clientY - box.top - MARGIN.top) / down) * (this.high - this.low);
    const bin = column?.bins.find(([low, high]) => at >= low && at < high);
    if (!bin) return hideTooltip();
    const show = (place) => formatNumber(this.signedLog ? round(fromAxis(place)) : place);
    const sum = column.bins.reduce((total, one) => total + one[2], 0);
    showTooltip(event, [
      html('strong', {}, `step ${formatStep(column.step)}`),
      `${show(bin[0])} to ${show(bin[1])}`,
      `${this.says}: ${formatShare(bin[2] / sum)}`,
    ]);
  }
}

function round(value) {
  return Number(value.toPrecision(2));
}
