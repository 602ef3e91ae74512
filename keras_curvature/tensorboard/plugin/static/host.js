// What the page learns from the TensorBoard around it: its theme, and when it reloads.

/** Keeps `data-theme` of the document at what TensorBoard shows, and reports changes. */
export function followTheme(onChange) {
  const system = matchMedia('(prefers-color-scheme: dark)');
  const outer = outerBody();
  const apply = () => {
    const dark = outer ? outer.classList.contains('dark-mode') : system.matches;
    const theme = dark ? 'dark' : 'light';
    if (document.documentElement.dataset.theme === theme) return;
    document.documentElement.dataset.theme = theme;
    onChange();
  };
  if (outer) {
    const options = {attributes: true, attributeFilter: ['class']};
    new MutationObserver(apply).observe(outer, options);
  } else {
    system.addEventListener('change', apply);
  }
  apply();
}

function outerBody() {
  try {
    return window.parent === window ? null : window.parent.document.body;
  } catch {
    return null;  // Another origin: a notebook may wrap the page once more.
  }
}

/** Calls back whenever TensorBoard reloads its data, by its button or by itself. */
export function onReload(callback) {
  if (window.parent === window) return;
  const channel = new MessageChannel();
  channel.port1.onmessage = ({data}) => {
    const message = JSON.parse(data);
    if (message.isReply) return;
    if (message.type === 'experimental.DataReloaded') callback();
    const reply = {type: message.type, id: message.id, payload: null, error: null};
    channel.port1.postMessage(JSON.stringify({...reply, isReply: true}));
  };
  window.parent.postMessage('experimental.bootstrap', '*', [channel.port2]);
}
