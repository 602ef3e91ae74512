// Curves over steps with error bands.

import {CONVERGED} from './data.js';
import {
  followWidth, help, hideTooltip, html, isShown, showTooltip, svg,
} from './elements.js';
import {formatNumber, formatStep, formatWithError, linearTicks, logTicks} from './format.js';
import {saveCard} from './picture.js';

const HEIGHT = 236;
const MOSTLY = 0.9;
const DOT_DISTANCE = 5;
const MARGIN = {left: 66, right: 14, top: 10, bottom: 40};
let charts = 0;

/** Title, explanation and buttons on top of every pane. */
export function cardHead(title, text, card) {
  const button = (kind) => html('button', {
    class: 'save', type: 'button', title: `Save this pane as ${kind.toUpperCase()}`,
    onclick: () => saveCard(card(), kind),
  }, kind.toUpperCase());
  return html('div', {class: 'card-head'}, title, text ? help(text) : null,
    html('span', {class: 'saves'}, button('svg'), button('png')));
}

export class Curves {
  /**
   * id names the chart in the document; onStep(step or null) follows the pointer;
   * onZoom([first, last] or null) asks for other steps; text explains the figure.
   */
  constructor({id, text, onStep, onZoom}) {
    Object.assign(this, {onStep, onZoom});
    this.title = html('h3', {});
    this.key = html('div', {class: 'key'});
    // The pictures come and go, the pointer stays: it is followed here.
    this.plot = html('div', {
      class: 'plot', tabindex: 0, role: 'group',
      onpointermove: (event) => this.hover(event),
      onpointerleave: () => this.leave(),
      onpointerdown: (event) => this.grab(event),
      onpointerup: (event) => this.release(event),
      ondblclick: () => this.onZoom(null),
      onkeydown: (event) => this.press(event),
      onblur: () => this.leave(),
    });
    this.markedStep = null;
    this.note = html('p', {class: 'note'});
    this.clip = `clip-${charts++}`;
    this.node = html(
      'section', {class: 'card chart', 'data-chart': id},
      cardHead(this.title, text, () => this.node), this.key, this.plot, this.note);
    this.width = followWidth(this.plot, () => this.draw());
  }

  /**
   * series: [{run, name, colour, dashed, meaning, steps, values, errors, factor, bound}], the
   * band being value ∓ factor × error, a point hollow where `bound` and its error is large,
   * and `meaning` what the dashed lines of all runs are.
   * limit: {value, meaning} draws one dashed line for all runs. An empty list of series
   * shows the note `absent` instead. zoom: the steps to show, or null for all.
   */
  update(wanted) {
    const {series, limit, ...rest} = wanted;
    const seen = [...Object.values(rest), limit?.value, limit?.meaning,
      ...series.flatMap((line) => Object.values(line))];
    if (isShown(this, seen)) return;
    const {title, axis, logarithmic, bands, smoothing, format, absent, zoom} = wanted;
    Object.assign(this, {bands, axis, absent, limit, zoom, format: format ?? formatNumber});
    this.series = series.map((line) => ({...line, shown: smoothed(line, smoothing)}));
    this.title.textContent = title;
    this.plot.setAttribute('aria-label', `${title}. Arrow keys go from step to step.`);
    // A first guess of an eigenvalue may be negative; a few such points leave the picture.
    const known = series.flatMap((line) => line.values).filter((value) => value !== null);
    this.zero = known.length > 0 && known.every((value) => value === 0);
    this.logarithmic = logarithmic &&
      known.filter((value) => value > 0).length >= MOSTLY * known.length;
    this.key.replaceChildren(...keyEntries(series, limit));
    this.draw();
  }

  draw() {
    if (!this.series) return;
    const empty = this.series.length === 0;
    this.note.textContent = empty ? this.absent : 'All values are zero.';
    this.note.hidden = !empty && !this.zero;
    this.note.classList.toggle('over', this.zero);
    this.plot.hidden = empty;
    const width = this.width();
    if (empty || width < 120) return;

    this.scales(width);
    const {x, y} = this;
    const [right, bottom] = [width - MARGIN.right, HEIGHT - MARGIN.bottom];
    const picture = svg('svg', {
      width, height: HEIGHT, role: 'img', 'aria-label': this.title.textContent});
    picture.append(svg('clipPath', {id: this.clip}, svg('rect', {
      x: MARGIN.left, y: MARGIN.top - 4, width: right - MARGIN.left,
      height: bottom - MARGIN.top + 8})));
    for (const tick of this.yTicks) {
      const at = y(tick);
      picture.append(
        svg('line', {class: 'grid', x1: MARGIN.left, x2: right, y1: at, y2: at}),
        svg('text', {class: 'tick', x: MARGIN.left - 8, y: at + 4, 'text-anchor': 'end'},
          this.format(tick)));
    }
    for (const tick of linearTicks(...this.xRange, Math.max(2, Math.floor(width / 110)))) {
      picture.append(svg(
        'text', {class: 'tick', x: x(tick), y: bottom + 16, 'text-anchor': 'middle'},
        formatStep(tick)));
    }
    const middle = (MARGIN.top + bottom) / 2;
    picture.append(
      svg('text', {class: 'axis', x: (MARGIN.left + right) / 2, y: HEIGHT - 6,
                   'text-anchor': 'middle'}, 'step of training'),
      svg('text', {class: 'axis', x: 12, y: middle, 'text-anchor': 'middle',
                   transform: `rotate(-90 12 ${middle})`},
        this.axis + (this.logarithmic ? ' (logarithmic)' : '')));
    const inside = svg('g', {'clip-path': `url(#${this.clip})`});
    picture.append(inside);
    if (this.limit) {
      const at = y(this.limit.value);
      inside.append(svg('line', {
        class: 'limit', x1: MARGIN.left, x2: right, y1: at, y2: at}));
    }
    for (const line of this.series) {
      if (this.bands && line.errors) {
        inside.append(svg('path', {
          class: 'band', d: this.band(line), fill: line.colour, 'data-run': line.run}));
      }
    }
    for (const line of this.series) {
      if (line.shown !== line.values) {
        inside.append(svg('path', {
          class: 'raw', d: this.path(line, line.values), stroke: line.colour}));
      }
      inside.append(svg('path', {
        class: 'line', d: this.path(line, line.shown), stroke: line.colour,
        'data-run': line.run, 'data-name': line.name, 'stroke-dasharray': dashes(line)}));
      const alone = line.values.filter((value) => value !== null).length === 1;
      if (alone) inside.append(...this.dots(line, (i) => line.values[i] !== null));
      if (line.bound) {
        inside.append(...this.dots(line, this.apart(line,
          (i) => isRough(line, i) && this.visible(line.values[i])), 'dot hollow'));
      }
    }
    this.selection = svg('rect', {class: 'selection', y: MARGIN.top, height: bottom - MARGIN.top});
    this.marker = svg('g', {class: 'marker'});
    picture.append(this.selection, this.marker);
    this.plot.replaceChildren(picture);
    this.mark(this.markedStep);
  }

  scales(width) {
    const steps = this.series.flatMap((line) => [line.steps[0], line.steps.at(-1)]);
    const [first, last] = this.zoom ?? [Math.min(...steps), Math.max(...steps)];
    this.xRange = [first, Math.max(last, first + 1)];
    // By the values: a band may be as wide as it likes, it ends with the picture.
    const ends = this.series.flatMap((line) => this.extremes(line));
    if (this.limit) ends.push(this.limit.value);
    let [low, high] = ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, 1];
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
    const across = width - MARGIN.left - MARGIN.right;
    const down = HEIGHT - MARGIN.top - MARGIN.bottom;
    const span = this.xRange[1] - first;
    this.x = (step) => MARGIN.left + ((step - first) / span) * across;
    const place = this.logarithmic
      ? (value) => Math.log(Math.max(value, low / 10) / low) / Math.log(high / low)
      : (value) => (value - low) / (high - low);
    this.y = (value) => MARGIN.top + (1 - place(value)) * down;
    this.yTicks = this.logarithmic ? logTicks(low, high, 6) : linearTicks(low, high, 5);
  }

  /** Of the values in sight that have converged; of all where none has. */
  extremes(line) {
    const [first, last] = this.xRange;
    const inSight = (i) => this.visible(line.shown[i]) &&
      line.steps[i] >= first && line.steps[i] <= last;
    const places = [...line.shown.keys()].filter(inSight);
    const good = places.filter((i) => !isRough(line, i));
    const values = (good.length ? good : places).map((i) => line.shown[i]);
    return values.length ? [Math.min(...values), Math.max(...values)] : [];
  }

  visible(value) {
    return value !== null && !(this.logarithmic && value <= 0);
  }

  path(line, values) {
    let pen = 'M';
    let d = '';
    values.forEach((value, i) => {
      if (!this.visible(value)) return;
      d += `${pen}${tenths(this.x(line.steps[i]))},${tenths(this.y(value))}`;
      pen = 'L';
    });
    return d;
  }

  band(line) {
    const upper = [];
    const lower = [];
    line.values.forEach((value, i) => {
      const error = line.errors[i];
      if (!this.visible(value) || error === null || error === undefined) return;
      const at = tenths(this.x(line.steps[i]));
      upper.push(`${at},${tenths(this.y(value + line.factor * error))}`);
      lower.push(`${at},${tenths(this.y(value - line.factor * error))}`);
    });
    return upper.length ? `M${upper.join('L')}L${lower.reverse().join('L')}Z` : '';
  }

  dots(line, wanted, kind = 'dot') {
    return line.steps.flatMap((step, i) => wanted(i)
      ? [svg('circle', {class: kind, cx: this.x(step), cy: this.y(line.shown[i]), r: 3.5,
                        fill: line.colour, stroke: line.colour})]
      : []);
  }

  /** Of the places that are wanted those that do not lie on one another. */
  apart(line, wanted) {
    let before = -Infinity;
    return (i) => {
      if (!wanted(i) || this.x(line.steps[i]) < before + DOT_DISTANCE) return false;
      before = this.x(line.steps[i]);
      return true;
    };
  }

  /** Shows where a step is, whichever chart the pointer is in. */
  mark(step) {
    this.markedStep = step;
    if (!this.marker) return;
    this.marker.replaceChildren();
    if (step === null || !this.series.length) return;
    const at = this.x(step);
    if (at < MARGIN.left - 1) return;
    this.marker.append(svg('line', {
      class: 'cursor', x1: at, x2: at, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom}));
    for (const line of this.series) {
      const i = nearest(line, step);
      if (i >= 0 && this.visible(line.shown[i])) {
        this.marker.append(...this.dots({...line, steps: [line.steps[i]],
          shown: [line.shown[i]]}, () => true));
      }
    }
  }

  stepAt(event) {
    const box = this.plot.getBoundingClientRect();
    const [first, last] = this.xRange;
    const across = box.width - MARGIN.left - MARGIN.right;
    const place = (event.clientX - box.left - MARGIN.left) / across;
    return first + Math.min(Math.max(place, 0), 1) * (last - first);
  }

  hover(event) {
    if (!this.series?.length || !this.xRange) return;
    const wanted = this.stepAt(event);
    if (this.grabbed !== undefined) {
      const [a, b] = [this.x(this.grabbed), this.x(wanted)];
      this.selection.setAttribute('x', Math.min(a, b));
      this.selection.setAttribute('width', Math.abs(b - a));
    }
    this.describe(wanted, event);
  }

  describe(wanted, event) {
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
        html('span', {}, `${line.name}: `, html('b', {}, this.valueOf(line, i)),
          line.steps[i] === at ? null : ` (step ${formatStep(line.steps[i])})`))),
    ]);
    this.onStep(at);
  }

  valueOf(line, i) {
    const error = line.errors?.[i];
    const band = error === null || error === undefined ? null : line.factor * error;
    const rough = isRough(line, i) ? ', not converged' : '';
    return formatWithError(line.values[i], band, this.format) + rough;
  }

  grab(event) {
    if (event.button !== 0 || !this.xRange) return;
    this.grabbed = this.stepAt(event);
    this.plot.setPointerCapture?.(event.pointerId);
  }

  release(event) {
    if (this.grabbed === undefined) return;
    const ends = [this.grabbed, this.stepAt(event)].sort((a, b) => a - b).map(Math.round);
    this.grabbed = undefined;
    this.selection?.setAttribute('width', 0);
    const far = this.x(ends[1]) - this.x(ends[0]) > 8;
    if (far && ends[1] > ends[0]) this.onZoom(ends);
  }

  press(event) {
    if (event.key === 'Escape') {
      this.leave();
      this.onZoom(null);
    }
    const direction = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!direction || !this.series?.length) return;
    event.preventDefault();
    const [first, last] = this.xRange;
    const steps = [...new Set(this.series.flatMap((line) => line.steps))]
      .filter((step) => step >= first && step <= last).sort((a, b) => a - b);
    const now = steps.indexOf(this.markedStep);
    const next = now < 0 ? (direction > 0 ? 0 : steps.length - 1) : now + direction;
    const at = steps[Math.min(Math.max(next, 0), steps.length - 1)];
    const box = this.plot.getBoundingClientRect();
    this.describe(at, {clientX: box.left + this.x(at), clientY: box.top + MARGIN.top});
  }

  leave() {
    hideTooltip();
    this.onStep(null);
  }
}

/** Of a pixel: a curve has no finer place. */
function tenths(pixels) {
  return Math.round(10 * pixels) / 10;
}

/** Whether a value's bound is too wide to rely on it. */
function isRough(line, i) {
  const error = line.errors?.[i];
  if (!line.bound || error === null || error === undefined || line.values[i] === null) {
    return false;
  }
  return error > CONVERGED * Math.abs(line.values[i]);
}

/** An average of the values before, each of them counting less. */
function smoothed(line, weight) {
  if (!(weight > 0) || line.dashed) return line.values;
  let [sum, total] = [0, 0];
  return line.values.map((value) => {
    if (value === null) return null;
    [sum, total] = [weight * sum + value, weight * total + 1];
    return sum / total;
  });
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

/** Runs beyond the colours are told apart by their strokes. */
function dashes(line) {
  return line.dashed ? '6 4' : [null, '12 3', '2 3'][line.stroke ?? 0];
}

function sample(line) {
  return svg('svg', {class: 'sample', width: 18, height: 8}, svg('line', {
    x1: 1, x2: 17, y1: 4, y2: 4, stroke: line.colour, 'stroke-width': 2.5,
    'stroke-dasharray': line.dashed ? '4 3' : dashes(line)}));
}

function nearest(line, step) {
  let best = -1;
  line.steps.forEach((candidate, i) => {
    if (line.values[i] === null) return;
    if (best < 0 || Math.abs(candidate - step) < Math.abs(line.steps[best] - step)) best = i;
  });
  return best;
}
