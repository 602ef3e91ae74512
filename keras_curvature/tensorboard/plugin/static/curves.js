// Curves over steps with error bands.

import {hideTooltip, html, showTooltip, svg} from './elements.js';
import {formatNumber, formatStep, formatWithError, linearTicks, logTicks} from './format.js';

const HEIGHT = 220;
const MOSTLY = 0.9;
const MARGIN = {left: 62, right: 14, top: 10, bottom: 26};

export class Curves {
  /** id names the chart in the document; onStep(step or null) follows the pointer. */
  constructor({id, onStep}) {
    this.onStep = onStep;
    this.title = html('h3', {});
    this.key = html('div', {class: 'key'});
    // The pictures come and go, the pointer stays: it is followed here.
    this.plot = html('div', {
      class: 'plot',
      onpointermove: (event) => this.hover(event),
      onpointerleave: () => this.leave(),
    });
    this.markedStep = null;
    this.note = html('p', {class: 'note'});
    this.node = html(
      'section', {class: 'card chart', 'data-chart': id},
      this.title, this.key, this.plot, this.note);
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  /**
   * series: [{run, name, colour, dashed, meaning, steps, values, errors, factor}], the band
   * being value ∓ factor × error, and `meaning` what the dashed lines of all runs are.
   * limit: {value, meaning} draws one dashed line for all runs. An empty list of series
   * shows the note `absent` instead.
   */
  update({title, series, logarithmic, bands, format, absent, limit}) {
    Object.assign(this, {series, bands, format: format ?? formatNumber, absent, limit});
    this.title.textContent = title;
    // A first guess of an eigenvalue may be negative; a few such points leave the picture.
    const known = series.flatMap((line) => line.values).filter((value) => value !== null);
    this.logarithmic = logarithmic &&
      known.filter((value) => value > 0).length >= MOSTLY * known.length;
    this.key.replaceChildren(...keyEntries(series, limit));
    this.draw();
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!this.series || width < 120) return;
    this.note.textContent = this.series.length ? '' : this.absent;
    this.note.hidden = this.series.length > 0;
    this.plot.hidden = this.series.length === 0;
    if (!this.series.length) return;

    this.scales(width);
    const {x, y} = this;
    const picture = svg('svg', {
      width, height: HEIGHT, role: 'img', 'aria-label': this.title.textContent});
    for (const tick of this.yTicks) {
      const at = y(tick);
      picture.append(
        svg('line', {class: 'grid', x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at}),
        svg('text', {class: 'tick', x: MARGIN.left - 8, y: at + 4, 'text-anchor': 'end'},
          this.format(tick)));
    }
    for (const tick of linearTicks(...this.xRange, Math.max(2, Math.floor(width / 110)))) {
      picture.append(svg(
        'text', {class: 'tick', x: x(tick), y: HEIGHT - 8, 'text-anchor': 'middle'},
        formatStep(tick)));
    }
    if (this.limit) {
      const at = y(this.limit.value);
      picture.append(svg('line', {
        class: 'limit', x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at}));
    }
    for (const line of this.series) {
      if (this.bands && line.errors) {
        picture.append(svg('path', {
          class: 'band', d: this.band(line), fill: line.colour, 'data-run': line.run}));
      }
    }
    for (const line of this.series) {
      picture.append(svg('path', {
        class: 'line', d: this.path(line), stroke: line.colour, 'data-run': line.run,
        'data-name': line.name, 'stroke-dasharray': line.dashed ? '6 4' : null}));
      const alone = line.values.filter((value) => value !== null).length === 1;
      if (alone) picture.append(...this.dots(line, (i) => line.values[i] !== null));
    }
    this.marker = svg('g', {class: 'marker'});
    picture.append(this.marker);
    this.plot.replaceChildren(picture);
    this.mark(this.markedStep);
  }

  scales(width) {
    const steps = this.series.flatMap((line) => [line.steps[0], line.steps.at(-1)]);
    const ends = this.series.flatMap((line) => extremes(line, this.bands, this.logarithmic));
    if (this.limit) ends.push(this.limit.value);
    let [low, high] = [Math.min(...ends), Math.max(...ends)];
    if (this.logarithmic) {
      if (high / low < 1.5) [low, high] = [low / 1.3, high * 1.3];
      const padding = (high / low) ** 0.06;
      [low, high] = [low / padding, high * padding];
    } else {
      const padding = (high - low || Math.abs(high) || 1) * 0.08;
      // Zero is worth seeing when the values come near it.
      const nearZero = low >= 0 && low < 0.3 * high;
      [low, high] = [nearZero ? 0 : low - padding, high + padding];
    }
    const first = Math.min(...steps);
    const last = Math.max(...steps, first + 1);
    this.xRange = [first, last];
    const across = width - MARGIN.left - MARGIN.right;
    const down = HEIGHT - MARGIN.top - MARGIN.bottom;
    this.x = (step) => MARGIN.left + ((step - first) / (last - first)) * across;
    const place = this.logarithmic
      ? (value) => Math.log(Math.max(value, low) / low) / Math.log(high / low)
      : (value) => (value - low) / (high - low);
    this.y = (value) => MARGIN.top + (1 - place(value)) * down;
    this.yTicks = this.logarithmic ? logTicks(low, high, 6) : linearTicks(low, high, 5);
  }

  visible(value) {
    return value !== null && !(this.logarithmic && value <= 0);
  }

  path(line) {
    let pen = 'M';
    let d = '';
    line.values.forEach((value, i) => {
      if (!this.visible(value)) return;
      d += `${pen}${this.x(line.steps[i]).toFixed(1)},${this.y(value).toFixed(1)}`;
      pen = 'L';
    });
    return d;
  }

  band(line) {
    const upper = [];
    const lower = [];
    line.values.forEach((value, i) => {
      const error = line.errors[i];
      if (!this.visible(value) || error === null) return;
      const at = this.x(line.steps[i]).toFixed(1);
      upper.push(`${at},${this.y(value + line.factor * error).toFixed(1)}`);
      lower.unshift(`${at},${this.y(value - line.factor * error).toFixed(1)}`);
    });
    return upper.length ? `M${upper.join('L')}L${lower.join('L')}Z` : '';
  }

  dots(line, wanted) {
    return line.steps.flatMap((step, i) => wanted(i)
      ? [svg('circle', {class: 'dot', cx: this.x(step), cy: this.y(line.values[i]), r: 3.5,
                        fill: line.colour})]
      : []);
  }

  /** Shows where a step is, whichever chart the pointer is in. */
  mark(step) {
    this.markedStep = step;
    if (!this.marker) return;
    this.marker.replaceChildren();
    if (step === null || !this.series.length) return;
    const at = this.x(step);
    this.marker.append(svg('line', {
      class: 'cursor', x1: at, x2: at, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom}));
    for (const line of this.series) {
      const i = nearest(line, step);
      this.marker.append(...this.dots(line, (k) => k === i));
    }
  }

  hover(event) {
    if (!this.series?.length || !this.xRange) return;
    const box = this.plot.getBoundingClientRect();
    const [first, last] = this.xRange;
    const across = box.width - MARGIN.left - MARGIN.right;
    const wanted = first + ((event.clientX - box.left - MARGIN.left) / across) * (last - first);
    const found = this.series
      .map((line) => ({line, i: nearest(line, wanted)}))
      .filter(({i}) => i >= 0);
    if (!found.length) return;
    const distance = ({line, i}) => Math.abs(line.steps[i] - wanted);
    const step = found.reduce((a, b) => (distance(a) <= distance(b) ? a : b));
    const at = step.line.steps[step.i];
    showTooltip(event, [
      html('strong', {}, `step ${formatStep(at)}`),
      ...found.map(({line, i}) => html(
        'div', {class: 'key-entry'}, sample(line),
        html('span', {}, `${line.name}: `, html('b', {}, this.describe(line, i)),
          line.steps[i] === at ? null : ` (step ${formatStep(line.steps[i])})`))),
    ]);
    this.onStep(at);
  }

  describe(line, i) {
    const error = line.errors?.[i];
    const band = error === null || error === undefined ? null : line.factor * error;
    return formatWithError(line.values[i], band, this.format);
  }

  leave() {
    hideTooltip();
    this.onStep(null);
  }
}

/** One entry for each run, and one for what all dashed lines have in common. */
function keyEntries(series, limit) {
  const entries = series.filter((line) => !line.dashed).map((line) => [line, line.name]);
  const meaning = limit?.meaning ?? series.find((line) => line.dashed)?.meaning;
  if (meaning && series.length) {
    entries.push([{dashed: true, colour: 'currentColor'}, meaning]);
  }
  return entries.map(
    ([line, name]) => html('span', {class: 'key-entry'}, sample(line), name));
}

function sample(line) {
  return svg('svg', {class: 'sample', width: 18, height: 8}, svg('line', {
    x1: 1, x2: 17, y1: 4, y2: 4, stroke: line.colour, 'stroke-width': 2.5,
    'stroke-dasharray': line.dashed ? '4 3' : null}));
}

function nearest(line, step) {
  let best = -1;
  line.steps.forEach((candidate, i) => {
    if (line.values[i] === null) return;
    if (best < 0 || Math.abs(candidate - step) < Math.abs(line.steps[best] - step)) best = i;
  });
  return best;
}

function extremes(line, bands, logarithmic) {
  const found = [];
  line.values.forEach((value, i) => {
    if (value === null || (logarithmic && value <= 0)) return;
    found.push(value);
    const error = bands && line.errors ? line.errors[i] : null;
    if (error === null) return;
    found.push(value + line.factor * error);
    // A band that reaches below zero has no place on a logarithmic axis.
    const lower = value - line.factor * error;
    if (!logarithmic || lower > 0.2 * value) found.push(lower);
  });
  return found;
}
