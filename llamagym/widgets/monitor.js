// The training monitor: the curves of a run, its findings and its buttons. The kernel synchronizes
// one `state`. A click is sent as a message, and takes effect when the state comes back.

const CSS = `
  .widget {
    margin-bottom: 6px;
  }
  .bar {
    display: flex;
    flex-wrap: wrap;
    gap: 4px 12px;
    align-items: baseline;
    padding: 8px 10px;
    background: var(--panel);
    border-radius: 8px 8px 0 0;
  }
  .bar b {
    font-weight: 600;
  }
  .bar .phase {
    color: var(--accent);
    font-weight: 600;
  }
  .bar .phase.warn {
    color: var(--warn);
  }
  .bar .times {
    color: var(--soft);
    margin-left: auto;
    font-variant-numeric: tabular-nums;
  }
  .done {
    height: 4px;
    background: var(--line);
  }
  .done i {
    display: block;
    height: 100%;
    background: var(--accent);
    transition: width 0.3s;
  }
  .controls {
    display: flex;
    flex-wrap: wrap;
    gap: 6px 10px;
    align-items: center;
    padding: 8px 10px;
    border-bottom: 1px solid var(--line);
  }
  .controls label {
    color: var(--soft);
    display: inline-flex;
    gap: 5px;
    align-items: center;
  }
  .controls input {
    width: 8em;
    font-variant-numeric: tabular-nums;
  }
  .controls .note {
    color: var(--soft);
    flex: 1 1 16em;
  }
  .controls .note.warn {
    color: var(--warn);
  }
  .charts {
    display: grid;
    grid-template-columns: repeat(auto-fill, minmax(230px, 1fr));
    gap: 10px 14px;
    padding: 10px;
  }
  .chart {
    min-width: 0;
  }
  .chart header {
    display: flex;
    gap: 6px;
    align-items: baseline;
  }
  .chart header {
    white-space: nowrap;
  }
  .chart header b {
    font-weight: 600;
  }
  .chart header .unit {
    color: var(--soft);
    font-size: 11.5px;
    overflow: hidden;
    text-overflow: ellipsis;
  }
  .chart header .now {
    margin-left: auto;
    font-variant-numeric: tabular-nums;
  }
  .chart svg {
    display: block;
    width: 100%;
    height: 104px;
    cursor: crosshair;
  }
  .split {
    padding: 0 10px 10px;
  }
  .split .strip {
    display: flex;
    height: 10px;
    border-radius: 3px;
    overflow: hidden;
    background: var(--line);
  }
  .split .legend {
    display: flex;
    flex-wrap: wrap;
    gap: 2px 14px;
    color: var(--soft);
    margin-top: 3px;
    font-variant-numeric: tabular-nums;
  }
  .split .legend i {
    display: inline-block;
    width: 9px;
    height: 9px;
    border-radius: 2px;
    margin-right: 5px;
  }
  .log {
    border-top: 1px solid var(--line);
    padding: 8px 10px;
    max-height: 150px;
    overflow: auto;
  }
  .log ul {
    margin: 0;
    padding-left: 18px;
  }
  .log li {
    margin: 2px 0;
    overflow-wrap: anywhere;
  }
  .log li b {
    font-weight: 600;
  }
  .log .finding b {
    color: var(--warn);
  }
  .log .at {
    color: var(--faint);
    margin-right: 6px;
    font-variant-numeric: tabular-nums;
  }
`;

const CHARTS = [
  {
    key: 'return',
    name: 'return',
    help: "mean of an update's episodes, and their standard deviation around it",
  },
  { key: 'length', name: 'turns', unit: 'per episode' },
  { key: 'invalid', name: 'invalid', unit: '% of responses', scale: 100, minimum: 0, maximum: 100 },
  {
    key: 'kl',
    name: 'KL',
    unit: 'to the reference, nats/token',
    help: 'KL divergence of the policy from the reference',
  },
  { key: 'entropy', name: 'entropy', unit: 'nats/token' },
  { key: 'policy_loss', name: 'policy loss' },
  { key: 'value_loss', name: 'value loss' },
  { key: 'speed', name: 'speed', unit: 'sampled tokens/s' },
];
// Key, name and color of the phases of a run
const PHASES = [
  ['collect', 'collecting', '--plus'],
  ['update', 'updating', '--minus'],
  ['evaluate', 'evaluating', '--one'],
  ['other', 'saving and waiting', null],
];

// Format seconds as m:ss or h:mm:ss
function formatTime(seconds) {
  const t = Math.round(seconds);
  const pad = (n) => String(n).padStart(2, '0');
  if (t < 3600) return `${Math.floor(t / 60)}:${pad(t % 60)}`;
  return `${Math.floor(t / 3600)}:${pad(Math.floor(t / 60) % 60)}:${pad(t % 60)}`;
}

// Format a number with three digits, in scientific notation if it is very small or very large
function formatDigits(x) {
  if (x == null || !Number.isFinite(x)) return '–';
  if (x === 0 || (Math.abs(x) >= 1e-3 && Math.abs(x) < 1e5)) {
    return formatNumber(+x.toPrecision(3), 5);
  }
  const text = x.toExponential(1).replace('.0e', 'e').replace('-', '−');
  return text.replace('e-', 'e−').replace('e+', 'e');
}

// Two or three round numbers between two limits
function ticks(low, high) {
  const rough = (high - low) / 2.5;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * size).find((s) => s >= rough);
  const values = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k += 1) {
    values.push(+(k * step).toPrecision(12));
  }
  return values;
}

const HEIGHT = 104; // of a chart, in pixels
const MARGIN = { left: 40, right: 8, top: 8, bottom: 16 };

// A curve over the updates; the return also has its spread, evaluations and reference lines
class Chart {
  constructor(monitor, spec) {
    this.monitor = monitor;
    this.spec = spec;
    this.now = h('span', { class: 'now' });
    this.svg = h('svg', { role: 'img', 'aria-label': spec.name });
    this.el = h(
      'div',
      { class: 'chart', title: spec.help || null },
      h(
        'header',
        {},
        h('b', {}, spec.name),
        h('span', { class: 'unit' }, spec.unit || ''),
        this.now,
      ),
      this.svg,
    );
    this.svg.addEventListener('pointermove', (e) => monitor.highlight(this.nearest(e.offsetX)));
    this.svg.addEventListener('pointerleave', () => monitor.highlight(null));
    this.cross = h('line', { stroke: 'var(--accent)', 'stroke-width': 1, visibility: 'hidden' });
    this.dot = h('circle', { r: 3, fill: 'var(--accent)', visibility: 'hidden' });
    this.resizeObserver = new ResizeObserver(() => {
      if (this.svg.clientWidth !== this.width) this.draw();
    });
    this.resizeObserver.observe(this.svg);
  }

  draw() {
    const { curves, evaluations, references } = this.monitor.state;
    const { key, scale = 1 } = this.spec;
    const isReturn = key === 'return';
    const updates = curves.update;
    const spread = isReturn ? curves.spread : [];
    const dots = isReturn ? evaluations : [];
    const lines = isReturn ? Object.entries(references) : [];
    const scaled = curves[key].map((v) => (v == null ? null : v * scale));
    const low = scaled.map((v, i) => (v == null ? null : v - (spread[i] || 0)));
    const high = scaled.map((v, i) => (v == null ? null : v + (spread[i] || 0)));
    this.values = scaled;
    this.width = this.svg.clientWidth || 240;
    const limits = this.scales(updates, [
      ...low,
      ...high,
      ...dots.flatMap(([, v, ci]) => [v - ci, v + ci]),
      ...lines.map(([, v]) => v),
    ]);
    const { left, bottom } = MARGIN;
    const right = this.width - MARGIN.right;
    const captionY = HEIGHT - 3;
    this.svg.setAttribute('viewBox', `0 0 ${this.width} ${HEIGHT}`);
    this.cross.setAttribute('y1', MARGIN.top);
    this.cross.setAttribute('y2', HEIGHT - bottom);
    const line = this.linePath(updates, scaled);
    this.svg.replaceChildren(
      ...this.gridLines(...limits),
      ...this.referenceLines(lines),
      ...(isReturn && updates.length > 1
        ? [h('path', { d: this.bandPath(updates, low, high), fill: 'rgba(var(--plus), .16)' })]
        : []),
      h('path', { d: line, fill: 'none', stroke: 'rgb(var(--plus))', 'stroke-width': 1.6 }),
      ...(updates.length === 1 && scaled[0] != null ? [this.point(updates[0], scaled[0])] : []),
      ...dots.map((dot) => this.evaluationDot(...dot)),
      h('text', { x: left, y: captionY }, dots.length ? 'dots: greedy evaluation, 95 %' : ''),
      h(
        'text',
        { x: right, y: captionY, 'text-anchor': 'end' },
        updates.length ? `update ${this.monitor.state.update}` : '',
      ),
      this.cross,
      this.dot,
    );
    this.mark(this.monitor.highlighted);
  }

  // Set the functions from an update and from a value to pixels; return the limits of the y axis
  scales(updates, values) {
    const { minimum = -Infinity, maximum = Infinity } = this.spec;
    const { left, right, top, bottom } = MARGIN;
    const finite = values.filter((v) => v != null && Number.isFinite(v));
    let low = Math.min(...finite);
    let high = Math.max(...finite);
    if (!finite.length) {
      low = 0;
      high = 1;
    } else if (high - low < 1e-9 * Math.max(1, Math.abs(low))) {
      const padding = Math.abs(low) * 0.1 || 1;
      low = Math.max(minimum, low - padding);
      high = Math.min(maximum, high + padding);
    }
    const last = Math.max(2, updates.at(-1) || 2);
    const first = Math.min(updates[0] ?? 1, last - 1);
    const width = this.width - left - right;
    const height = HEIGHT - top - bottom;
    this.x = (update) => left + width * ((update - first) / (last - first));
    this.y = (v) => top + height * (1 - (v - low) / (high - low));
    return [low, high];
  }

  // SVG path of a curve, interrupted where a value is missing
  linePath(updates, values) {
    let path = '';
    let command = 'M';
    values.forEach((v, i) => {
      if (v == null || !Number.isFinite(v)) command = 'M';
      else {
        path += `${command}${this.x(updates[i]).toFixed(1)},${this.y(v).toFixed(1)}`;
        command = 'L';
      }
    });
    return path;
  }

  // SVG path of the area between two curves
  bandPath(updates, low, high) {
    const lowerEdge = low
      .map((v, i) => `${this.x(updates[i]).toFixed(1)},${this.y(v).toFixed(1)}`)
      .reverse();
    return `${this.linePath(updates, high)}L${lowerEdge.join('L')}Z`;
  }

  // Horizontal line across the plot
  horizontalLine(v, attributes) {
    const y = this.y(v);
    return h('line', {
      x1: MARGIN.left,
      x2: this.width - MARGIN.right,
      y1: y,
      y2: y,
      ...attributes,
    });
  }

  gridLines(low, high) {
    return ticks(low, high).flatMap((v) => [
      this.horizontalLine(v, { stroke: 'var(--line)' }),
      h('text', { x: MARGIN.left - 4, y: this.y(v) + 3, 'text-anchor': 'end' }, formatDigits(v)),
    ]);
  }

  // Dashed lines with their names, such as the return of the random policy
  referenceLines(references) {
    const x = this.width - MARGIN.right;
    return references.flatMap(([name, v]) => {
      const isClose = ([, w]) => w > v && this.y(v) - this.y(w) < 14;
      const fitsAbove = this.y(v) > MARGIN.top + 12 && !references.some(isClose);
      const y = fitsAbove ? this.y(v) - 3 : this.y(v) + 10;
      return [
        this.horizontalLine(v, { stroke: 'var(--soft)', 'stroke-dasharray': '4 3' }),
        h('text', { x, y, 'text-anchor': 'end' }, name),
      ];
    });
  }

  // The only point of a curve that has no line yet
  point(update, v) {
    return h('circle', { cx: this.x(update), cy: this.y(v), r: 2.5, fill: 'rgb(var(--plus))' });
  }

  // A dot with its 95 % interval, which is 0 wide if the return is exact
  evaluationDot(update, v, ci) {
    const x = this.x(update);
    const interval = ci ? ` ± ${formatDigits(ci)}` : '';
    return h(
      'g',
      { fill: 'rgb(var(--minus))', stroke: 'rgb(var(--minus))' },
      h('line', { x1: x, x2: x, y1: this.y(v - ci), y2: this.y(v + ci) }),
      h('circle', { cx: x, cy: this.y(v), r: 3, stroke: 'none' }),
      h('title', {}, `greedy evaluation after update ${update}: ${formatDigits(v)}${interval}`),
    );
  }

  nearest(px) {
    const { update } = this.monitor.state.curves;
    let best = null;
    update.forEach((u, i) => {
      if (best == null || Math.abs(this.x(u) - px) < Math.abs(this.x(update[best]) - px)) best = i;
    });
    return best;
  }

  mark(i) {
    const { curves } = this.monitor.state;
    const at = i == null ? this.values.length - 1 : i;
    const v = this.values[at];
    const show = i != null && v != null ? 'visible' : 'hidden';
    const spread = this.spec.key === 'return' ? curves.spread[at] : null;
    const plusMinus = spread == null ? '' : ` ± ${formatDigits(spread)}`;
    const where = i == null ? '' : ` at ${Math.round(curves.update[i])}`;
    this.now.textContent = formatDigits(v) + plusMinus + where;
    for (const el of [this.cross, this.dot]) el.setAttribute('visibility', show);
    if (show === 'hidden') return;
    for (const name of ['x1', 'x2']) this.cross.setAttribute(name, this.x(curves.update[i]));
    this.dot.setAttribute('cx', this.x(curves.update[i]));
    this.dot.setAttribute('cy', this.y(v));
  }
}

class Monitor {
  constructor(model, root) {
    this.model = model;
    this.highlighted = null;
    const button = (name, on) => h('button', { type: 'button', onclick: on }, name);
    const setting = (name, key) => {
      const field = h('input', {
        type: 'number',
        step: 'any',
        min: 0,
        'aria-label': name,
        onkeydown: (e) => {
          e.stopPropagation();
          if (e.key === 'Enter') this.set(key);
        },
      });
      field.addEventListener('input', () => {
        field.dataset.edited = '1';
      });
      return field;
    };
    this.title = h('b');
    this.phase = h('span', { class: 'phase', role: 'status' });
    this.times = h('span', { class: 'times' });
    this.done = h('i');
    this.pause = button('pause', () =>
      this.send({
        type: this.pausing ? 'resume' : 'pause',
      }),
    );
    this.stop = button('stop after this update', () => this.send({ type: 'stop' }));
    this.save = button('save now', () => this.send({ type: 'save' }));
    this.fields = {
      kl_coef: setting('KL coefficient', 'kl_coef'),
      learning_rate: setting('learning rate', 'learning_rate'),
    };
    this.setButtons = Object.fromEntries(
      Object.keys(this.fields).map((key) => [key, button('set', () => this.set(key))]),
    );
    this.setButtons.kl_coef.setAttribute('aria-label', 'set the KL coefficient');
    this.setButtons.learning_rate.setAttribute('aria-label', 'set the learning rate');
    this.note = h('span', { class: 'note', role: 'status' });
    this.charts = CHARTS.map((spec) => new Chart(this, spec));
    this.strip = h('div', { class: 'strip', role: 'img', 'aria-label': 'Where the time went' });
    this.legend = h('div', { class: 'legend' });
    this.log = h('div', { class: 'log', role: 'log', 'aria-label': 'Findings and events' });
    this.el = h(
      'div',
      { class: 'widget', role: 'region', 'aria-label': 'Training monitor' },
      h('div', { class: 'bar' }, this.title, this.phase, this.times),
      h('div', { class: 'done' }, this.done),
      h(
        'div',
        { class: 'controls' },
        this.pause,
        this.stop,
        this.save,
        h('label', {}, 'KL coefficient', this.fields.kl_coef, this.setButtons.kl_coef),
        h('label', {}, 'learning rate', this.fields.learning_rate, this.setButtons.learning_rate),
        this.note,
      ),
      h('div', { class: 'charts' }, ...this.charts.map((chart) => chart.el)),
      h('div', { class: 'split' }, this.strip, this.legend),
      this.log,
    );
    root.append(h('style', {}, THEME + CSS), this.el);
    this.show();
    this.announce(500);
  }

  // Repeat the first message until the kernel receives it: when a cell starts to run, the kernel
  // may not have a thread yet that receives messages meanwhile.
  announce(after) {
    if (this.state.connected || !this.active || this.closed || after > 60000) return;
    this.send({ type: 'connect' });
    setTimeout(() => this.announce(2 * after), after);
  }

  get active() {
    return ['running', 'pausing', 'paused', 'stopping'].includes(this.state.phase);
  }

  get pausing() {
    return ['pausing', 'paused'].includes(this.state.phase);
  }

  get state() {
    return this.model.get('state');
  }

  send(message) {
    this.model.send(message);
  }

  set(key) {
    const field = this.fields[key];
    if (field.value === '') return;
    delete field.dataset.edited;
    this.send({ type: 'set', name: key, value: Number(field.value) });
  }

  show() {
    const s = this.state;
    const { active } = this;
    const enabled = active && s.connected;
    this.title.textContent = s.title;
    this.phase.textContent = s.phase;
    this.phase.classList.toggle('warn', s.phase === 'failed' || s.phase === 'paused');
    const spent = s.time.collect + s.time.update + s.time.evaluate;
    const timeTo = (update) => formatTime((spent / s.updates_this_run) * (update - s.update));
    let left = '';
    if (active && s.updates_this_run) {
      left = `, about ${timeTo(s.updates)} left`;
      if (s.next_evaluation && s.next_evaluation < s.updates)
        left += `, next evaluation in ${timeTo(s.next_evaluation)}`;
    }
    this.times.textContent = `update ${s.update} of ${s.updates} · ${formatTime(s.seconds)}${left}`;
    this.done.style.width = `${100 * Math.min(1, s.update / s.updates)}%`;
    this.pause.textContent = this.pausing ? 'resume' : 'pause';
    for (const button of [
      this.pause,
      this.stop,
      this.save,
      ...Object.values(this.setButtons),
      ...Object.values(this.fields),
    ]) {
      button.disabled = !enabled;
    }
    this.stop.disabled = !enabled || s.phase === 'stopping';
    for (const [key, field] of Object.entries(this.fields)) {
      if (!field.dataset.edited) field.value = String(+Number(s[key]).toPrecision(6));
    }
    this.note.textContent = s.note;
    this.note.classList.toggle('warn', s.rejected);
    for (const chart of this.charts) chart.draw();
    const total = Object.values(s.time).reduce((sum, x) => sum + x, 0) || 1;
    const color = (name) => (name ? `rgb(var(${name}))` : 'var(--faint)');
    this.strip.replaceChildren(
      ...PHASES.map(([key, , name]) =>
        h('i', { style: `width:${(100 * s.time[key]) / total}%;background:${color(name)}` }),
      ),
    );
    this.legend.replaceChildren(
      ...PHASES.map(([key, text, name]) =>
        h(
          'span',
          {},
          h('i', { style: `background:${color(name)}` }),
          `${text} ${((100 * s.time[key]) / total).toFixed(0)} %`,
        ),
      ),
    );
    this.log.replaceChildren(
      h(
        'ul',
        {},
        ...s.event_log.map(([kind, update, name, text]) =>
          h(
            'li',
            { class: kind },
            h('span', { class: 'at' }, `update ${update}`),
            h('b', {}, name),
            text ? `: ${text}` : '',
          ),
        ),
      ),
    );
    this.log.hidden = !s.event_log.length;
  }

  highlight(i) {
    this.highlighted = i;
    for (const chart of this.charts) chart.mark(i);
  }

  close() {
    this.closed = true;
    for (const chart of this.charts) chart.resizeObserver.disconnect();
  }
}

function render({ model, el }) {
  const host = h('div');
  el.append(host);
  const monitor = new Monitor(model, host.attachShadow({ mode: 'open' }));
  const stopFollowingTheme = followTheme(monitor.el);
  const changed = () => monitor.show();
  model.on('change:state', changed);
  return () => {
    stopFollowingTheme();
    model.off('change:state', changed);
    monitor.close();
  };
}

export default { render };
