// The page "Curvature": where is the model stiff, and how did that change?

import {Curves} from './curves.js';
import {
  csvAddress, fetchRuns, fetchTable, FIGURES, firstOf, lastOf, stabilityOf, styleAddress,
} from './data.js';
import {html} from './elements.js';
import {formatNumber, formatShare, formatStep, formatWithError} from './format.js';
import {colourScale, HeatMap} from './heat_map.js';
import {followTheme, onReload} from './host.js';
import {runColour} from './palette.js';

const REFRESH_SECONDS = 15;
const COMPARED_AT_FIRST = 6;

const EXAMPLE = `import keras_curvature as kc

monitor = kc.CurvatureMonitor(
    probe_data=(x_probe, y_probe), log_dir="logs/run1")
model.fit(x, y, callbacks=[monitor])`;

class Page {
  constructor() {
    this.runs = [];          // What the server lists.
    this.tables = new Map(); // What was read, by run.
    this.numbers = new Map(); // A run keeps its colour when others appear.
    this.compared = null;    // The runs whose curves are shown; null until runs are known.
    this.focus = null;       // The run in the heat map.
    this.figure = FIGURES[0];
    this.layer = null;
    this.logarithmic = true;
    this.bands = true;
    this.live = true;
    this.build();
  }

  build() {
    const onStep = (step) => this.markStep(step);
    this.heatMap = new HeatMap({onSelect: (layer) => this.select({layer}), onStep});
    this.layerCurves = new Curves({id: 'layer', onStep});
    this.stability = new Curves({id: 'stability', onStep});
    this.eigenvalue = new Curves({id: 'max_eigenvalue', onStep});
    this.norm = new Curves({id: 'frobenius_norm', onStep});
    this.trace = new Curves({id: 'trace', onStep});
    this.loss = new Curves({id: 'loss', onStep});
    this.charts = [
      this.layerCurves, this.stability, this.eigenvalue, this.norm, this.trace, this.loss];

    this.runList = html('ul', {class: 'runs', id: 'runs'});
    this.figureList = html('div', {class: 'figures', id: 'figures', role: 'radiogroup'});
    this.answer = html('p', {id: 'answer'});
    this.tiles = html('div', {class: 'tiles', id: 'tiles'});
    this.csv = html('a', {class: 'button', id: 'csv', download: 'curvature.csv'},
      'Download CSV');
    this.message = html('div', {class: 'message', id: 'message'});
    this.problem = html('div', {class: 'problem', id: 'problem', role: 'alert', hidden: true});
    this.mapTitle = html('h3', {});
    this.content = html(
      'div', {class: 'content'},
      html('header', {class: 'summary'}, this.answer, this.csv), this.tiles,
      html('section', {class: 'card', id: 'heat-map'}, this.mapTitle, this.heatMap.node),
      html('div', {class: 'charts'}, ...this.charts.map((chart) => chart.node)));
    this.node = html(
      'div', {class: 'page', id: 'page', 'data-state': 'loading'},
      html(
        'aside', {},
        html('h2', {}, 'Runs'), this.runList,
        html('h2', {}, 'Diagonal by layer'), this.figureList,
        html('h2', {}, 'Curves'),
        this.toggle('logarithmic', 'Logarithmic axis'),
        this.toggle('bands', 'Error bands'),
        html('h2', {}, 'Updates'),
        this.toggle('live', 'Follow the training')),
      html('main', {}, this.problem, this.message, this.content));
  }

  toggle(name, text) {
    const box = html('input', {
      type: 'checkbox', id: name, checked: true,
      onchange: () => this.select({[name]: box.checked}),
    });
    return html('label', {class: 'toggle'}, box, text);
  }

  select(change) {
    Object.assign(this, change);
    this.draw();
  }

  async refresh() {
    if (this.refreshing) return;
    this.refreshing = true;
    let changed = true;
    try {
      const before = JSON.stringify(this.runs);
      this.adopt(await fetchRuns());
      const unread = this.runs
        .filter(({run}) => this.compared.has(run) || run === this.focus)
        .filter(({run, last_step: last}) => this.tables.get(run)?.readUpTo !== last);
      await Promise.all(unread.map(({run, last_step: last}) => this.read(run, last)));
      changed = unread.length > 0 || JSON.stringify(this.runs) !== before ||
        this.node.dataset.state === 'loading';
      this.problem.hidden = true;
    } catch (error) {
      this.problem.textContent =
        `TensorBoard does not answer (${error.message}). Trying again.`;
      this.problem.hidden = false;
    } finally {
      this.refreshing = false;
    }
    if (changed) this.draw();
  }

  adopt(runs) {
    const isNew = ({run}) => !this.numbers.has(run);
    for (const {run} of runs.filter(isNew)) {
      this.numbers.set(run, this.numbers.size);
      if (this.compared && this.compared.size < COMPARED_AT_FIRST) this.compared.add(run);
    }
    const names = runs.map(({run}) => run);
    this.runs = runs;
    this.compared ??= new Set(names.slice(0, COMPARED_AT_FIRST));
    for (const run of this.compared) if (!names.includes(run)) this.compared.delete(run);
    if (!names.includes(this.focus)) this.focus = names[0] ?? null;
  }

  async read(run, last) {
    const table = await fetchTable(run);
    table.readUpTo = last;
    this.tables.set(run, table);
  }

  compare(run, shown) {
    if (shown) this.compared.add(run);
    else this.compared.delete(run);
    this.draw();
    this.refresh();
  }

  /** What is on the page follows from the fields above, and from nothing else. */
  draw() {
    const table = this.tables.get(this.focus);
    const filled = table && table.steps.length > 0;
    const state = filled ? 'ready' : this.compared === null ? 'loading'
      : this.runs.length ? 'waiting' : 'empty';
    this.node.dataset.state = state;
    this.message.replaceChildren(...MESSAGES[state]());
    this.drawRuns();
    this.drawFigures(table);
    if (!filled) return;
    if (!table.layers.includes(this.layer)) this.layer = this.stiffest(table)?.layer ?? null;
    this.drawSummary(table);
    this.drawHeatMap(table);
    this.drawCurves();
  }

  drawRuns() {
    this.runList.replaceChildren(...this.runs.map(({run, last_step: last}) => {
      const box = html('input', {
        type: 'checkbox', checked: this.compared.has(run), title: 'Show in the curves',
        'aria-label': `Show ${run} in the curves`,
        onchange: () => this.compare(run, box.checked),
      });
      box.style.accentColor = this.colour(run);
      const name = html('button', {
        class: 'run-name', title: `${run}: show in the heat map`,
        'aria-pressed': String(run === this.focus),
        onclick: () => {
          this.compared.add(run);
          this.select({focus: run});
          this.refresh();
        },
      }, shortName(run));
      const step = html('span', {class: 'run-step'}, last === null ? '' : formatStep(last));
      return html('li', {'data-run': run}, box, name, step);
    }));
  }

  drawFigures(table) {
    const known = table ? FIGURES.filter(({key}) => table.layer_figures[key]) : [];
    if (known.length && !known.includes(this.figure)) this.figure = known[0];
    this.figureList.replaceChildren(...known.map((figure) => {
      const button = html('input', {
        type: 'radio', name: 'figure', value: figure.key, checked: figure === this.figure,
        onchange: () => this.select({figure}),
      });
      return html('label', {class: 'toggle'}, button, figure.label);
    }));
  }

  drawSummary(table) {
    const step = formatStep(table.steps.at(-1));
    const parts = [`At step ${step} of ${shortName(this.focus)}`];
    const stiffest = this.stiffest(table);
    const format = this.figure.scale === 'share' ? formatShare : formatNumber;
    if (stiffest) {
      const negative = this.figure.key === 'negative_share';
      parts.push(negative ? ', ' : ', the stiffest layer is ',
        html('strong', {}, stiffest.layer),
        negative ? ' has the largest share of negative curvature'
          : ` by ${this.figure.says}`,
        `: ${format(stiffest.value)}${growth(stiffest, this.figure)}.`);
    } else {
      parts.push(':');
    }
    const stability = lastOf(stabilityOf(table.figures)?.shares)?.value;
    if (stability !== undefined) {
      const share = formatShare(stability);
      parts.push(' The largest curvature that the optimizer sees ', stability > 1
        ? html('strong', {}, `exceeds its stability threshold (${share} of it).`)
        : `is ${share} of its stability threshold.`);
    }
    if (table.mode) parts.push(` Layers ran as in ${table.mode}.`);
    this.answer.replaceChildren(...parts);

    const tile = (label, key, error, format = formatNumber) => {
      const last = lastOf(table.figures[key]);
      if (last === null) return null;
      const text = formatWithError(last.value, table.figures[error]?.[last.at], format);
      return html(
        'div', {class: 'tile', 'data-figure': key},
        html('div', {class: 'tile-label'}, label), html('div', {class: 'tile-value'}, text));
    };
    const tiles = [
      tile('Loss on the probe', 'loss'),
      tile('Trace', 'hessian_trace', 'hessian_trace_standard_error'),
      tile('Frobenius norm', 'hessian_frobenius_norm',
        'hessian_frobenius_norm_standard_error'),
      tile('Largest eigenvalue', 'hessian_max_eigenvalue', 'hessian_max_eigenvalue_error'),
      tile('Seen by the optimizer', 'hessian_preconditioned_max_eigenvalue',
        'hessian_preconditioned_max_eigenvalue_error'),
      tile('Stability threshold', 'stability_threshold'),
      tile('Products per probe', 'num_matvecs'),
      tile('Time spent on probes', 'overhead', null, formatShare),
    ];
    this.tiles.replaceChildren(...tiles.filter(Boolean));
    const runs = new Set([this.focus, ...this.compared]);
    this.csv.setAttribute('href', csvAddress([...runs].sort()));
    this.csv.title = `All figures of ${runs.size === 1 ? 'this run' : `${runs.size} runs`}`;
  }

  /** The layer with the largest last value of the chosen figure. */
  stiffest(table) {
    const found = Object.entries(table.layer_figures[this.figure.key] ?? {})
      .map(([layer, column]) => ({layer, column, value: lastOf(column)?.value}))
      .filter(({value}) => value !== undefined);
    return found.length ? found.reduce((a, b) => (b.value > a.value ? b : a)) : null;
  }

  drawHeatMap(table) {
    const shown = this.shown().map(({table: other}) => other);
    const scale = colourScale([...new Set([table, ...shown])], this.figure);
    this.mapTitle.textContent =
      `${this.figure.title}, by layer and step · ${shortName(this.focus)}`;
    const hidden = table.layers.length === 0;
    this.heatMap.node.parentElement.hidden = hidden;
    if (hidden) return;
    this.heatMap.update({table, figure: this.figure, scale, selected: this.layer});
  }

  drawCurves() {
    const shown = this.shown();
    const share = this.figure.scale === 'share';
    const common = {logarithmic: this.logarithmic, bands: this.bands};
    this.layerCurves.update({
      ...common,
      title: `${this.figure.label} · ${this.layer ?? 'no layer'}`,
      logarithmic: this.logarithmic && !share,
      format: share ? formatShare : formatNumber,
      absent: 'The chosen runs have no such figure for this layer.',
      series: shown.flatMap(({run, table}) => this.series(run, table, {
        values: table.layer_figures[this.figure.key]?.[this.layer],
        errors: table.layer_figures[this.figure.error]?.[this.layer], factor: 2})),
    });
    this.stability.update({
      ...common,
      title: 'Edge of stability: curvature that the optimizer sees / its threshold',
      format: formatShare,
      absent: 'The chosen runs tell no threshold, or no eigenvalue.',
      limit: {value: 1, meaning: 'unstable above'},
      series: shown.flatMap(({run, table}) => {
        const stability = stabilityOf(table.figures);
        return stability ? this.series(run, table, {
          values: stability.shares, errors: stability.errors, factor: 1}) : [];
      }),
    });
    this.eigenvalue.update({
      ...common,
      title: 'Largest eigenvalue of the Hessian',
      absent: 'No largest eigenvalue was computed in the chosen runs.',
      series: shown.flatMap(({run, table}) => [
        ...this.series(run, table, {
          values: table.figures.hessian_max_eigenvalue,
          errors: table.figures.hessian_max_eigenvalue_error, factor: 1}),
        ...this.series(run, table, {
          values: table.figures.two_over_learning_rate,
          dashed: true, meaning: '2 / learning rate',
          name: `${shortName(run)}: 2 / learning rate`}),
      ]),
    });
    for (const [chart, key, title] of [
      [this.norm, 'hessian_frobenius_norm', 'Frobenius norm of the Hessian'],
      [this.trace, 'hessian_trace', 'Trace of the Hessian'],
      [this.loss, 'loss', 'Loss on the probe data'],
    ]) {
      chart.update({
        ...common, title, absent: 'The chosen runs have no such figure.',
        series: shown.flatMap(({run, table}) => this.series(run, table, {
          values: table.figures[key], errors: table.figures[`${key}_standard_error`],
          factor: 2})),
      });
    }
  }

  shown() {
    return this.runs
      .filter(({run}) => this.compared.has(run) && this.tables.get(run)?.steps.length)
      .map(({run}) => ({run, table: this.tables.get(run)}));
  }

  series(run, {steps}, {values, errors, factor, dashed, meaning, name}) {
    if (!values?.some((value) => value !== null)) return [];
    return [{
      run, steps, values, errors, factor, dashed, meaning, name: name ?? shortName(run),
      colour: this.colour(run)}];
  }

  colour(run) {
    return runColour(this.numbers.get(run));
  }

  markStep(step) {
    for (const chart of this.charts) chart.mark(step);
  }
}

const MESSAGES = {
  ready: () => [],
  loading: () => [
    html('div', {class: 'spinner'}), html('p', {}, 'Reading the runs …')],
  waiting: () => [
    html('div', {class: 'spinner'}),
    html('p', {}, 'The run has begun; its first figures are on the way.')],
  empty: () => [
    html('h2', {}, 'No curvature was found in these logs'),
    html('p', {}, 'Give the monitor a few samples and the directory that TensorBoard reads:'),
    html('pre', {}, EXAMPLE),
    html('p', {}, 'This page fills by itself once the first probe is written.')],
};

function shortName(run) {
  return run.replace(/[\\/]curvature$/, '');
}

function growth({column}, figure) {
  const first = firstOf(column);
  const last = lastOf(column);
  if (figure.scale === 'share' || first.at === last.at || first.value <= 0) return '';
  return `, ${formatNumber(last.value / first.value)} times its first value`;
}

/** Called by TensorBoard once the page's frame is there. */
export async function render() {
  const page = new Page();
  document.title = 'Curvature';
  document.documentElement.lang = 'en';
  document.head.append(html('link', {rel: 'stylesheet', href: styleAddress()}));
  document.body.append(page.node);
  followTheme(() => page.draw());
  onReload(() => page.refresh());
  setInterval(() => {
    if (page.live && !document.hidden) page.refresh();
  }, 1000 * REFRESH_SECONDS);
  page.draw();
  await page.refresh();
}
