// A few lines instead of a framework.

const SVG = 'http://www.w3.org/2000/svg';

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export function html(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** A mark that explains something while it is pointed at or focused. */
export function help(text) {
  const show = (event) => {
    const box = event.target.getBoundingClientRect();
    showTooltip({clientX: box.right, clientY: box.top}, [text]);
  };
  return html('button', {
    class: 'help', type: 'button', 'aria-label': `What is this? ${text}`,
    onpointerenter: show, onfocus: show, onpointerleave: hideTooltip, onblur: hideTooltip,
  }, '?');
}

let tooltip = null;

/** Shows lines of text beside the pointer. Each line is a string or a node. */
export function showTooltip(event, lines) {
  if (!tooltip) {
    tooltip = html('div', {class: 'tooltip', id: 'tooltip', role: 'status'});
    document.body.append(tooltip);
  }
  tooltip.replaceChildren(...lines.map((line) => html('div', {}, line)));
  tooltip.hidden = false;
  const {width, height} = tooltip.getBoundingClientRect();
  const beside = event.clientX + 16;
  const left = beside + width > innerWidth ? event.clientX - width - 16 : beside;
  const top = Math.min(event.clientY + 12, innerHeight - height - 8);
  tooltip.style.left = `${Math.max(left, 4)}px`;
  tooltip.style.top = `${Math.max(top, 4)}px`;
}

export function hideTooltip() {
  if (tooltip) tooltip.hidden = true;
}

/**
 * Calls back when the width of a node has changed; gives a function that tells it. Asking
 * the node itself makes the browser lay out the page, between any two things that are drawn.
 */
export function followWidth(node, onChange) {
  let width = 0;
  new ResizeObserver(([{contentRect}]) => {
    if (contentRect.width === width) return;
    width = contentRect.width;
    onChange();
  }).observe(node);
  return () => width;
}

/** Whether a pane shows what follows from these values already; notes that it will. */
export function isShown(pane, values) {
  const seen = [document.documentElement.dataset.theme, ...values];
  const same = pane.seen?.length === seen.length && seen.every((x, i) => x === pane.seen[i]);
  pane.seen = seen;
  return same;
}
