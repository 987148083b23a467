// The episode player. One source for three shapes: a live widget (anywidget calls `render` with a model of its own), and a page
// without a kernel (which calls it with a model that answers from what the page holds).

const CSS = `
button svg { width: 14px; height: 14px; margin: 0; display: inline-block; vertical-align: -2px; fill: currentColor; }
.bar { display: flex; flex-wrap: wrap; gap: 6px 8px; align-items: center; padding: 8px 10px; border-bottom: 1px solid var(--line); background: var(--panel); border-radius: 8px 8px 0 0; }
.bar .title { font-weight: 600; flex: 1 1 auto; min-width: 12em; }
.bar label, .controls label { color: var(--soft); display: inline-flex; gap: 4px; align-items: center; }
.sides { display: grid; grid-template-columns: minmax(0, 1fr); }
.sides.two { grid-template-columns: repeat(2, minmax(0, 1fr)); } .sides.two .side + .side { border-left: 1px solid var(--line); }
.side { display: grid; grid-template-columns: minmax(220px, 300px) minmax(0, 1fr); gap: 12px; padding: 10px; min-width: 0; }
.sides.two .side { grid-template-columns: minmax(0, 1fr); } .sides.two .frame { height: 150px; } .sides.two .talk { height: 300px; }
.head { grid-column: 1 / -1; color: var(--soft); } .head b { color: var(--ink); }
.stage { min-width: 0; }
.frame { border: 1px solid var(--line); border-radius: 6px; background: var(--panel); height: 220px; display: flex; align-items: center; justify-content: center; overflow: auto; }
.frame img { max-width: 100%; max-height: 100%; image-rendering: auto; } .frame pre { margin: 0; padding: 8px; font: 12px/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: auto 1fr; gap: 1px 10px; margin: 8px 0 0; font-variant-numeric: tabular-nums; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
svg.chart { display: block; width: 100%; height: 84px; margin-top: 8px; }
.talk { overflow-y: auto; height: 416px; border: 1px solid var(--line); border-radius: 6px; padding: 6px 8px; position: relative; min-width: 0; }
.talk details { color: var(--soft); margin-bottom: 6px; } .talk summary { cursor: pointer; }
.plain { white-space: pre-wrap; overflow-wrap: anywhere; }
.turn { border-left: 3px solid transparent; padding: 4px 8px; margin: 2px 0; border-radius: 4px; cursor: pointer; content-visibility: auto; contain-intrinsic-size: auto 70px; }
.turn.now { border-left-color: var(--accent); background: var(--panel); }
.turn .no { color: var(--faint); font-size: 11px; } .turn .said { margin-top: 2px; font: 12.5px/1.6 ui-monospace, monospace; }
.turn .thought { color: var(--soft); font-style: italic; } .turn .badges { display: flex; flex-wrap: wrap; gap: 4px 10px; font-size: 11.5px; color: var(--soft); font-variant-numeric: tabular-nums; }
.bad { color: var(--warn); font-weight: 600; } .badges .bad { max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; } .frame mark { background: rgba(var(--minus), .45); color: inherit; border-radius: 2px; }
.token { white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 2px; padding: 1px 0; } .token:hover { outline: 1px solid var(--accent); } .token.given { text-decoration: underline dotted; opacity: .7; }
.choices { margin: 2px 0 0; font: 12px/1.5 ui-monospace, monospace; } .choices div { display: grid; grid-template-columns: 9em 1fr 5em; gap: 6px; align-items: center; }
.choices i { display: block; height: 8px; background: rgba(var(--plus), .55); border-radius: 2px; } .choices .chosen { font-weight: 700; }
.controls { display: flex; flex-wrap: wrap; gap: 6px 8px; align-items: center; padding: 8px 10px; border-top: 1px solid var(--line); }
.controls input[type=range] { flex: 1 1 200px; min-width: 120px; accent-color: var(--accent); } .controls .at { min-width: 7.5em; text-align: right; font-variant-numeric: tabular-nums; color: var(--soft); }
.list { max-height: 168px; overflow: auto; border-top: 1px solid var(--line); } .list table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.list th { position: sticky; top: 0; background: var(--panel); text-align: right; font-weight: 600; padding: 0; } .list th button { border: 0; background: none; width: 100%; text-align: right; }
.list td { padding: 2px 8px; text-align: right; border-top: 1px solid var(--line); } .list td:last-child, .list th:last-child, .list th:last-child button { text-align: left; }
.list tr.here { background: rgba(var(--plus), .16); } .list tbody tr { cursor: pointer; }
.legend { display: inline-flex; align-items: center; gap: 5px; color: var(--soft); font-size: 11.5px; } .legend i { width: 70px; height: 9px; border-radius: 2px; border: 1px solid var(--line); }
.tip { position: absolute; z-index: 5; max-width: 300px; padding: 6px 9px; background: var(--paper); border: 1px solid var(--line); border-radius: 6px; box-shadow: 0 3px 12px rgba(0, 0, 0, .22); font-size: 12px; pointer-events: none; font-variant-numeric: tabular-nums; }
.tip[hidden] { display: none; } .tip .word { font: 12.5px ui-monospace, monospace; font-weight: 700; white-space: pre-wrap; overflow-wrap: anywhere; } .tip table { border-spacing: 0; } .tip td { padding: 0 8px 0 0; } .tip td:first-child { color: var(--soft); } .tip .alt td:first-child { font-family: ui-monospace, monospace; color: var(--ink); white-space: pre-wrap; }
.edit { padding: 8px 10px; border-top: 1px solid var(--line); display: grid; gap: 6px; } .edit textarea { width: 100%; box-sizing: border-box; min-height: 64px; font: 12.5px/1.5 ui-monospace, monospace; color: inherit; background: var(--paper); border: 1px solid var(--line); border-radius: 5px; padding: 6px; }
.edit .fields { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 8px; } .edit label { display: grid; gap: 2px; color: var(--soft); } .edit .row { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; } .note { color: var(--soft); } .note.bad { color: var(--warn); }
.wide { position: relative; }
.small .frame { height: 150px; } .small .talk { height: 266px; } .small svg.chart { height: 64px; } .small .facts dd, .small .facts dt { font-size: 12px; } .small .list { max-height: 132px; }
@container (max-width: 620px) { .side { grid-template-columns: minmax(0, 1fr); } .sides.two { grid-template-columns: minmax(0, 1fr); } .sides.two .side + .side { border-left: 0; border-top: 1px solid var(--line); } }
@media (prefers-reduced-motion: no-preference) { .talk { scroll-behavior: auto; } }
`;

const QUANTITIES = {
  logprob: { name: 'log-probability', kind: 'minus', help: 'nats; the darker, the more surprising' },
  entropy: { name: 'entropy', kind: 'one', help: 'nats; the darker, the less sure' },
  value: { name: 'value', kind: 'both', help: 'expected return before the token' },
  advantage: { name: 'advantage', kind: 'both', help: 'better or worse than expected' },
  kl: { name: 'KL to the reference', kind: 'both', help: 'log-probability minus the reference\'s, nats' },
  none: { name: 'nothing', kind: 'none', help: '' },
};

const ICONS = { play: 'M3 1.5v11l9-5.5z', pause: 'M3 2h3v10H3zM8 2h3v10H8z', first: 'M1 2h2v10H1zM8 2v10L3.5 7zM13 2v10L8.5 7z', back: 'M11 2v10L5 7zM2 2h2v10H2z', forward: 'M3 2v10l6-5zM10 2h2v10h-2z', up: 'M9 2v10L3 7z', down: 'M5 2v10l6-5z' };
const icon = (name) => h('svg', { viewBox: '0 0 14 14', 'aria-hidden': 'true' }, h('path', { d: ICONS[name] }));
const short = (text, n = 60) => (text.length > n ? `${text.slice(0, n - 1)}…` : text);

// Text that a terminal would colour: what is coloured is marked, the codes are left out
function terminal(text) {
  const parts = [];
  let marked = false;
  text.split(/\x1b\[([\d;]*)m/).forEach((part, i) => { if (i % 2) marked = !/^0?$/.test(part); else if (part) parts.push(marked ? h('mark', {}, part) : part); });
  return parts;
}

const largest = (values) => values.reduce((most, x) => (x == null ? most : Math.max(most, Math.abs(x))), 0);

// How strongly, and in which direction, a number is coloured: -1 to 1
function strength(kind, x, scale) {
  if (x == null || !scale) return 0;
  if (kind === 'minus') return -Math.min(1, -x / scale);
  return Math.max(-1, Math.min(1, x / scale));
}

function paint(kind, s) {
  if (!s || kind === 'none') return '';
  const ink = kind === 'one' ? 'one' : s < 0 ? 'minus' : 'plus';
  return `rgba(var(--${ink}), ${(0.08 + 0.62 * Math.abs(s)).toFixed(3)})`;
}

function scaleOf(quantity, episode) {
  if (quantity === 'logprob') return 5;
  return largest(episode.turns.flatMap((t) => (t.tokens ? t.tokens[quantity] || [] : [])));
}

// One episode: its stage, its conversation, and what is shown of the current step
class Side {
  constructor(player) {
    this.player = player;
    this.head = h('div', { class: 'head' });
    this.picture = h('div', { class: 'frame', 'aria-label': 'The environment', role: 'img' });
    this.facts = h('dl', { class: 'facts' });
    this.chart = h('svg', { class: 'chart', role: 'img', 'aria-label': 'Return so far, and value, by step' });
    this.talk = h('div', { class: 'talk', role: 'log', 'aria-label': 'The conversation', tabindex: '0' });
    this.el = h('div', { class: 'side' }, this.head, h('div', { class: 'stage' }, this.picture, this.chart, this.facts), this.talk);
    this.sized = new ResizeObserver(() => { if (this.episode && this.chart.clientWidth !== this.drawn) { this.draw(); this.place(this.player.step); } });
    this.sized.observe(this.chart);
    this.talk.addEventListener('pointerover', (e) => this.hover(e));
    this.talk.addEventListener('pointerleave', () => player.hideTip());
    this.talk.addEventListener('click', (e) => {
      const turn = e.target.closest('.turn');
      if (turn) player.seek(+turn.dataset.turn);
    });
  }

  get steps() { return this.episode ? this.episode.turns.length : 0; }

  load(episode) {
    this.episode = episode;
    const what = [episode.env, episode.index == null ? null : `episode ${episode.index}`, episode.seed == null ? null : `seed ${episode.seed}`];
    this.head.replaceChildren(h('b', {}, episode.label || what.filter(Boolean).join(' · ') || 'episode'), ` — return ${number(episode.return)}, ${episode.end}`);
    this.words = [];
    this.talk.replaceChildren(...(episode.system == null ? [] : [h('details', {}, h('summary', {}, 'system prompt'), h('div', { class: 'plain' }, episode.system))]),
      ...episode.turns.map((turn, t) => this.turn(turn, t)),
      ...(episode.final == null ? [] : [h('div', { class: 'turn', 'data-turn': this.steps }, h('div', { class: 'no' }, 'then'), h('div', { class: 'plain' }, episode.final))]));
    this.rows = [...this.talk.querySelectorAll('.turn')];
    this.colour();
    this.draw();
  }

  turn(turn, t) {
    const said = h('div', { class: 'said' });
    if (turn.choices) {
      said.append(...turn.choices.map(([text, logprob, chosen]) => h('div', { class: 'choices' }, h('div', {},
        h('span', { class: chosen ? 'plain chosen' : 'plain' }, text), h('i', { style: `width:${(100 * Math.exp(logprob)).toFixed(1)}%` }), h('span', {}, `${(100 * Math.exp(logprob)).toFixed(1)} %`)))));
    } else if (turn.tokens) {
      turn.tokens.text.forEach((text, k) => {
        const word = h('span', { class: turn.tokens.given && turn.tokens.given.includes(k) ? 'token given' : 'token', 'data-token': k }, text === '' ? '·' : text);
        this.words.push([word, turn.tokens, k]);
        said.append(word);
      });
    } else said.append(...(turn.thought ? [h('span', { class: 'thought plain' }, `${turn.thought}\n`)] : []), h('span', { class: 'plain' }, turn.response));
    const badges = [`reward ${number(turn.reward)}`, turn.advantage == null ? null : `advantage ${number(turn.advantage)}`, turn.value == null ? null : `value ${number(turn.value)}`];
    return h('div', { class: 'turn', 'data-turn': t }, h('div', { class: 'no' }, `turn ${t}`), h('div', { class: 'plain' }, turn.observation), said,
      h('div', { class: 'badges' }, ...badges.filter(Boolean).map((b) => h('span', {}, b)),
        turn.valid ? h('span', {}, `action ${turn.action}`) : h('span', { class: 'bad', title: turn.reason || '' }, `invalid: ${short(turn.reason || 'no reason given')}`),
        turn.stopped === false ? h('span', { class: 'bad' }, 'cut at the limit') : null));
  }

  colour() {
    const { quantity } = this.player, { kind } = QUANTITIES[quantity], scale = kind === 'none' ? 0 : scaleOf(quantity, this.episode);
    for (const [word, tokens, k] of this.words) word.style.background = paint(kind, strength(kind, tokens[quantity] ? tokens[quantity][k] : null, scale));
    this.scale = scale;
  }

  get sums() { const sums = [0]; for (const turn of this.episode.turns) sums.push(sums.at(-1) + turn.reward); return sums; }

  // Return so far as steps, value as dots, the current step as a line; on one scale with what stands beside it
  draw() {
    const beside = this.player.sides.includes(this) ? this.player.sides : [this], { turns } = this.episode, n = Math.max(...beside.map((side) => side.steps)), { sums } = this, left = 42, right = 8, top = 6, bottom = 16, W = Math.max(160, this.chart.clientWidth || 280), H = this.player.small ? 64 : 84;
    this.drawn = this.chart.clientWidth;
    this.chart.setAttribute('viewBox', `0 0 ${W} ${H}`);
    const values = turns.map((turn) => turn.value), known = beside.flatMap((side) => [...side.sums, ...side.episode.turns.map((turn) => turn.value)]).filter((v) => v != null);
    const digits = (x) => number(+x.toPrecision(2), 5);
    let low = Math.min(...known), high = Math.max(...known);
    if (low === high) { low -= 1; high += 1; }
    this.x = (s) => left + (W - left - right) * (n ? s / n : 0);
    const y = (v) => top + (H - top - bottom) * (1 - (v - low) / (high - low));
    let path = `M${this.x(0)},${y(0)}`;
    for (let s = 1; s <= turns.length; s += 1) path += `H${this.x(s)}V${y(sums[s])}`;
    this.mark = h('line', { y1: top, y2: H - bottom, stroke: 'var(--accent)', 'stroke-width': 1.5 });
    this.chart.replaceChildren(
      h('line', { x1: left, x2: W - right, y1: y(Math.max(low, Math.min(high, 0))), y2: y(Math.max(low, Math.min(high, 0))), stroke: 'var(--line)' }),
      h('path', { d: path, fill: 'none', stroke: 'var(--ink)', 'stroke-width': 1.5 }),
      ...values.map((v, s) => (v == null ? null : h('circle', { cx: this.x(s), cy: y(v), r: n > 60 ? 1 : 2, fill: 'var(--warn)' }))), this.mark,
      h('text', { x: left - 4, y: y(high) + 4, 'text-anchor': 'end' }, digits(high)), h('text', { x: left - 4, y: y(low) + 3, 'text-anchor': 'end' }, digits(low)),
      h('text', { x: left, y: H - 3 }, values.some((v) => v != null) ? 'return so far (line), value (dots)' : 'return so far'), h('text', { x: W - right, y: H - 3, 'text-anchor': 'end' }, `step ${n}`));
  }

  show(step) {
    const s = Math.min(step, this.steps), turn = this.episode.turns[s];
    for (const old of this.talk.querySelectorAll('.turn.now')) old.classList.remove('now');
    const row = this.rows[s] || this.rows.at(-1);
    if (row) {
      row.classList.add('now');
      const over = row.offsetTop - this.talk.scrollTop;
      if (over < 0 || over + row.offsetHeight > this.talk.clientHeight) this.talk.scrollTop = row.offsetTop - Math.min(40, this.talk.clientHeight / 4);
    }
    this.place(step);
    const facts = turn ? [['action', turn.valid ? turn.action : `${turn.action} (stood in)`], ['reward', number(turn.reward)], ...(turn.returns == null ? [] : [['return from here', number(turn.returns)]]), ['value', number(turn.value)], ['advantage', number(turn.advantage)], ['valid', turn.valid ? 'yes' : `no: ${turn.reason || ''}`]] : [['end', this.episode.end]];
    this.facts.replaceChildren(...[['return so far', number(this.sums[s])], ...facts].flatMap(([name, text]) => [h('dt', {}, name), h('dd', { title: String(text) }, String(text))]));
    this.view(s, turn ? turn.frame : this.episode.finalFrame, turn ? turn.observation : this.episode.final ?? this.episode.end);
  }

  place(step) {
    const x = this.x(Math.min(step, this.steps));
    this.mark.setAttribute('x1', x); this.mark.setAttribute('x2', x);
  }

  view(step, frame, text) {
    const key = frame == null || frame.text != null ? `text ${step}` : `frame ${frame}`;
    if (key === this.viewed) return;
    this.viewed = key;
    const inWords = () => { if (this.viewed === key) this.picture.replaceChildren(h('pre', {}, ...(frame == null || frame.text == null ? [text] : terminal(frame.text)))); };
    if (frame == null || frame.text != null) { inWords(); return; }
    this.player.source.frame(frame).then((url) => {
      if (this.viewed !== key) return;
      if (!this.image) this.image = h('img', { alt: '' });
      this.image.src = url; this.image.alt = text;
      if (this.picture.firstChild !== this.image) this.picture.replaceChildren(this.image);
    }, inWords);
  }

  hover(event) {
    const word = event.target.closest('.token');
    if (!word) { this.player.hideTip(); return; }
    const turn = this.episode.turns[+word.closest('.turn').dataset.turn], k = +word.dataset.token, { tokens } = turn;
    const rows = Object.entries(QUANTITIES).filter(([q]) => tokens[q] && tokens[q][k] != null)
      .map(([q, { name }]) => h('tr', {}, h('td', {}, name), h('td', {}, q === 'logprob' ? `${number(tokens[q][k])} (${(100 * Math.exp(tokens[q][k])).toPrecision(3)} %)` : number(tokens[q][k]))));
    const others = tokens.alternatives && tokens.alternatives[k] ? tokens.alternatives[k] : [];
    this.player.showTip(word, [h('div', { class: 'word' }, JSON.stringify(word.textContent)),
      tokens.given && tokens.given.includes(k) ? h('div', {}, 'put there, not sampled') : h('table', {}, ...rows),
      ...(others.length ? [h('div', { class: 'note' }, 'what else was likely'), h('table', { class: 'alt' }, ...others.map(([text, logprob]) => h('tr', {}, h('td', {}, JSON.stringify(text)), h('td', {}, `${(100 * Math.exp(logprob)).toPrecision(3)} %`))))] : [])]);
  }
}

const COLUMNS = [['index', 'episode'], ['seed', 'seed'], ['return', 'return'], ['turns', 'turns'], ['invalid', 'invalid'], ['surprise', 'surprise'], ['end', 'end']];
const SHOWN = { all: ['all, in order', null, true], best: ['best', 'return', false], worst: ['worst', 'return', true], invalid: ['with invalid turns', 'invalid', false], longest: ['longest', 'turns', false], surprising: ['most surprising', 'surprise', false] };

class Player {
  constructor(source, root, { small = false, follow = false } = {}) {
    this.source = source; this.root = root; this.small = small; this.follow = follow; this.step = 0; this.speed = 2; this.sort = [null, true]; this.only = 'all'; this.sides = []; this.other = null;
    this.quantity = 'logprob';
    this.build();
    this.order();
    this.go(this.source.episodes[this.shown[0]]?.key);
  }

  build() {
    const select = (label, options, on) => { const el = h('select', { 'aria-label': label, onchange: () => on(el.value) }, ...Object.entries(options).map(([value, name]) => h('option', { value }, name))); return el; };
    const button = (label, face, on) => h('button', { type: 'button', 'aria-label': label, title: label, onclick: on }, ICONS[face] ? icon(face) : face);
    this.title = h('span', { class: 'title', 'aria-live': 'polite' });
    this.filter = select('Episodes to show', Object.fromEntries(Object.entries(SHOWN).map(([k, [name]]) => [k, name])), (value) => this.show(value));
    this.colours = select('Colour tokens by', Object.fromEntries(Object.entries(QUANTITIES).map(([k, { name }]) => [k, name])), (value) => { this.quantity = value; this.recolour(); });
    this.legend = h('span', { class: 'legend' });
    this.compared = h('select', { 'aria-label': 'Compare with', onchange: () => this.compare(this.compared.value === '' ? null : +this.compared.value) });
    this.prev = button('Previous episode', 'up', () => this.hop(-1)); this.next = button('Next episode', 'down', () => this.hop(1));
    this.edit = this.source.branch ? button('Branch from this turn', 'branch…', () => this.openEditor()) : null;
    this.area = h('div', { class: 'sides' });
    this.button = button('Play', 'play', () => this.toggle());
    this.slider = h('input', { type: 'range', min: 0, max: 0, value: 0, 'aria-label': 'Step', oninput: () => this.seek(+this.slider.value) });
    this.where = h('span', { class: 'at', 'aria-live': 'off' });
    this.rate = select('Steps per second', { 1: '1/s', 2: '2/s', 5: '5/s', 10: '10/s', 30: '30/s' }, (value) => { this.speed = +value; if (this.timer) { this.pause(); this.play(); } });
    this.rate.value = '2';
    this.table = h('div', { class: 'list' });
    this.editor = h('div', { class: 'edit', hidden: true });
    this.tip = h('div', { class: 'tip', role: 'tooltip', hidden: true });
    this.el = h('div', { class: this.small ? 'widget small' : 'widget', tabindex: '0', role: 'region', 'aria-label': 'Episode player: space plays, arrows step, j and k change the episode' },
      h('div', { class: 'bar' }, this.prev, this.next, this.title, h('label', {}, 'show', this.filter), h('label', {}, 'colour', this.colours), this.legend, h('label', {}, 'compare', this.compared), this.edit),
      h('div', { class: 'wide' }, this.area, this.tip), this.editor,
      h('div', { class: 'controls' }, button('First step', 'first', () => this.seek(0)), button('Step back', 'back', () => this.seek(this.step - 1)), this.button, button('Step forward', 'forward', () => this.seek(this.step + 1)), this.slider, this.where, this.rate),
      this.table);
    this.el.addEventListener('keydown', (e) => this.key(e));
    this.root.append(h('style', {}, THEME + CSS), this.el);
  }

  order() {
    const [key, up] = this.sort, all = range(this.source.episodes.length).filter((i) => this.only !== 'invalid' || this.source.episodes[i].invalid > 0);
    const of = (i) => { const x = this.source.episodes[i][key]; return x == null ? -Infinity : x; };
    this.shown = key == null ? all : all.sort((a, b) => (of(a) < of(b) ? -1 : of(a) > of(b) ? 1 : a - b) * (up ? 1 : -1));
    this.listing();
  }

  show(which) {
    this.only = which; this.filter.value = which;
    this.sort = SHOWN[which].slice(1);
    this.order();
    if (this.shown.length) this.go(this.source.episodes[this.shown[0]].key);
  }

  listing() {
    const head = h('tr', {}, ...COLUMNS.map(([key, name]) => h('th', { scope: 'col', 'aria-sort': this.sort[0] === key ? (this.sort[1] ? 'ascending' : 'descending') : 'none' },
      h('button', { type: 'button', onclick: () => { this.sort = [key, this.sort[0] === key ? !this.sort[1] : true]; this.order(); } }, name + (this.sort[0] === key ? (this.sort[1] ? ' ↑' : ' ↓') : '')))));
    const body = this.shown.slice(0, 500).map((i) => {
      const e = this.source.episodes[i];
      return h('tr', { class: e.key === this.here?.key ? 'here' : '', 'data-episode': e.key, onclick: () => this.go(e.key) }, ...COLUMNS.map(([key]) => h('td', {}, typeof e[key] === 'number' && key !== 'seed' ? number(e[key], 2) : String(e[key] ?? ''))));
    });
    this.table.replaceChildren(h('table', { 'aria-label': 'Episodes' }, h('thead', {}, head), h('tbody', {}, ...body)));
    this.table.hidden = this.source.episodes.length < 2;
    const same = this.source.episodes.filter((e) => this.here && e.key !== this.here.key && e.seed != null && e.seed === this.here.seed);
    this.compared.replaceChildren(h('option', { value: '' }, same.length ? 'nothing' : 'no other of this seed'), ...same.map((e) => h('option', { value: e.key }, e.label || `episode ${e.index ?? e.key}, return ${number(e.return, 2)}`)));
    this.compared.value = this.other == null ? '' : String(this.other);
    this.compared.disabled = !same.length;
  }

  place(key) { return this.source.episodes.findIndex((e) => e.key === key); }

  // The list has changed. Whoever steps, plays, compares or edits stays with what is looked at, also where it has gone from the list; else the newest is shown where that is followed
  refresh() {
    const { episodes } = this.source, busy = this.step > 0 || this.timer || this.other != null || !this.editor.hidden;
    this.source.forget(this.here?.key, this.other);
    const at = this.here == null ? -1 : this.place(this.here.key);
    if (at >= 0) this.here = episodes[at];
    const follows = this.follow && !busy && this.here === this.first && episodes[0]?.key !== this.here?.key;
    this.order();
    if (!this.sides.length || follows || (at < 0 && !busy)) { if (episodes.length) this.go(this.source.episodes[this.shown[0] ?? 0].key); return; }
    this.first = episodes[0];
    this.name();
  }

  name() {
    const at = this.place(this.here.key), place = this.shown.indexOf(at);
    this.title.textContent = `${this.here.label || `episode ${this.here.index ?? this.here.key}`}${place < 0 ? '' : ` — ${place + 1} of ${this.shown.length}`}${at < 0 ? ' — of an earlier update' : ''}`;
  }

  async go(key) {
    if (!this.source.episodes.length) { this.title.textContent = 'no episodes yet'; return; }
    this.pause();
    if (!this.editor.hidden) this.closeEditor();
    const next = this.source.episodes[this.place(key)] ?? this.here, beside = this.source.episodes[this.place(this.other)];
    if (this.other !== null && (key === this.other || !beside || beside.seed !== next.seed)) this.other = null;
    this.first = this.source.episodes[0]; this.here = next;
    const asked = this.asked = Symbol('asked'), wanted = [key, ...(this.other == null ? [] : [this.other])];
    let episodes;
    const slow = setTimeout(() => { if (this.asked === asked) this.title.textContent = 'waiting for the kernel…'; }, 1500);
    try { episodes = await Promise.all(wanted.map((k) => this.source.episode(k))); } catch (error) { if (this.asked === asked) this.title.textContent = error.message; return; } finally { clearTimeout(slow); }
    if (this.asked !== asked) return;
    for (const side of this.sides) side.sized.disconnect();
    this.sides = episodes.map((episode) => { const side = new Side(this); side.load(episode); return side; });
    this.area.classList.toggle('two', this.sides.length > 1);
    this.area.replaceChildren(...this.sides.map((side) => side.el));
    if (this.sides.length > 1) for (const side of this.sides) side.draw();
    const has = (q) => q === 'none' || this.sides.some((side) => side.episode.turns.some((t) => t.tokens && t.tokens[q] && t.tokens[q].some((x) => x != null)));
    for (const option of this.colours.options) option.disabled = !has(option.value);
    if (!has(this.quantity)) { this.quantity = 'none'; }
    this.colours.value = this.quantity;
    this.recolour();
    this.name();
    this.slider.max = Math.max(...this.sides.map((side) => side.steps));
    this.listing();
    this.seek(0);
  }

  compare(key) { this.other = key; return this.go(this.here.key); }

  recolour() {
    for (const side of this.sides) side.colour();
    const { kind, help } = QUANTITIES[this.quantity], scale = this.sides.length ? this.sides[0].scale : 0, ends = { minus: [`−${number(scale)}`, '0'], one: ['0', number(scale)], both: [number(-scale), number(scale)], none: ['', ''] }[kind];
    const stops = range(9).map((k) => paint(kind, kind === 'both' ? k / 4 - 1 : kind === 'minus' ? k / 8 - 1 : k / 8) || 'transparent');
    this.legend.replaceChildren(...(kind === 'none' ? [] : [ends[0], h('i', { style: `background:linear-gradient(90deg, ${stops.join(', ')})` }), ends[1]]));
    this.legend.title = help;
  }

  hop(by) { const place = this.shown.indexOf(this.place(this.here?.key)) + by; if (place >= 0 && place < this.shown.length) this.go(this.source.episodes[this.shown[place]].key); }

  seek(step) {
    const last = +this.slider.max;
    this.hideTip();
    this.step = Math.max(0, Math.min(last, step));
    this.slider.value = this.step;
    this.slider.setAttribute('aria-valuetext', `step ${this.step} of ${last}`);
    this.where.textContent = `step ${this.step} of ${last}`;
    for (const side of this.sides) side.show(this.step);
    if (this.timer && this.step >= last) this.pause();
  }

  play() {
    if (this.step >= +this.slider.max) this.seek(0);
    this.timer = setInterval(() => { if (this.el.isConnected) this.seek(this.step + 1); else this.pause(); }, 1000 / this.speed);
    this.button.replaceChildren(icon('pause')); this.button.setAttribute('aria-label', 'Pause'); this.button.title = 'Pause';
  }

  pause() {
    clearInterval(this.timer); this.timer = null;
    this.button.replaceChildren(icon('play')); this.button.setAttribute('aria-label', 'Play'); this.button.title = 'Play';
  }

  toggle() { if (this.timer) this.pause(); else this.play(); }

  key(e) {
    const own = e.composedPath()[0], typing = /^(TEXTAREA|SELECT)$/.test(own.tagName) || (own.tagName === 'BUTTON' && e.key === ' ') || e.ctrlKey || e.metaKey || e.altKey;
    const does = { ' ': () => this.toggle(), ArrowLeft: () => this.seek(this.step - 1), ArrowRight: () => this.seek(this.step + 1), Home: () => this.seek(0), End: () => this.seek(+this.slider.max), j: () => this.hop(1), k: () => this.hop(-1) }[e.key];
    if (typing || !does) return;
    e.preventDefault(); e.stopPropagation();
    does();
  }

  showTip(word, children) {
    this.tip.replaceChildren(...children);
    this.tip.hidden = false;
    const box = word.getBoundingClientRect(), area = this.tip.parentElement.getBoundingClientRect(), mine = this.tip.getBoundingClientRect();
    const below = box.bottom - area.top + 4, above = box.top - area.top - mine.height - 4;
    this.tip.style.left = `${Math.max(4, Math.min(area.width - mine.width - 4, box.left - area.left))}px`;
    this.tip.style.top = `${box.bottom + mine.height + 8 > window.innerHeight && above > 0 ? above : below}px`;
  }

  hideTip() { this.tip.hidden = true; }

  openEditor() {
    if (!this.sides.length) return;
    this.pause();
    const { episode } = this.sides[0], { key } = this.here, t = Math.min(this.step, episode.turns.length - 1), turn = episode.turns[t];
    const field = (name, text, hint) => { const area = h('textarea', { 'aria-label': name, placeholder: hint, rows: 2 }); area.value = text; return [h('label', {}, name, area), area, text]; };
    const fields = { observation: field('what it is told', turn.observation), system_prompt: field('system prompt', episode.system ?? ''), begin: field('how the response begins', '', turn.response) };
    if (turn.choices) delete fields.begin;      // it chooses among whole responses
    const note = h('span', { class: 'note', role: 'status' }, 'played with the policy as it is now, to the end; not part of training');
    const go = h('button', { type: 'button', onclick: async () => {
      go.disabled = true; note.className = 'note'; note.textContent = 'playing…';
      const changes = Object.fromEntries(Object.entries(fields).filter(([, [, area, was]]) => area.value !== was).map(([name, [, area]]) => [name, area.value]));
      try {
        this.other = await this.source.branch(key, t, changes);
        await this.go(key); this.seek(t);
      } catch (error) { note.className = 'note bad'; note.textContent = error.message; go.disabled = false; }
    } }, 'sample from here');
    this.editor.replaceChildren(h('b', {}, `branch from turn ${t}`), h('div', { class: 'fields' }, ...Object.values(fields).map(([label]) => label)), h('div', { class: 'row' }, go, h('button', { type: 'button', onclick: () => this.closeEditor() }, 'cancel'), note));
    this.editor.hidden = false;
    fields.observation[1].focus();
  }

  closeEditor() { this.editor.hidden = true; this.editor.replaceChildren(); this.el.focus(); }
}

const KEPT = 500;    // pictures in the page's memory, at most

// What a widget's model knows: summaries at once, episodes and frames when they are asked for
class Source {
  constructor(model) {
    this.model = model; this.waiting = new Map(); this.known = new Map(); this.frames = new Map(); this.next = Math.floor(Math.random() * 2 ** 40);     // another view of the same widget hears the same answers
    this.listen = (message, buffers) => this.answer(message, buffers);
    model.on('msg:custom', this.listen);
    if (model.get('can_branch')) {
      this.branch = async (key, turn, changes) => (await this.ask({ type: 'branch', episode: key, turn, changes })).made;
    }
  }

  get episodes() { return this.model.get('episodes'); }

  // A first message may come to a kernel's ear before there is a thread that listens while a cell runs: what can be asked twice is
  ask(message) {
    const id = this.next += 1, send = () => this.model.send({ ...message, id });
    const again = message.type === 'branch' ? [] : [2000, 6000].map((after) => setTimeout(() => { if (this.waiting.has(id)) send(); }, after));
    return new Promise((resolve, reject) => { this.waiting.set(id, { resolve, reject }); send(); }).finally(() => again.forEach(clearTimeout));
  }

  answer(message, buffers) {
    const wait = this.waiting.get(message.id);
    if (!wait) return;
    this.waiting.delete(message.id);
    if (message.error != null) wait.reject(new Error(message.error));
    else wait.resolve({ ...message, buffers });
  }

  episode(key) {
    const given = this.model.get('given');
    if (!this.known.has(key)) this.known.set(key, given?.key === key ? Promise.resolve(given.data) : this.ask({ type: 'episode', episode: key }).then((message) => message.data));
    return this.known.get(key);
  }

  forget(...looked) { const keys = new Set([...this.episodes.map((e) => e.key), ...looked]); for (const key of this.known.keys()) if (!keys.has(key)) this.known.delete(key); }

  frame(key) {
    const given = this.model.get('given')?.frames?.[key];
    if (given && !this.frames.has(key)) this.frames.set(key, Promise.resolve(given));
    if (!this.frames.has(key)) {
      const asked = this.ask({ type: 'frame', frame: key }).then(({ data, buffers }) => data ?? URL.createObjectURL(new Blob([buffers[0]], { type: 'image/png' })));
      asked.catch(() => this.frames.delete(key));
      this.frames.set(key, asked);
    }
    while (this.frames.size > KEPT) { const [oldest] = this.frames.keys(); this.release(oldest); }
    return this.frames.get(key);
  }

  release(key) { this.frames.get(key).then((url) => { if (url.startsWith('blob:')) URL.revokeObjectURL(url); }, () => {}); this.frames.delete(key); }

  close() { this.model.off('msg:custom', this.listen); for (const key of [...this.frames.keys()]) this.release(key); }
}

function render({ model, el }) {
  const host = h('div'), source = new Source(model);
  el.append(host);
  const player = new Player(source, host.attachShadow({ mode: 'open' }), { small: model.get('small'), follow: model.get('follow') });
  const changed = () => player.refresh();
  model.on('change:episodes', changed);
  const undress = keepDressed(player.el);
  return () => { player.pause(); undress(); model.off('change:episodes', changed); source.close(); };
}

export default { render };
