// The page "Curvature": where is the model stiff, and how did that change?

import {Arrivals} from './arrivals.js';
import {Comparison} from './comparison.js';
import {cardHead, Curves} from './curves.js';
import {
  csvAddress, fetchDensity, fetchHistogram, fetchLayer, fetchLayers, fetchRuns, fetchTable,
  FIGURES, firstOf, lastOf, median, stabilityOf, styleAddress,
} from './data.js';
import {help, html, isShown} from './elements.js';
import {formatNumber, formatShare, formatStep, formatWithError} from './format.js';
import {colourScale, HeatMap} from './heat_map.js';
import {HELP} from './help.js';
import {followTheme, onReload} from './host.js';
import {commonPrefix, groupsOf, matched, together} from './layers.js';
import {runColour, runStroke} from './palette.js';
import {remembered} from './remembered.js';
import {readState, writeState} from './state.js';
import {Strata} from './strata.js';

const REFRESH_SECONDS = 15;
const COMPARED_AT_FIRST = 6;
// Deeper models have groups of layers, and still deeper ones begin with them folded.
const GROUPED_BEYOND = 24;
const FOLDED_BEYOND = 60;
const WHOLE = '_whole_model';

const EXAMPLE = `import keras_curvature as kc

monitor = kc.CurvatureMonitor(
    probe_data=(x_probe, y_probe), log_dir="logs/run1")
model.fit(x, y, callbacks=[monitor])`;

const CHARTS = [
  ['layer', HELP.layer],
  ['stability', HELP.stability_ratio],
  ['max_eigenvalue', HELP.hessian_max_eigenvalue],
  ['frobenius_norm', HELP.hessian_frobenius_norm],
  ['trace', HELP.hessian_trace],
  ['loss', HELP.loss],
  ['gradient_norm', HELP.gradient_norm],
  ['gradient_noise_scale', HELP.gradient_noise_scale],
  ['update_ratio', HELP.update_ratio],
];

class Page {
  constructor() {
    this.runs = [];          // What the server lists.
    this.tables = new Map(); // What was read, by run.
    this.numbers = new Map(); // A run keeps its colour when others appear.
    this.compared = null;    // The runs whose curves are shown; null until runs are known.
    this.focus = null;       // The run in the heat map.
    this.versus = null;      // The run that it is compared with, layer by layer.
    this.figure = FIGURES[0];
    this.layer = null;
    this.logarithmic = true;
    this.bands = true;
    this.live = true;
    this.smoothing = 0;
    this.sort = 'depth';
    this.wantedLayers = '';  // What layers' and runs' names are filtered by.
    this.wantedRuns = '';
    this.folds = new Map();  // By group; others are as the size of the model asks for.
    this.zoom = null;        // First and last step to show.
    const soon = () => {
      this.ask();
      this.drawSoon();
    };
    this.matrices = new Arrivals(fetchLayers, soon);
    this.layerFigures = new Arrivals(fetchLayer, soon);
    this.densities = new Arrivals(fetchDensity, soon);
    this.histograms = new Arrivals(fetchHistogram, soon);
    this.arrivals = [this.matrices, this.layerFigures, this.densities, this.histograms];
    this.built = new Map();
    [this.drawn, this.cost] = [0, 0];  // When it was drawn last, and how long that took.
    this.restore(readState());
    this.build();
  }

  /** Takes what was chosen from the address. */
  restore(state) {
    this.focus = state.run ?? null;
    this.versus = state.versus ?? null;
    this.layer = state.layer ?? null;
    this.figure = FIGURES.find(({key}) => key === state.figure) ?? this.figure;
    this.logarithmic = state.log !== '0';
    this.bands = state.bands !== '0';
    this.smoothing = Number(state.smooth ?? 0) || 0;
    this.sort = ['value', 'growth'].includes(state.sort) ? state.sort : 'depth';
    this.wantedLayers = state.layers ?? '';
    this.wantedRuns = state.filter ?? '';
    const zoom = (state.steps ?? '').split('-').map(Number);
    this.zoom = zoom.length === 2 && zoom[1] > zoom[0] ? zoom : null;
    this.chosenRuns = state.runs === undefined ? null : state.runs.split(',').filter(Boolean);
    for (const part of (state.folds ?? '').split(',').filter(Boolean)) {
      this.folds.set(part.slice(1), part[0] === '-');
    }
  }

  /** Puts what differs from the first sight into the address. */
  remember() {
    if (this.compared === null) return;
    writeState({
      run: this.focus === this.runs[0]?.run ? null : this.focus,
      versus: this.versus,
      runs: this.chosenRuns === null ? null : [...this.compared].join(',') || ',',
      layer: this.chosenLayer ? this.layer : null,
      figure: this.figure === FIGURES[0] ? null : this.figure.key,
      log: this.logarithmic ? null : '0',
      bands: this.bands ? null : '0',
      smooth: this.smoothing || null,
      sort: this.sort === 'depth' ? null : this.sort,
      layers: this.wantedLayers,
      filter: this.wantedRuns,
      steps: this.zoom?.join('-'),
      folds: [...this.folds].map(([name, folded]) => (folded ? '-' : '+') + name).join(','),
    });
  }

  build() {
    const onStep = (step) => this.markStep(step);
    const onZoom = (zoom) => this.select({zoom});
    const onSelect = (layer) => this.select({layer, chosenLayer: true});
    this.heatMap = new HeatMap({onSelect, onFold: (group) => this.fold(group), onStep});
    this.curves = Object.fromEntries(
      CHARTS.map(([id, text]) => [id, new Curves({id, text, onStep, onZoom})]));
    this.density = new Strata({id: 'density', text: HELP.density});
    this.diagonal = new Strata({id: 'histogram', text: HELP.histogram});
    this.gradient = new Strata({id: 'gradient_histogram', text: HELP.gradient_histogram});
    this.comparison = new Comparison({
      text: HELP.comparison, onSelect,
      onChoose: (versus) => {
        this.select({versus});
        this.refresh();
      }});

    this.runList = html('ul', {class: 'runs', id: 'runs'});
    this.runNote = html('p', {class: 'quiet', id: 'run-prefix'});
    this.runFilter = html('input', {
      type: 'search', id: 'run-filter', placeholder: 'Filter runs', value: this.wantedRuns,
      'aria-label': 'Show runs whose names contain this text',
      oninput: () => this.select({wantedRuns: this.runFilter.value})});
    this.figureList = html('div', {class: 'figures', id: 'figures', role: 'radiogroup'});
    this.answer = html('p', {id: 'answer'});
    this.tiles = html('div', {class: 'tiles', id: 'tiles'});
    this.csv = html('a', {class: 'button', id: 'csv', download: 'curvature.csv'},
      'Download CSV');
    this.zoomed = html('button', {
      class: 'button', id: 'unzoom', type: 'button', hidden: true,
      onclick: () => this.select({zoom: null})}, 'Show all steps');
    this.message = html('div', {class: 'message', id: 'message'});
    this.problem = html('div', {class: 'problem', id: 'problem', role: 'alert', hidden: true});
    this.mapTitle = html('h3', {});
    this.layerFilter = html('input', {
      type: 'search', id: 'layer-filter', placeholder: 'Filter layers',
      value: this.wantedLayers, 'aria-label': 'Show layers whose names contain this text',
      oninput: () => this.select({wantedLayers: this.layerFilter.value})});
    this.sortChoice = html('select', {
      id: 'sort', 'aria-label': 'Order of the layers',
      onchange: () => this.select({sort: this.sortChoice.value})},
    ...[['depth', 'in the model’s order'], ['value', 'largest first'],
      ['growth', 'grown most first']].map(([value, text]) =>
      html('option', {value, selected: value === this.sort}, text)));
    this.foldAll = html('button', {
      class: 'button small', id: 'fold-all', type: 'button', onclick: () => this.toggleFolds()});
    this.map = html('section', {class: 'card', id: 'heat-map'},
      cardHead(this.mapTitle, HELP.map, () => this.map),
      html('div', {class: 'tools'}, this.layerFilter, this.sortChoice, this.foldAll),
      this.heatMap.node);
    const chart = ({node}) => node;
    this.content = html(
      'div', {class: 'content'},
      html('header', {class: 'summary'}, this.answer,
        html('div', {class: 'actions'}, this.zoomed, this.csv)),
      this.tiles, this.map,
      html('div', {class: 'charts'}, ...Object.values(this.curves).map(chart),
        this.density.node, this.diagonal.node, this.gradient.node),
      this.comparison.node);
    const slider = html('input', {
      type: 'range', id: 'smoothing', min: 0, max: 0.95, step: 0.05, value: this.smoothing,
      oninput: () => this.select({smoothing: Number(slider.value)})});
    this.node = html(
      'div', {class: 'page', id: 'page', 'data-state': 'loading'},
      html(
        'aside', {},
        html('h2', {}, 'Runs'), this.runFilter,
        html('div', {class: 'run-buttons'},
          html('button', {class: 'button small', id: 'all-runs', type: 'button',
                          onclick: () => this.compareAll(true)}, 'All'),
          html('button', {class: 'button small', id: 'no-runs', type: 'button',
                          onclick: () => this.compareAll(false)}, 'None')),
        this.runNote, this.runList,
        html('h2', {}, 'Figure by layer'), this.figureList,
        html('h2', {}, 'Curves'),
        this.toggle('logarithmic', 'Logarithmic axis'),
        this.toggle('bands', 'Error bands'),
        html('label', {class: 'toggle'}, 'Smoothing', slider),
        html('p', {class: 'quiet'}, 'Drag over a curve to zoom, press twice for all steps.'),
        html('h2', {}, 'Updates'),
        this.toggle('live', 'Follow the training')),
      html('main', {}, this.problem, this.message, this.content));
  }

  toggle(name, text) {
    const box = html('input', {
      type: 'checkbox', id: name, checked: this[name],
      onchange: () => this.select({[name]: box.checked}),
    });
    return html('label', {class: 'toggle'}, box, text);
  }

  select(change) {
    Object.assign(this, change);
    this.draw();
    this.remember();
  }

  /** Asks for what will be drawn when it is known of, which is before it is drawn. */
  ask() {
    const table = this.tables.get(this.focus);
    if (!table?.steps.length) return;
    this.chooseFigure(table);
    const rows = this.rowsOf(this.focus, this.figure.key);
    if (this.figure.error) this.rowsOf(this.focus, this.figure.error);
    this.chooseLayer(table, rows);
    for (const {run, table: own} of this.shown()) this.figuresOfLayer(run, own);
  }

  chooseFigure(table) {
    const known = FIGURES.filter(({key}) => table.layer_keys.includes(key));
    if (known.length && !known.includes(this.figure)) this.figure = known[0];
    return known;
  }

  chooseLayer(table, rows) {
    if (table.layers.includes(this.layer)) return;
    this.layer = this.stiffest(table, rows)?.layer ?? null;
    this.chosenLayer = false;
  }

  /** All figures of the chosen layer in a run; null without it, undefined while read. */
  figuresOfLayer(run, table) {
    const layer = run === this.focus ? this.layer
      : matched(this.tables.get(this.focus).layers, table.layers).get(this.layer);
    return layer ? this.layerFigures.get([run, layer, table.num_probes], run, layer, table)
      : null;
  }

  drawSoon() {
    if (this.drawing) return;
    // Of many things that arrive not each is drawn: it would be the next one's delay.
    const pause = Math.max(0, this.drawn + 2 * this.cost - performance.now());
    this.drawing = setTimeout(() => requestAnimationFrame(() => {
      this.drawing = null;
      this.draw();
    }), pause);
  }

  async refresh() {
    if (this.refreshing) return;
    this.refreshing = true;
    let changed = true;
    try {
      const before = JSON.stringify(this.runs);
      this.adopt(await fetchRuns());
      const wanted = ({run}) =>
        this.compared.has(run) || run === this.focus || run === this.versus;
      const unread = this.runs.filter(wanted)
        .filter(({run, last_step: last}) => this.tables.get(run)?.readUpTo !== last);
      // The run in the map first, for its layers are asked for when it is known.
      const read = ({run, last_step: last}) => this.read(run, last);
      const inMap = ({run}) => run === this.focus;
      await Promise.all(unread.filter(inMap).map(read));
      await Promise.all(unread.filter((one) => !inMap(one)).map(read));
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
      const few = this.compared && this.chosenRuns === null &&
        this.compared.size < COMPARED_AT_FIRST;
      if (few) this.compared.add(run);
    }
    const names = runs.map(({run}) => run);
    this.runs = runs;
    this.compared ??= new Set(this.chosenRuns ?? names.slice(0, COMPARED_AT_FIRST));
    for (const run of this.compared) if (!names.includes(run)) this.compared.delete(run);
    if (!names.includes(this.focus)) this.focus = names[0] ?? null;
    if (!names.includes(this.versus)) this.versus = null;
  }

  async read(run, last) {
    const table = await fetchTable(run);
    table.readUpTo = last;
    this.tables.set(run, table);
    this.ask();
    this.drawSoon();
  }

  compare(run, shown) {
    if (shown) this.compared.add(run);
    else this.compared.delete(run);
    this.chosenRuns = [...this.compared];
    this.select({});
    this.refresh();
  }

  compareAll(shown) {
    for (const {run} of this.listed()) {
      if (shown) this.compared.add(run);
      else this.compared.delete(run);
    }
    this.chosenRuns = [...this.compared];
    this.select({});
    this.refresh();
  }

  fold(group) {
    this.folds.set(group, !this.isFolded(group));
    this.select({});
  }

  isFolded(group) {
    const deep = (this.tables.get(this.focus)?.layers.length ?? 0) > FOLDED_BEYOND;
    return this.folds.get(group) ?? deep;
  }

  toggleFolds() {
    const groups = groupsOf(this.tables.get(this.focus).layers).filter(({name}) => name);
    const folded = !groups.every(({name}) => this.isFolded(name));
    for (const {name} of groups) this.folds.set(name, folded);
    this.select({});
  }

  /** What is on the page follows from the fields above, and from nothing else. */
  draw() {
    const start = performance.now();
    this.fill();
    this.drawn = performance.now();
    this.cost = this.drawn - start;
  }

  fill() {
    const table = this.tables.get(this.focus);
    const filled = table && table.steps.length > 0;
    const state = filled ? 'ready' : this.compared === null ? 'loading'
      : this.runs.length ? 'waiting' : 'empty';
    this.node.dataset.state = state;
    this.message.replaceChildren(...MESSAGES[state]());
    this.drawRuns();
    this.drawFigures(table);
    if (!filled) return;
    const rows = this.rowsOf(this.focus, this.figure.key);
    this.chooseLayer(table, rows);
    this.drawSummary(table, rows);
    this.drawHeatMap(table, rows);
    this.drawCurves(rows === undefined);
    this.drawStrata(table);
    this.drawComparison(table, rows);
    const waiting = this.arrivals.some((one) => one.waiting > 0);
    this.content.setAttribute('aria-busy', String(waiting));
  }

  /** Fills a node anew if what it follows from has changed: what is pressed stays there. */
  renew(node, key, build) {
    const text = JSON.stringify([key, document.documentElement.dataset.theme]);
    if (this.built.get(node) === text) return;
    this.built.set(node, text);
    node.replaceChildren(...build());
  }

  /** A figure's values by layer and step; null where there is none, undefined while read. */
  rowsOf(run, key) {
    const table = this.tables.get(run);
    if (!table?.layer_keys.includes(key)) return null;
    return this.matrices.get([run, key, table.num_probes], run, key, table);
  }

  listed() {
    const wanted = this.wantedRuns.toLowerCase();
    return this.runs.filter(({run}) => shortName(run).toLowerCase().includes(wanted));
  }

  /** A run's name without what all of them begin with. */
  nameOf(run) {
    return shortName(run).slice(this.prefix?.length ?? 0) || shortName(run);
  }

  drawRuns() {
    this.prefix = commonPrefix(this.runs.map(({run}) => shortName(run)));
    const listed = this.listed();
    const rest = this.runs.length - listed.length;
    this.runNote.textContent = [
      this.prefix ? `All begin with ${this.prefix}` : '',
      rest ? `${rest} more do not match` : ''].filter(Boolean).join('. ');
    this.runNote.hidden = !this.runNote.textContent;
    const seen = [listed, [...this.compared ?? []], this.focus, this.prefix];
    this.renew(this.runList, seen, () => listed.map(({run, last_step: last}) => {
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
      }, this.nameOf(run));
      const step = html('span', {class: 'run-step'}, last === null ? '' : formatStep(last));
      return html('li', {'data-run': run}, box, name, step);
    }));
  }

  drawFigures(table) {
    const known = table ? this.chooseFigure(table) : [];
    const keys = known.map(({key}) => key);
    this.renew(this.figureList, [keys, this.figure.key], () => known.map((figure) => {
      const button = html('input', {
        type: 'radio', name: 'figure', value: figure.key, checked: figure === this.figure,
        onchange: () => this.select({figure}),
      });
      return html('label', {class: 'toggle'}, button, figure.label);
    }));
  }

  drawSummary(table, rows) {
    const step = formatStep(table.steps.at(-1));
    const parts = [`At step ${step} of ${this.nameOf(this.focus)}`];
    const stiffest = this.stiffest(table, rows);
    const format = this.figure.scale === 'share' ? formatShare : formatNumber;
    const first = {negative_share: ' has the largest share of negative curvature',
      gradient_norm: ' has the largest gradient',
      update_ratio: ' moves most in a step, relative to its weights'}[this.figure.key];
    if (stiffest) {
      parts.push(first ? ', ' : ', the stiffest layer is ',
        html('strong', {}, stiffest.layer),
        first ?? ` by ${this.figure.says}`,
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
      return [label, key, text];
    };
    const seconds = table.figures.seconds;
    const first_seconds = firstOf(seconds)?.value ?? null;
    const tiles = [
      tile('Loss on the probe', 'loss'),
      tile('Trace', 'hessian_trace', 'hessian_trace_standard_error'),
      tile('Frobenius norm', 'hessian_frobenius_norm',
        'hessian_frobenius_norm_standard_error'),
      tile('Largest eigenvalue', 'hessian_max_eigenvalue', 'hessian_max_eigenvalue_error'),
      tile('Seen by the optimizer', 'hessian_preconditioned_max_eigenvalue',
        'hessian_preconditioned_max_eigenvalue_error'),
      tile('Stability threshold', 'stability_threshold'),
      tile('Gradient norm', 'gradient_norm'),
      tile('Gradient noise scale', 'gradient_noise_scale', null,
        (value) => `${formatNumber(value)} samples`),
      tile('Update / weights', 'update_ratio'),
      tile('Products per probe', 'num_matvecs'),
      tile('Time spent on probes', 'overhead', null, formatShare),
      seconds ? ['A probe takes', 'seconds', formatSeconds(median(seconds))] : null,
      seconds ? ['The first, with compilation', 'first_seconds',
        formatSeconds(first_seconds)] : null,
    ];
    const texts = tiles.filter(Boolean);
    this.renew(this.tiles, texts, () => texts.map((one) => tileOf(...one)));
    const runs = new Set([this.focus, ...this.compared]);
    this.csv.setAttribute('href', csvAddress([...runs].sort()));
    this.csv.title =
      `All figures of all probes of ${runs.size === 1 ? 'this run' : `${runs.size} runs`}`;
    this.zoomed.hidden = this.zoom === null;
    if (this.zoom) {
      this.zoomed.title = `Now from ${formatStep(this.zoom[0])} to ${formatStep(this.zoom[1])}`;
    }
  }

  /** The layer with the largest last value of the chosen figure. */
  stiffest(table, rows) {
    const found = (rows ?? [])
      .map((column, i) => ({layer: table.layers[i], column, value: lastOf(column)?.value}))
      .filter(({value}) => value !== undefined);
    return found.length ? found.reduce((a, b) => (b.value > a.value ? b : a)) : null;
  }

  drawHeatMap(table, rows) {
    const probes = table.num_probes > table.steps.length
      ? `, ${table.steps.length} of ${formatStep(table.num_probes)} probes` : '';
    this.mapTitle.textContent =
      `${this.figure.title}, by layer and step · ${this.nameOf(this.focus)}${probes}`;
    this.map.hidden = table.layers.length === 0 || rows === null;
    if (this.map.hidden) return;
    const grouped = table.layers.length > GROUPED_BEYOND && this.sort === 'depth';
    const groups = grouped ? groupsOf(table.layers) : table.layers.map(
      (_, row) => ({name: '', rows: [row]}));
    this.foldAll.hidden = !groups.some(({name}) => name);
    const folded = groups.every(({name}) => !name || this.isFolded(name));
    this.foldAll.textContent = folded ? 'Unfold all' : 'Fold all';
    this.sortChoice.value = this.sort;
    // Asked for at once, not when the figures are there.
    const errors = this.figure.error ? this.rowsOf(this.focus, this.figure.error) : null;
    const seen = [table, rows, errors, this.figure, this.layer, this.sort,
      this.wantedLayers, this.zoom, groups.map(({name}) => this.isFolded(name)).join()];
    if (isShown(this.heatMap, seen)) return;
    const shown = rows === undefined ? [] : this.mapRows(table, rows, errors, groups);
    let [first, last] = [0, table.steps.length - 1];
    if (this.zoom) {
      const inside = table.steps.map((step, i) => [step, i])
        .filter(([step]) => step >= this.zoom[0] && step <= this.zoom[1]);
      if (inside.length) [first, last] = [inside[0][1], inside.at(-1)[1]];
    }
    this.heatMap.update({
      rows: shown, steps: table.steps, columns: [first, last], figure: this.figure,
      scale: colourScale([rows ?? []], this.figure), selected: this.layer,
      note: rows === undefined ? 'Reading the layers …'
        : shown.length ? null : 'No layer has this in its name.'});
  }

  mapRows(table, rows, errors, groups) {
    const wanted = this.wantedLayers.toLowerCase();
    const one = (row, level) => ({
      name: table.layers[row], label: table.layers[row], values: rows[row],
      errors: errors?.[row], size: table.sizes[row], level});
    const matches = (row) => table.layers[row].toLowerCase().includes(wanted);
    const found = groups.flatMap(({name, rows: members}) => {
      const inside = members.filter(matches);
      if (!name || !inside.length) return inside.map((row) => one(row, 0));
      const folded = this.isFolded(name);
      const values = together(inside.map((row) => rows[row]),
        inside.map((row) => table.sizes[row]), this.figure.together);
      const head = {name, label: name, values, group: true, folded, size: inside.length};
      return [head, ...(folded ? [] : inside.map((row) => one(row, 1)))];
    });
    if (this.sort === 'depth') return found;
    const last = (row) => lastOf(row.values)?.value ?? -Infinity;
    const grown = (row) => Math.abs(Math.log(
      Math.abs(last(row) / (firstOf(row.values)?.value ?? NaN))));
    const by = this.sort === 'value' ? last : (row) => grown(row) || 0;
    return found.sort((a, b) => by(b) - by(a));
  }

  drawCurves(reading) {
    const shown = this.shown();
    const share = this.figure.scale === 'share';
    const common = {
      logarithmic: this.logarithmic, bands: this.bands, smoothing: this.smoothing,
      zoom: this.zoom};
    const waiting = [];
    this.curves.layer.update({
      ...common,
      title: this.figure.label +
        (this.layer ? ` · ${this.layer}` : reading ? '' : ' · no layer'),
      axis: this.figure.label.toLowerCase(),
      logarithmic: this.logarithmic && !share,
      format: share ? formatShare : formatNumber,
      series: shown.flatMap(({run, table}) => {
        const figures = this.figuresOfLayer(run, table);
        if (figures === null) return [];
        if (!figures) waiting.push(run);
        return this.series(run, table, {
          values: figures?.[this.figure.key], errors: figures?.[this.figure.error],
          factor: 2});
      }),
      absent: waiting.length || reading ? 'Reading …'
        : 'The chosen runs have no such figure for this layer.',
    });
    this.curves.stability.update({
      ...common,
      title: 'Edge of stability: curvature that the optimizer sees / its threshold',
      axis: 'share of the threshold',
      format: formatShare,
      absent: 'The chosen runs tell no threshold, or no eigenvalue.',
      limit: {value: 1, meaning: 'unstable above'},
      series: shown.flatMap(({run, table}) => {
        const stability = stabilityOf(table.figures);
        return stability ? this.series(run, table, {
          values: stability.shares, errors: stability.errors, factor: 1, bound: true}) : [];
      }),
    });
    this.curves.max_eigenvalue.update({
      ...common,
      title: 'Largest eigenvalue of the Hessian',
      axis: 'eigenvalue',
      absent: 'No largest eigenvalue was computed in the chosen runs.',
      series: shown.flatMap(({run, table}) => [
        ...this.series(run, table, {
          values: table.figures.hessian_max_eigenvalue,
          errors: table.figures.hessian_max_eigenvalue_error, factor: 1, bound: true}),
        ...this.series(run, table, {
          values: table.figures.two_over_learning_rate,
          dashed: true, meaning: '2 / learning rate',
          name: `${this.nameOf(run)}: 2 / learning rate`}),
      ]),
    });
    for (const [id, key, title, axis] of [
      ['frobenius_norm', 'hessian_frobenius_norm', 'Frobenius norm of the Hessian', 'norm'],
      ['trace', 'hessian_trace', 'Trace of the Hessian', 'trace'],
      ['loss', 'loss', 'Loss on the probe data', 'loss'],
      ['gradient_norm', 'gradient_norm', 'Norm of the gradient', 'norm'],
      ['gradient_noise_scale', 'gradient_noise_scale', 'Gradient noise scale', 'samples'],
      ['update_ratio', 'update_ratio', 'Change of the weights in a step over their norm',
        'ratio'],
    ]) {
      this.curves[id].update({
        ...common, title, axis, absent: 'The chosen runs have no such figure.',
        series: shown.flatMap(({run, table}) => this.series(run, table, {
          values: table.figures[key], errors: table.figures[`${key}_standard_error`],
          factor: 2})),
      });
    }
  }

  /** Distributions over steps, of the run in the heat map. */
  drawStrata(table) {
    const run = this.focus;
    const name = this.nameOf(run);
    this.density.node.hidden = !table.density;
    if (table.density) {
      const found = this.densities.get([run, table.num_probes], run);
      this.density.update({
        title: `Density of all eigenvalues · ${name}`, axis: 'eigenvalue', zoom: this.zoom,
        says: 'share of the eigenvalues', absent: 'Reading …',
        columns: columnsOf(found ?? NOTHING),
      });
    }
    for (const [pane, group, what] of [
      [this.diagonal, 'hessian_diagonal_signed_log10', 'Hessian’s diagonal'],
      [this.gradient, 'loss_gradient_signed_log10', 'gradient'],
    ]) {
      const own = `${group}/${this.layer}`;
      const tag = table.histograms.includes(own) ? own : `${group}/${WHOLE}`;
      pane.node.hidden = !table.histograms.includes(tag);
      if (pane.node.hidden) continue;
      const of = tag === own ? this.layer : 'whole model';
      pane.update({
        title: `Entries of the ${what} · ${of} · ${name}`, signedLog: true, zoom: this.zoom,
        axis: 'signed logarithm', says: 'share of the entries', absent: 'Reading …',
        columns: this.histograms.get([run, tag, table.num_probes], run, tag) ?? NOTHING,
      });
    }
  }

  drawComparison(table, rows) {
    const others = this.runs.filter(({run}) => run !== this.focus);
    this.comparison.node.hidden = !others.length || !table.layers.length;
    if (this.comparison.node.hidden) return;
    const versus = this.versus === this.focus ? null : this.versus;
    const there = versus && this.tables.get(versus);
    const theirs = there ? this.rowsOf(versus, this.figure.key) : undefined;
    let [found, note] = [null, 'Choose a run to see which layers differ.'];
    if (versus) note = theirs === null ? 'That run has no such figure.' : 'Reading …';
    if (rows && theirs) {
      const map = matched(table.layers, there.layers);
      found = table.layers.flatMap((layer, i) => {
        const row = theirs[there.layers.indexOf(map.get(layer))];
        const [a, b] = [lastOf(rows[i])?.value, lastOf(row)?.value];
        return a === undefined || b === undefined ? [] : [{layer, here: a, there: b}];
      });
      const missing = table.layers.length - found.length;
      note = `At step ${formatStep(table.steps.at(-1))} here and ` +
        `${formatStep(there.steps.at(-1))} there; ${found.length} layers have the same place` +
        `${missing ? `, ${missing} have none in the other model` : ''}.`;
    }
    this.comparison.update({
      runs: others.map(({run}) => ({run, name: this.nameOf(run)})),
      name: this.nameOf(this.focus), versus, figure: this.figure, rows: found, note});
  }

  shown() {
    return this.runs
      .filter(({run}) => this.compared.has(run) && this.tables.get(run)?.steps.length)
      .map(({run}) => ({run, table: this.tables.get(run)}));
  }

  series(run, {steps}, {values, errors, factor, dashed, meaning, name, bound}) {
    if (!values?.some((value) => value !== null)) return [];
    return [{
      run, steps, values, errors, factor, dashed, meaning, bound,
      name: name ?? this.nameOf(run), colour: this.colour(run),
      stroke: runStroke(this.numbers.get(run))}];
  }

  colour(run) {
    return runColour(this.numbers.get(run));
  }

  markStep(step) {
    for (const chart of Object.values(this.curves)) chart.mark(step);
  }
}

const NOTHING = [];

/** Densities as columns of bins. */
const columnsOf = remembered((densities) => densities.map(({step, grid, density}) => ({
  step, bins: grid.slice(1).map((high, i) => [grid[i], high, density[i]])})));

function tileOf(label, key, text) {
  return html(
    'div', {class: 'tile', 'data-figure': key},
    html('div', {class: 'tile-label'}, label, HELP[key] ? help(HELP[key]) : null),
    html('div', {class: 'tile-value'}, text));
}

function formatSeconds(seconds) {
  return `${formatNumber(Number(seconds.toPrecision(2)))} s`;
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
