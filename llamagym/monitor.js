// The training monitor: curves of a run, what keeps it from learning, and what can be done to it while it goes on.
// All it shows is in one synchronised `state`; what is clicked is sent as a message, and shows when the state comes back.

const CSS = `
.widget { margin-bottom: 6px; }
.bar { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline; padding: 8px 10px; background: var(--panel); border-radius: 8px 8px 0 0; }
.bar b { font-weight: 600; } .bar .phase { color: var(--accent); font-weight: 600; } .bar .phase.warn { color: var(--warn); } .bar .times { color: var(--soft); margin-left: auto; font-variant-numeric: tabular-nums; }
.done { height: 4px; background: var(--line); } .done i { display: block; height: 100%; background: var(--accent); transition: width .3s; }
.controls { display: flex; flex-wrap: wrap; gap: 6px 10px; align-items: center; padding: 8px 10px; border-bottom: 1px solid var(--line); }
.controls label { color: var(--soft); display: inline-flex; gap: 5px; align-items: center; } .controls input { width: 8em; font-variant-numeric: tabular-nums; }
.controls .note { color: var(--soft); flex: 1 1 16em; } .controls .note.warn { color: var(--warn); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 10px 14px; padding: 10px; }
.chart { min-width: 0; } .chart header { display: flex; gap: 6px; align-items: baseline; } .chart header { white-space: nowrap; } .chart header b { font-weight: 600; } .chart header .unit { color: var(--soft); font-size: 11.5px; overflow: hidden; text-overflow: ellipsis; }
.chart header .now { margin-left: auto; font-variant-numeric: tabular-nums; } .chart svg { display: block; width: 100%; height: 104px; cursor: crosshair; }
.split { padding: 0 10px 10px; } .split .strip { display: flex; height: 10px; border-radius: 3px; overflow: hidden; background: var(--line); } .split .legend { display: flex; flex-wrap: wrap; gap: 2px 14px; color: var(--soft); margin-top: 3px; font-variant-numeric: tabular-nums; }
.split .legend i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 5px; }
.said { border-top: 1px solid var(--line); padding: 8px 10px; max-height: 150px; overflow: auto; } .said ul { margin: 0; padding-left: 18px; } .said li { margin: 2px 0; overflow-wrap: anywhere; } .said li b { font-weight: 600; } .said .finding b { color: var(--warn); } .said .at { color: var(--faint); margin-right: 6px; font-variant-numeric: tabular-nums; }
`;

const CHARTS = [
  { key: 'return', name: 'return', help: 'mean of an update\'s episodes, and their standard deviation around it' },
  { key: 'length', name: 'turns', unit: 'per episode' },
  { key: 'invalid', name: 'invalid', unit: '% of responses', times: 100, least: 0, most: 100 },
  { key: 'kl', name: 'KL', unit: 'to the reference, nats/token', help: 'KL divergence of the policy from the reference' },
  { key: 'entropy', name: 'entropy', unit: 'nats/token' },
  { key: 'policy_loss', name: 'policy loss' },
  { key: 'value_loss', name: 'value loss' },
  { key: 'speed', name: 'speed', unit: 'sampled tokens/s' },
];
const PARTS = [['collect', 'collecting', '--plus'], ['learn', 'learning', '--minus'], ['evaluate', 'evaluating', '--one'], ['other', 'saving and waiting', null]];
const clock = (s) => { const t = Math.round(s), two = (n) => String(n).padStart(2, '0'); return t >= 3600 ? `${Math.floor(t / 3600)}:${two(Math.floor(t / 60) % 60)}:${two(t % 60)}` : `${Math.floor(t / 60)}:${two(t % 60)}`; };
const digits = (x) => (x == null || !Number.isFinite(x) ? '–' : x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5) ? x.toExponential(1).replace('.0e', 'e').replace('-', '−').replace('e-', 'e−').replace('e+', 'e') : number(+x.toPrecision(3), 5));

// Two or three round numbers between two others
function ticks(low, high) {
  const rough = (high - low) / 2.5, size = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 2.5, 5, 10].map((k) => k * size).find((s) => s >= rough), out = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k += 1) out.push(+(k * step).toPrecision(12));
  return out;
}

// A curve over the updates, with a band, dots and lines where there are some
class Chart {
  constructor(monitor, what) {
    this.monitor = monitor; this.what = what;
    this.now = h('span', { class: 'now' });
    this.svg = h('svg', { role: 'img', 'aria-label': what.name });
    this.el = h('div', { class: 'chart', title: what.help || null }, h('header', {}, h('b', {}, what.name), h('span', { class: 'unit' }, what.unit || ''), this.now), this.svg);
    this.svg.addEventListener('pointermove', (e) => monitor.look(this.nearest(e.offsetX)));
    this.svg.addEventListener('pointerleave', () => monitor.look(null));
    this.cross = h('line', { stroke: 'var(--accent)', 'stroke-width': 1, visibility: 'hidden' });
    this.dot = h('circle', { r: 3, fill: 'var(--accent)', visibility: 'hidden' });
    this.sized = new ResizeObserver(() => { if (this.svg.clientWidth !== this.width) this.draw(); });
    this.sized.observe(this.svg);
  }

  draw() {
    const { rows, evals, references } = this.monitor.state, { key, times = 1, least = -Infinity, most = Infinity } = this.what, W = this.width = this.svg.clientWidth || 240, H = 104, left = 40, right = 8, top = 8, bottom = 16;
    const u = rows.update, y = rows[key].map((v) => (v == null ? null : v * times)), isReturn = key === 'return', spread = isReturn ? rows.spread : null;
    const low = y.map((v, i) => (v == null ? null : v - (spread ? spread[i] || 0 : 0))), high = y.map((v, i) => (v == null ? null : v + (spread ? spread[i] || 0 : 0)));
    const dots = isReturn ? evals : [], lines = isReturn ? Object.entries(references) : [];
    const known = [...low, ...high, ...dots.map((d) => d[1]), ...lines.map((l) => l[1])].filter((v) => v != null && Number.isFinite(v));
    let a = Math.min(...known), b = Math.max(...known);
    if (!known.length) { a = 0; b = 1; } else if (b - a < 1e-9 * Math.max(1, Math.abs(a))) { const room = Math.abs(a) * 0.1 || 1; a = Math.max(least, a - room); b = Math.min(most, b + room); }
    const last = Math.max(2, u.at(-1) || 2), first = Math.min(u[0] ?? 1, last - 1);
    this.x = (v) => left + (W - left - right) * ((v - first) / (last - first));
    this.y = (v) => top + (H - top - bottom) * (1 - (v - a) / (b - a));
    this.values = y;
    const path = (values) => { let d = '', pen = 'M'; values.forEach((v, i) => { if (v == null || !Number.isFinite(v)) pen = 'M'; else { d += `${pen}${this.x(u[i]).toFixed(1)},${this.y(v).toFixed(1)}`; pen = 'L'; } }); return d; };
    const area = spread && u.length > 1 ? `${path(high)}L${[...low].reverse().map((v, i) => `${this.x(u[u.length - 1 - i]).toFixed(1)},${this.y(v).toFixed(1)}`).join('L')}Z` : null;
    this.svg.setAttribute('viewBox', `0 0 ${W} ${H}`);
    for (const [name, value] of [['y1', top], ['y2', H - bottom]]) this.cross.setAttribute(name, value);
    this.svg.replaceChildren(
      ...ticks(a, b).flatMap((v) => [h('line', { x1: left, x2: W - right, y1: this.y(v), y2: this.y(v), stroke: 'var(--line)' }), h('text', { x: left - 4, y: this.y(v) + 3, 'text-anchor': 'end' }, digits(v))]),
      ...lines.flatMap(([name, v]) => [h('line', { x1: left, x2: W - right, y1: this.y(v), y2: this.y(v), stroke: 'var(--soft)', 'stroke-dasharray': '4 3' }), h('text', { x: W - right, y: this.y(v) > top + 12 ? this.y(v) - 3 : this.y(v) + 10, 'text-anchor': 'end' }, name)]),
      ...(area ? [h('path', { d: area, fill: 'rgba(var(--plus), .16)' })] : []),
      h('path', { d: path(y), fill: 'none', stroke: 'rgb(var(--plus))', 'stroke-width': 1.6 }),
      ...(u.length === 1 && y[0] != null ? [h('circle', { cx: this.x(u[0]), cy: this.y(y[0]), r: 2.5, fill: 'rgb(var(--plus))' })] : []),
      ...dots.map(([at, v]) => h('circle', { cx: this.x(at), cy: this.y(v), r: 3, fill: 'rgb(var(--minus))' }, h('title', {}, `greedy evaluation after update ${at}: ${digits(v)}`))),
      h('text', { x: left, y: H - 3 }, isReturn && dots.length ? 'dots: greedy evaluation' : ''), h('text', { x: W - right, y: H - 3, 'text-anchor': 'end' }, u.length ? `update ${this.monitor.state.update}` : ''), this.cross, this.dot);
    this.mark(this.monitor.looked);
  }

  nearest(px) {
    const { update } = this.monitor.state.rows;
    let best = null;
    update.forEach((u, i) => { if (best == null || Math.abs(this.x(u) - px) < Math.abs(this.x(update[best]) - px)) best = i; });
    return best;
  }

  mark(i) {
    const { rows } = this.monitor.state, at = i == null ? this.values.length - 1 : i, v = this.values[at], show = i != null && v != null ? 'visible' : 'hidden', spread = this.what.key === 'return' ? rows.spread[at] : null;
    this.now.textContent = `${digits(v)}${spread == null ? '' : ` ± ${digits(spread)}`}${i == null ? '' : ` at ${Math.round(rows.update[i])}`}`;
    for (const el of [this.cross, this.dot]) el.setAttribute('visibility', show);
    if (show === 'hidden') return;
    for (const name of ['x1', 'x2']) this.cross.setAttribute(name, this.x(rows.update[i]));
    this.dot.setAttribute('cx', this.x(rows.update[i])); this.dot.setAttribute('cy', this.y(v));
  }
}

class Monitor {
  constructor(model, root) {
    this.model = model; this.looked = null;
    const button = (name, on) => h('button', { type: 'button', onclick: on }, name);
    const setting = (name, key) => { const field = h('input', { type: 'number', step: 'any', min: 0, 'aria-label': name, onkeydown: (e) => { e.stopPropagation(); if (e.key === 'Enter') this.set(key); } }); field.addEventListener('input', () => { field.dataset.own = '1'; }); return field; };
    this.title = h('b'); this.phase = h('span', { class: 'phase', role: 'status' }); this.times = h('span', { class: 'times' }); this.done = h('i');
    this.pause = button('pause', () => this.send({ type: this.state.phase === 'paused' || this.state.phase === 'pausing' ? 'resume' : 'pause' }));
    this.stop = button('stop after this update', () => this.send({ type: 'stop' })); this.save = button('save now', () => this.send({ type: 'save' }));
    this.fields = { kl_coef: setting('KL coefficient', 'kl_coef'), learning_rate: setting('learning rate', 'learning_rate') };
    this.sets = Object.fromEntries(Object.keys(this.fields).map((key) => [key, button('set', () => this.set(key))]));
    this.sets.kl_coef.setAttribute('aria-label', 'set the KL coefficient'); this.sets.learning_rate.setAttribute('aria-label', 'set the learning rate');
    this.note = h('span', { class: 'note', role: 'status' });
    this.charts = CHARTS.map((what) => new Chart(this, what));
    this.strip = h('div', { class: 'strip', role: 'img', 'aria-label': 'Where the time went' }); this.legend = h('div', { class: 'legend' });
    this.said = h('div', { class: 'said', role: 'log', 'aria-label': 'Findings and events' });
    this.el = h('div', { class: 'widget', role: 'region', 'aria-label': 'Training monitor' }, h('div', { class: 'bar' }, this.title, this.phase, this.times), h('div', { class: 'done' }, this.done),
      h('div', { class: 'controls' }, this.pause, this.stop, this.save, h('label', {}, 'KL coefficient', this.fields.kl_coef, this.sets.kl_coef), h('label', {}, 'learning rate', this.fields.learning_rate, this.sets.learning_rate), this.note),
      h('div', { class: 'charts' }, ...this.charts.map((chart) => chart.el)), h('div', { class: 'split' }, this.strip, this.legend), this.said);
    root.append(h('style', {}, THEME + CSS), this.el);
    this.show();
    this.call(500);
  }

  // Until the kernel hears it: at first there may be no thread yet that listens while a cell runs
  call(after) {
    if (this.state.live || !this.going || this.closed || after > 60000) return;
    this.send({ type: 'hello' });
    setTimeout(() => this.call(2 * after), after);
  }

  get going() { return ['running', 'pausing', 'paused', 'stopping'].includes(this.state.phase); }

  get state() { return this.model.get('state'); }

  send(message) { this.model.send(message); }

  set(key) {
    const field = this.fields[key];
    if (field.value === '') return;
    delete field.dataset.own;
    this.send({ type: 'set', name: key, value: Number(field.value) });
  }

  show() {
    const s = this.state, { going } = this, on = going && s.live;
    this.title.textContent = s.title;
    this.phase.textContent = s.phase; this.phase.classList.toggle('warn', s.phase === 'failed' || s.phase === 'paused');
    const left = s.update && going ? `, about ${clock((s.time.collect + s.time.learn + s.time.evaluate) / s.made * (s.updates - s.update))} left` : '';
    this.times.textContent = `update ${s.update} of ${s.updates} · ${clock(s.seconds)}${s.made ? left : ''}`;
    this.done.style.width = `${100 * Math.min(1, s.update / s.updates)}%`;
    this.pause.textContent = s.phase === 'paused' || s.phase === 'pausing' ? 'resume' : 'pause';
    for (const button of [this.pause, this.stop, this.save, ...Object.values(this.sets), ...Object.values(this.fields)]) button.disabled = !on;
    this.stop.disabled = !on || s.phase === 'stopping';
    for (const [key, field] of Object.entries(this.fields)) if (!field.dataset.own) field.value = String(+Number(s[key]).toPrecision(6));
    this.note.textContent = s.note; this.note.classList.toggle('warn', s.refused);
    for (const chart of this.charts) chart.draw();
    const total = Object.values(s.time).reduce((sum, x) => sum + x, 0) || 1, colour = (name) => (name ? `rgb(var(${name}))` : 'var(--faint)');
    this.strip.replaceChildren(...PARTS.map(([key, , name]) => h('i', { style: `width:${100 * s.time[key] / total}%;background:${colour(name)}` })));
    this.legend.replaceChildren(...PARTS.map(([key, text, name]) => h('span', {}, h('i', { style: `background:${colour(name)}` }), `${text} ${(100 * s.time[key] / total).toFixed(0)} %`)));
    this.said.replaceChildren(h('ul', {}, ...s.said.map(([kind, update, name, text]) => h('li', { class: kind }, h('span', { class: 'at' }, `update ${update}`), h('b', {}, name), text ? `: ${text}` : ''))));
    this.said.hidden = !s.said.length;
  }

  look(i) { this.looked = i; for (const chart of this.charts) chart.mark(i); }

  close() { this.closed = true; for (const chart of this.charts) chart.sized.disconnect(); }
}

function render({ model, el }) {
  const host = h('div');
  el.append(host);
  const monitor = new Monitor(model, host.attachShadow({ mode: 'open' })), undress = keepDressed(monitor.el), changed = () => monitor.show();
  model.on('change:state', changed);
  return () => { undress(); model.off('change:state', changed); monitor.close(); };
}

export default { render };
