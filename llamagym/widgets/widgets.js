// Shared code of the widgets. It is prepended to the script of each widget, which is a separate
// module. Texts come from models and environments: they are only ever set as text, never as HTML.

const THEME = `
  :host {
    display: block;
    container-type: inline-size;
  }
  .widget {
    --ink: #1c2330;
    --soft: #5b6474;
    --faint: #8a93a3;
    --line: #d9dee6;
    --paper: #ffffff;
    --panel: #f5f7fa;
    --accent: #1f6fb2;
    --warn: #b4500b;
    --plus: 31, 111, 178;
    --minus: 193, 85, 10;
    --one: 122, 74, 166;
    color: var(--ink);
    background: var(--paper);
    border: 1px solid var(--line);
    border-radius: 8px;
    font:
      13px/1.45 system-ui,
      sans-serif;
    outline: none;
  }
  .widget.dark {
    --ink: #e6e9ef;
    --soft: #a9b2c0;
    --faint: #7d8797;
    --line: #3a4250;
    --paper: #171b22;
    --panel: #1f252e;
    --accent: #6cb2eb;
    --warn: #f0a45d;
    --plus: 90, 170, 235;
    --minus: 240, 140, 70;
    --one: 178, 132, 224;
  }
  .widget:focus-visible {
    box-shadow: 0 0 0 2px var(--accent);
  }
  button,
  select,
  input[type='number'] {
    font: inherit;
    color: inherit;
    background: var(--paper);
    border: 1px solid var(--line);
    border-radius: 5px;
    padding: 2px 8px;
    min-height: 26px;
    box-sizing: border-box;
  }
  [hidden] {
    display: none !important;
  }
  button {
    cursor: pointer;
  }
  button:hover:not(:disabled) {
    border-color: var(--accent);
  }
  button:disabled,
  input:disabled {
    opacity: 0.5;
    cursor: default;
  }
  button:focus-visible,
  select:focus-visible,
  input:focus-visible,
  textarea:focus-visible,
  summary:focus-visible,
  [tabindex]:focus-visible {
    outline: 2px solid var(--accent);
    outline-offset: 1px;
  }
  svg text {
    font:
      10px system-ui,
      sans-serif;
    fill: var(--soft);
  }
`;

const SVG_TAGS = ['svg', 'g', 'path', 'line', 'rect', 'circle', 'text', 'title'];

// Create an element: `h('div', {class: 'x', onclick: f}, 'text', child)`. Strings become text nodes
function h(tag, props = {}, ...children) {
  const el = SVG_TAGS.includes(tag)
    ? document.createElementNS('http://www.w3.org/2000/svg', tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value == null || value === false) continue;
    if (name.startsWith('on')) el.addEventListener(name.slice(2), value);
    else el.setAttribute(name, value === true ? '' : value);
  }
  el.append(...children.flat().filter((c) => c != null));
  return el;
}

// Format a number with a real minus sign; a missing number is a dash
function formatNumber(x, digits = 3) {
  if (x == null || Number.isNaN(x)) return '–';
  if (Object.is(x, -0)) return '0';
  return String(+x.toFixed(digits)).replace('-', '−');
}

const range = (n) => Array.from({ length: n }, (_, i) => i);

// Test for a dark theme: JupyterLab's, else the page's, else the system's
function isDark() {
  const lab = document.body.dataset.jpThemeLight;
  if (lab) return lab === 'false';
  const theme = document.documentElement.dataset.theme || document.body.dataset.theme;
  if (theme === 'dark' || theme === 'light') return theme === 'dark';
  return window.matchMedia('(prefers-color-scheme: dark)').matches;
}

// Keep an element in the current theme; returns a function that stops it
function followTheme(el) {
  const applyTheme = () => el.classList.toggle('dark', isDark());
  const observer = new MutationObserver(applyTheme);
  const attributeFilter = ['data-jp-theme-light', 'data-theme'];
  for (const target of [document.body, document.documentElement]) {
    observer.observe(target, { attributes: true, attributeFilter });
  }
  applyTheme();
  return () => observer.disconnect();
}
