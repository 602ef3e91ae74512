// What changed between two runs, layer by layer.

import {cardHead} from './curves.js';
import {html} from './elements.js';
import {formatNumber, formatShare} from './format.js';

const MOST = 24;

export class Comparison {
  /** onChoose(run or null): the other run; onSelect(layer): a layer. */
  constructor({text, onChoose, onSelect}) {
    this.onSelect = onSelect;
    this.title = html('h3', {}, 'What changed between two runs?');
    this.select = html('select', {
      id: 'versus', 'aria-label': 'The run to compare with',
      onchange: () => onChoose(this.select.value || null)});
    this.list = html('div', {class: 'changes', id: 'changes', role: 'table'});
    this.note = html('p', {class: 'note-line'});
    this.node = html('section', {class: 'card', id: 'comparison'},
      cardHead(this.title, text, () => this.node),
      html('label', {class: 'versus'}, html('span', {}), this.select), this.note, this.list);
    for (const button of this.node.querySelectorAll('.saves')) button.remove();
    this.of = this.node.querySelector('.versus span');
  }

  /**
   * runs: [{run, name}] to choose from; rows: [{layer, here, there}] with the figure's last
   * values in both, or null while there is no other run.
   */
  update({runs, name, versus, figure, rows, note}) {
    this.of.textContent = `${figure.label} of ${name}, compared with `;
    const key = JSON.stringify(runs);
    if (key !== this.offered) {
      this.offered = key;
      this.select.replaceChildren(
        html('option', {value: ''}, 'no other run'),
        ...runs.map((one) => html('option', {value: one.run}, one.name)));
    }
    this.select.value = versus ?? '';
    this.note.textContent = note;
    this.note.hidden = !note;
    const format = figure.scale === 'share' ? formatShare : formatNumber;
    const found = (rows ?? [])
      .map((row) => ({...row, change: Math.log2(row.here / row.there)}))
      .filter(({change}) => Number.isFinite(change))
      .sort((a, b) => Math.abs(b.change) - Math.abs(a.change));
    const most = Math.max(1, ...found.map(({change}) => Math.abs(change)));
    this.list.replaceChildren(...found.slice(0, MOST).map((row) => {
      const bar = html('div', {class: `bar ${row.change < 0 ? 'less' : 'more'}`});
      bar.style.width = `${(50 * Math.abs(row.change)) / most}%`;
      return html('div', {class: 'change', role: 'row', 'data-layer': row.layer},
        html('button', {class: 'change-name', title: row.layer,
                        onclick: () => this.onSelect(row.layer)}, row.layer),
        html('div', {class: 'change-bar', 'aria-hidden': 'true'}, bar),
        html('div', {class: 'change-text', role: 'cell'},
          html('b', {}, `${formatNumber(2 ** row.change)}×`),
          ` ${format(row.there)} → ${format(row.here)}`));
    }));
    if (found.length > MOST) {
      this.list.append(html('p', {class: 'note-line'},
        `and ${found.length - MOST} layers that changed less`));
    }
  }
}
