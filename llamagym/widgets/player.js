// The episode player. One source serves a live widget, where anywidget calls `render` with a model
// that talks to the kernel, and a saved page, where the model reads from data in the page.

const CSS = `
  button svg {
    width: 14px;
    height: 14px;
    margin: 0;
    display: inline-block;
    vertical-align: -2px;
    fill: currentColor;
  }
  .bar {
    display: flex;
    flex-wrap: wrap;
    gap: 6px 8px;
    align-items: center;
    padding: 8px 10px;
    border-bottom: 1px solid var(--line);
    background: var(--panel);
    border-radius: 8px 8px 0 0;
  }
  .bar .title {
    font-weight: 600;
    flex: 1 1 auto;
    min-width: 12em;
  }
  .bar label,
  .controls label {
    color: var(--soft);
    display: inline-flex;
    gap: 4px;
    align-items: center;
  }
  .views {
    display: grid;
    grid-template-columns: minmax(0, 1fr);
  }
  .views.two {
    grid-template-columns: repeat(2, minmax(0, 1fr));
  }
  .views.two .view + .view {
    border-left: 1px solid var(--line);
  }
  .view {
    display: grid;
    grid-template-columns: minmax(220px, 300px) minmax(0, 1fr);
    align-content: start;
    gap: 12px;
    padding: 10px;
    min-width: 0;
  }
  .views.two .view {
    grid-template-columns: minmax(0, 1fr);
  }
  .views.two .frame {
    height: 150px;
  }
  .views.two .conversation {
    height: 300px;
  }
  .head {
    grid-column: 1 / -1;
    color: var(--soft);
  }
  .head b {
    color: var(--ink);
  }
  .stage {
    min-width: 0;
  }
  .frame {
    border: 1px solid var(--line);
    border-radius: 6px;
    background: var(--panel);
    height: 220px;
    display: flex;
    align-items: center;
    justify-content: center;
    overflow: auto;
  }
  .frame img {
    max-width: 100%;
    max-height: 100%;
    image-rendering: auto;
  }
  .frame pre {
    margin: 0;
    padding: 8px;
    font:
      12px/1.4 ui-monospace,
      monospace;
    white-space: pre-wrap;
    overflow-wrap: anywhere;
  }
  .facts {
    display: grid;
    grid-template-columns: auto 1fr;
    gap: 1px 10px;
    margin: 8px 0 0;
    font-variant-numeric: tabular-nums;
  }
  .facts dt {
    color: var(--soft);
  }
  .facts dd {
    margin: 0;
    overflow: hidden;
    text-overflow: ellipsis;
    white-space: nowrap;
  }
  svg.chart {
    display: block;
    width: 100%;
    height: 84px;
    margin-top: 8px;
  }
  .conversation {
    overflow-y: auto;
    height: 416px;
    border: 1px solid var(--line);
    border-radius: 6px;
    padding: 6px 8px;
    position: relative;
    min-width: 0;
  }
  .conversation details {
    color: var(--soft);
    margin-bottom: 6px;
  }
  .conversation summary {
    cursor: pointer;
  }
  .plain {
    white-space: pre-wrap;
    overflow-wrap: anywhere;
  }
  .turn {
    border-left: 3px solid transparent;
    padding: 4px 8px;
    margin: 2px 0;
    border-radius: 4px;
    cursor: pointer;
    content-visibility: auto;
    contain-intrinsic-size: auto 70px;
  }
  .turn.now {
    border-left-color: var(--accent);
    background: var(--panel);
  }
  .turn .no {
    color: var(--faint);
    font-size: 11px;
  }
  .turn .response {
    margin-top: 2px;
    font:
      12.5px/1.6 ui-monospace,
      monospace;
  }
  .turn .reasoning {
    color: var(--soft);
    font-style: italic;
  }
  .turn .badges {
    display: flex;
    flex-wrap: wrap;
    gap: 4px 10px;
    font-size: 11.5px;
    color: var(--soft);
    font-variant-numeric: tabular-nums;
  }
  .bad {
    color: var(--warn);
    font-weight: 600;
  }
  .badges .bad {
    max-width: 100%;
    overflow: hidden;
    text-overflow: ellipsis;
    white-space: nowrap;
  }
  .frame mark {
    background: rgba(var(--minus), 0.45);
    color: inherit;
    border-radius: 2px;
  }
  .token {
    white-space: pre-wrap;
    overflow-wrap: anywhere;
    border-radius: 2px;
    padding: 1px 0;
  }
  .token:hover {
    outline: 1px solid var(--accent);
  }
  .token.forced {
    text-decoration: underline dotted;
    opacity: 0.7;
  }
  .candidates {
    margin: 2px 0 0;
    font:
      12px/1.5 ui-monospace,
      monospace;
  }
  .candidates div {
    display: grid;
    grid-template-columns: 9em 1fr 5em;
    gap: 6px;
    align-items: center;
  }
  .candidates i {
    display: block;
    height: 8px;
    background: rgba(var(--plus), 0.55);
    border-radius: 2px;
  }
  .candidates .chosen {
    font-weight: 700;
  }
  .controls {
    display: flex;
    flex-wrap: wrap;
    gap: 6px 8px;
    align-items: center;
    padding: 8px 10px;
    border-top: 1px solid var(--line);
  }
  .controls input[type='range'] {
    flex: 1 1 200px;
    min-width: 120px;
    accent-color: var(--accent);
  }
  .controls .at {
    min-width: 7.5em;
    text-align: right;
    font-variant-numeric: tabular-nums;
    color: var(--soft);
  }
  .list {
    max-height: 168px;
    overflow: auto;
    border-top: 1px solid var(--line);
  }
  .list table {
    border-collapse: collapse;
    width: 100%;
    font-variant-numeric: tabular-nums;
  }
  .list th {
    position: sticky;
    top: 0;
    background: var(--panel);
    text-align: right;
    font-weight: 600;
    padding: 0;
  }
  .list th button {
    border: 0;
    background: none;
    width: 100%;
    text-align: right;
  }
  .list td {
    padding: 2px 8px;
    text-align: right;
    border-top: 1px solid var(--line);
  }
  .list td:last-child,
  .list th:last-child,
  .list th:last-child button {
    text-align: left;
  }
  .list tr.here {
    background: rgba(var(--plus), 0.16);
  }
  .list tbody tr {
    cursor: pointer;
  }
  .legend {
    display: inline-flex;
    align-items: center;
    gap: 5px;
    color: var(--soft);
    font-size: 11.5px;
  }
  .legend i {
    width: 70px;
    height: 9px;
    border-radius: 2px;
    border: 1px solid var(--line);
  }
  .tip {
    position: absolute;
    z-index: 5;
    max-width: 300px;
    padding: 6px 9px;
    background: var(--paper);
    border: 1px solid var(--line);
    border-radius: 6px;
    box-shadow: 0 3px 12px rgba(0, 0, 0, 0.22);
    font-size: 12px;
    pointer-events: none;
    font-variant-numeric: tabular-nums;
  }
  .tip[hidden] {
    display: none;
  }
  .tip .word {
    font:
      12.5px ui-monospace,
      monospace;
    font-weight: 700;
    white-space: pre-wrap;
    overflow-wrap: anywhere;
  }
  .tip table {
    border-spacing: 0;
  }
  .tip td {
    padding: 0 8px 0 0;
  }
  .tip td:first-child {
    color: var(--soft);
  }
  .tip .alt td:first-child {
    font-family: ui-monospace, monospace;
    color: var(--ink);
    white-space: pre-wrap;
  }
  .edit {
    padding: 8px 10px;
    border-top: 1px solid var(--line);
    display: grid;
    gap: 6px;
  }
  .edit textarea {
    width: 100%;
    box-sizing: border-box;
    min-height: 64px;
    font:
      12.5px/1.5 ui-monospace,
      monospace;
    color: inherit;
    background: var(--paper);
    border: 1px solid var(--line);
    border-radius: 5px;
    padding: 6px;
  }
  .edit .fields {
    display: grid;
    grid-template-columns: repeat(auto-fit, minmax(220px, 1fr));
    gap: 8px;
  }
  .edit label {
    display: grid;
    gap: 2px;
    color: var(--soft);
  }
  .edit .row {
    display: flex;
    flex-wrap: wrap;
    gap: 8px;
    align-items: center;
  }
  .note {
    color: var(--soft);
  }
  .note.bad {
    color: var(--warn);
  }
  .wide {
    position: relative;
  }
  .small .frame {
    height: 150px;
  }
  .small .conversation {
    height: 266px;
  }
  .small svg.chart {
    height: 64px;
  }
  .small .facts dd,
  .small .facts dt {
    font-size: 12px;
  }
  .small .list {
    max-height: 132px;
  }
  @container (max-width: 620px) {
    .view {
      grid-template-columns: minmax(0, 1fr);
    }
    .views.two {
      grid-template-columns: minmax(0, 1fr);
    }
    .views.two .view + .view {
      border-left: 0;
      border-top: 1px solid var(--line);
    }
  }
  @media (prefers-reduced-motion: no-preference) {
    .conversation {
      scroll-behavior: auto;
    }
  }
`;

// Numbers of a token that can color it: `negative` ones are at most 0, `sequential` ones at least
// 0, `diverging` ones have either sign.
const QUANTITIES = {
  logprob: {
    name: 'log-probability',
    kind: 'negative',
    help: 'nats; darker: less likely',
  },
  entropy: { name: 'entropy', kind: 'sequential', help: 'nats; darker: less certain' },
  value: { name: 'value', kind: 'diverging', help: 'expected return before the token' },
  advantage: { name: 'advantage', kind: 'diverging', help: 'better or worse than expected' },
  log_ratio: {
    name: 'log-ratio to the reference',
    kind: 'diverging',
    help: "log-probability minus the reference's, nats",
  },
  none: { name: 'nothing', kind: 'none', help: '' },
};

const ICONS = {
  play: 'M3 1.5v11l9-5.5z',
  pause: 'M3 2h3v10H3zM8 2h3v10H8z',
  first: 'M1 2h2v10H1zM8 2v10L3.5 7zM13 2v10L8.5 7z',
  back: 'M11 2v10L5 7zM2 2h2v10H2z',
  forward: 'M3 2v10l6-5zM10 2h2v10h-2z',
  up: 'M9 2v10L3 7z',
  down: 'M5 2v10l6-5z',
};
const icon = (name) =>
  h('svg', { viewBox: '0 0 14 14', 'aria-hidden': 'true' }, h('path', { d: ICONS[name] }));
const short = (text, n = 60) => (text.length > n ? `${text.slice(0, n - 1)}…` : text);

// Text that a terminal would color: colored text is marked, the escape codes are removed
function terminal(text) {
  const parts = [];
  let marked = false;
  text.split(/\x1b\[([\d;]*)m/).forEach((part, i) => {
    if (i % 2) marked = !/^0?$/.test(part);
    else if (part) parts.push(marked ? h('mark', {}, part) : part);
  });
  return parts;
}

const largest = (values) =>
  values.reduce((most, x) => (x == null ? most : Math.max(most, Math.abs(x))), 0);

// Signed strength of a number's color, from -1 to 1
function colorStrength(kind, x, scale) {
  if (x == null || !scale) return 0;
  if (kind === 'negative') return -Math.min(1, -x / scale);
  return Math.max(-1, Math.min(1, x / scale));
}

// CSS background of a signed strength; empty for 0
function cssColor(kind, s) {
  if (!s || kind === 'none') return '';
  const sign = s < 0 ? 'minus' : 'plus';
  const ink = kind === 'sequential' ? 'one' : sign;
  return `rgba(var(--${ink}), ${(0.08 + 0.62 * Math.abs(s)).toFixed(3)})`;
}

// Value of a quantity at which its color is strongest
function scaleOf(quantity, episode) {
  if (quantity === 'logprob') return 5;
  return largest(episode.turns.flatMap((t) => (t.tokens ? t.tokens[quantity] || [] : [])));
}

// One episode: the frame, the facts and the chart of the current step, and the conversation
class EpisodeView {
  constructor(player) {
    this.player = player;
    this.head = h('div', { class: 'head' });
    this.picture = h('div', { class: 'frame', 'aria-label': 'The environment', role: 'img' });
    this.facts = h('dl', { class: 'facts' });
    this.chart = h('svg', {
      class: 'chart',
      role: 'img',
      'aria-label': 'Return so far, and value, by step',
    });
    this.conversation = h('div', {
      class: 'conversation',
      role: 'log',
      'aria-label': 'The conversation',
      tabindex: '0',
    });
    this.el = h(
      'div',
      { class: 'view' },
      this.head,
      h('div', { class: 'stage' }, this.picture, this.chart, this.facts),
      this.conversation,
    );
    this.resizeObserver = new ResizeObserver(() => {
      if (this.episode && this.chart.clientWidth !== this.drawn) {
        this.draw();
        this.moveMarker(this.player.step);
      }
    });
    this.resizeObserver.observe(this.chart);
    this.conversation.addEventListener('pointerover', (e) => this.hover(e));
    this.conversation.addEventListener('pointerleave', () => player.hideTip());
    this.conversation.addEventListener('click', (e) => {
      const turn = e.target.closest('.turn');
      if (turn) player.seek(+turn.dataset.turn);
    });
  }

  get steps() {
    return this.episode ? this.episode.turns.length : 0;
  }

  load(episode) {
    this.episode = episode;
    const what = [
      episode.env,
      episode.index == null ? null : `episode ${episode.index}`,
      episode.seed == null ? null : `seed ${episode.seed}`,
    ];
    this.head.replaceChildren(
      h('b', {}, episode.label || what.filter(Boolean).join(' · ') || 'episode'),
      ` — return ${formatNumber(episode.return)}, ${episode.end}`,
    );
    this.tokenElements = [];
    this.conversation.replaceChildren(
      ...(episode.system == null
        ? []
        : [
            h(
              'details',
              {},
              h('summary', {}, 'system prompt'),
              h('div', { class: 'plain' }, episode.system),
            ),
          ]),
      ...(episode.demonstrations?.length
        ? [
            h(
              'details',
              {},
              h('summary', {}, `demonstrations (${episode.demonstrations.length})`),
              ...episode.demonstrations.flatMap((shown) =>
                shown.map((text) => h('div', { class: 'plain' }, text)),
              ),
            ),
          ]
        : []),
      ...episode.turns.map((turn, t) => this.turn(turn, t)),
      ...(episode.final == null
        ? []
        : [
            h(
              'div',
              { class: 'turn', 'data-turn': this.steps },
              h('div', { class: 'no' }, 'final observation'),
              h('div', { class: 'plain' }, episode.final),
            ),
          ]),
    );
    this.rows = [...this.conversation.querySelectorAll('.turn')];
    this.color();
    this.draw();
  }

  turn(turn, t) {
    const response = h('div', { class: 'response' });
    if (turn.candidates) {
      response.append(
        ...turn.candidates.map(([text, logprob, chosen]) =>
          h(
            'div',
            { class: 'candidates' },
            h(
              'div',
              {},
              h('span', { class: chosen ? 'plain chosen' : 'plain' }, text),
              h('i', { style: `width:${(100 * Math.exp(logprob)).toFixed(1)}%` }),
              h('span', {}, `${(100 * Math.exp(logprob)).toFixed(1)} %`),
            ),
          ),
        ),
      );
    } else if (turn.tokens) {
      turn.tokens.text.forEach((text, k) => {
        const token = h(
          'span',
          {
            class:
              turn.tokens.forced_positions && turn.tokens.forced_positions.includes(k)
                ? 'token forced'
                : 'token',
            'data-token': k,
          },
          text === '' ? '·' : text,
        );
        this.tokenElements.push([token, turn.tokens, k]);
        response.append(token);
      });
    } else {
      response.append(
        ...(turn.reasoning ? [h('span', { class: 'reasoning plain' }, `${turn.reasoning}\n`)] : []),
        h('span', { class: 'plain' }, turn.response),
      );
    }
    const badges = [
      `reward ${formatNumber(turn.reward)}`,
      turn.advantage == null ? null : `advantage ${formatNumber(turn.advantage)}`,
      turn.value == null ? null : `value ${formatNumber(turn.value)}`,
    ];
    return h(
      'div',
      { class: 'turn', 'data-turn': t },
      h('div', { class: 'no' }, `turn ${t}`),
      h('div', { class: 'plain' }, turn.observation),
      response,
      h(
        'div',
        { class: 'badges' },
        ...badges.filter(Boolean).map((b) => h('span', {}, b)),
        turn.valid
          ? h('span', {}, `action ${turn.action}`)
          : h(
              'span',
              { class: 'bad', title: turn.reason || '' },
              `invalid: ${short(turn.reason || 'no reason given')}`,
            ),
        turn.stopped === false ? h('span', { class: 'bad' }, 'truncated') : null,
      ),
    );
  }

  color() {
    const { quantity } = this.player;
    const { kind } = QUANTITIES[quantity];
    const scale = kind === 'none' ? 0 : scaleOf(quantity, this.episode);
    for (const [token, tokens, k] of this.tokenElements) {
      token.style.background = cssColor(
        kind,
        colorStrength(kind, tokens[quantity] ? tokens[quantity][k] : null, scale),
      );
    }
    this.scale = scale;
  }

  get sums() {
    const sums = [0];
    for (const turn of this.episode.turns) sums.push(sums.at(-1) + turn.reward);
    return sums;
  }

  // Draw the return so far as steps, the values as dots and the current step as a line. Compared
  // episodes share one scale.
  draw() {
    const visibleViews = this.player.views.includes(this) ? this.player.views : [this];
    const { turns } = this.episode;
    const n = Math.max(...visibleViews.map((view) => view.steps));
    const { sums } = this;
    const left = 42;
    const right = 8;
    const top = 6;
    const bottom = 16;
    const W = Math.max(160, this.chart.clientWidth || 280);
    const H = this.player.small ? 64 : 84;
    this.drawn = this.chart.clientWidth;
    this.chart.setAttribute('viewBox', `0 0 ${W} ${H}`);
    const values = turns.map((turn) => turn.value);
    const known = visibleViews
      .flatMap((view) => [...view.sums, ...view.episode.turns.map((turn) => turn.value)])
      .filter((v) => v != null);
    const digits = (x) => formatNumber(+x.toPrecision(2), 5);
    let low = Math.min(...known);
    let high = Math.max(...known);
    if (low === high) {
      low -= 1;
      high += 1;
    }
    this.x = (s) => left + (W - left - right) * (n ? s / n : 0);
    const y = (v) => top + (H - top - bottom) * (1 - (v - low) / (high - low));
    let path = `M${this.x(0)},${y(0)}`;
    for (let s = 1; s <= turns.length; s += 1) path += `H${this.x(s)}V${y(sums[s])}`;
    this.mark = h('line', {
      y1: top,
      y2: H - bottom,
      stroke: 'var(--accent)',
      'stroke-width': 1.5,
    });
    this.chart.replaceChildren(
      h('line', {
        x1: left,
        x2: W - right,
        y1: y(Math.max(low, Math.min(high, 0))),
        y2: y(Math.max(low, Math.min(high, 0))),
        stroke: 'var(--line)',
      }),
      h('path', { d: path, fill: 'none', stroke: 'var(--ink)', 'stroke-width': 1.5 }),
      ...values.map((v, s) =>
        v == null
          ? null
          : h('circle', { cx: this.x(s), cy: y(v), r: n > 60 ? 1 : 2, fill: 'var(--warn)' }),
      ),
      this.mark,
      h('text', { x: left - 4, y: y(high) + 4, 'text-anchor': 'end' }, digits(high)),
      h('text', { x: left - 4, y: y(low) + 3, 'text-anchor': 'end' }, digits(low)),
      h(
        'text',
        { x: left, y: H - 3 },
        values.some((v) => v != null) ? 'return so far (line), value (dots)' : 'return so far',
      ),
      h('text', { x: W - right, y: H - 3, 'text-anchor': 'end' }, `step ${n}`),
    );
  }

  show(step) {
    const s = Math.min(step, this.steps);
    const turn = this.episode.turns[s];
    for (const old of this.conversation.querySelectorAll('.turn.now')) old.classList.remove('now');
    const row = this.rows[s] || this.rows.at(-1);
    if (row) {
      row.classList.add('now');
      const over = row.offsetTop - this.conversation.scrollTop;
      if (over < 0 || over + row.offsetHeight > this.conversation.clientHeight) {
        this.conversation.scrollTop =
          row.offsetTop - Math.min(40, this.conversation.clientHeight / 4);
      }
    }
    this.moveMarker(step);
    const facts = turn
      ? [
          ['action', turn.valid ? turn.action : `${turn.action} (fallback)`],
          ['reward', formatNumber(turn.reward)],
          ...(turn.returns == null ? [] : [['return from here', formatNumber(turn.returns)]]),
          ['value', formatNumber(turn.value)],
          ['advantage', formatNumber(turn.advantage)],
          ['valid', turn.valid ? 'yes' : `no: ${turn.reason || ''}`],
        ]
      : [['end', this.episode.end]];
    this.facts.replaceChildren(
      ...[['return so far', formatNumber(this.sums[s])], ...facts].flatMap(([name, text]) => [
        h('dt', {}, name),
        h('dd', { title: String(text) }, String(text)),
      ]),
    );
    this.showFrame(
      s,
      turn ? turn.frame : this.episode.finalFrame,
      turn ? turn.observation : (this.episode.final ?? this.episode.end),
    );
  }

  moveMarker(step) {
    const x = this.x(Math.min(step, this.steps));
    this.mark.setAttribute('x1', x);
    this.mark.setAttribute('x2', x);
  }

  showFrame(step, frame, text) {
    const key = frame == null || frame.text != null ? `text ${step}` : `frame ${frame}`;
    if (key === this.shownFrame) return;
    this.shownFrame = key;
    const showText = () => {
      if (this.shownFrame === key) {
        this.picture.replaceChildren(
          h('pre', {}, ...(frame == null || frame.text == null ? [text] : terminal(frame.text))),
        );
      }
    };
    if (frame == null || frame.text != null) {
      showText();
      return;
    }
    this.player.source.frame(frame).then((url) => {
      if (this.shownFrame !== key) return;
      if (!this.image) this.image = h('img', { alt: '' });
      this.image.src = url;
      this.image.alt = text;
      if (this.picture.firstChild !== this.image) this.picture.replaceChildren(this.image);
    }, showText);
  }

  hover(event) {
    const token = event.target.closest('.token');
    if (!token) {
      this.player.hideTip();
      return;
    }
    const turn = this.episode.turns[+token.closest('.turn').dataset.turn];
    const k = +token.dataset.token;
    const { tokens } = turn;
    const rows = Object.entries(QUANTITIES)
      .filter(([q]) => tokens[q] && tokens[q][k] != null)
      .map(([q, { name }]) =>
        h(
          'tr',
          {},
          h('td', {}, name),
          h(
            'td',
            {},
            q === 'logprob'
              ? `${formatNumber(tokens[q][k])} (${(100 * Math.exp(tokens[q][k])).toPrecision(3)} %)`
              : formatNumber(tokens[q][k]),
          ),
        ),
      );
    const others = tokens.alternatives && tokens.alternatives[k] ? tokens.alternatives[k] : [];
    this.player.showTip(token, [
      h('div', { class: 'word' }, JSON.stringify(token.textContent)),
      tokens.forced_positions && tokens.forced_positions.includes(k)
        ? h('div', {}, 'forced, not sampled')
        : h('table', {}, ...rows),
      ...(others.length
        ? [
            h('div', { class: 'note' }, 'alternatives'),
            h(
              'table',
              { class: 'alt' },
              ...others.map(([text, logprob]) =>
                h(
                  'tr',
                  {},
                  h('td', {}, JSON.stringify(text)),
                  h('td', {}, `${(100 * Math.exp(logprob)).toPrecision(3)} %`),
                ),
              ),
            ),
          ]
        : []),
    ]);
  }
}

const COLUMNS = [
  ['index', 'episode'],
  ['seed', 'seed'],
  ['return', 'return'],
  ['turns', 'turns'],
  ['invalid', 'invalid'],
  ['surprisal', 'surprisal'],
  ['end', 'end'],
];
// Name, column to sort by and whether it ascends
const FILTERS = {
  all: ['all, in order', null, true],
  best: ['best', 'return', false],
  worst: ['worst', 'return', true],
  invalid: ['with invalid turns', 'invalid', false],
  longest: ['longest', 'turns', false],
  surprising: ['most surprising', 'surprisal', false],
};

class Player {
  constructor(source, root, { small = false, follow = false } = {}) {
    this.source = source;
    this.root = root;
    this.small = small;
    this.follow = follow;
    this.step = 0;
    this.speed = 2;
    this.sort = [null, true];
    this.filter = 'all';
    this.views = [];
    this.comparedKey = null;
    this.quantity = 'logprob';
    this.build();
    this.sortList();
    this.openEpisode(this.source.episodes[this.visibleIndices[0]]?.key);
  }

  build() {
    const select = (label, options, on) => {
      const el = h(
        'select',
        { 'aria-label': label, onchange: () => on(el.value) },
        ...Object.entries(options).map(([value, name]) => h('option', { value }, name)),
      );
      return el;
    };
    const button = (label, face, on) =>
      h(
        'button',
        { type: 'button', 'aria-label': label, title: label, onclick: on },
        ICONS[face] ? icon(face) : face,
      );
    this.title = h('span', { class: 'title', 'aria-live': 'polite' });
    this.filterSelect = select(
      'Episodes to show',
      Object.fromEntries(Object.entries(FILTERS).map(([k, [name]]) => [k, name])),
      (value) => this.applyFilter(value),
    );
    this.colors = select(
      'Color tokens by',
      Object.fromEntries(Object.entries(QUANTITIES).map(([k, { name }]) => [k, name])),
      (value) => {
        this.quantity = value;
        this.recolor();
      },
    );
    this.legend = h('span', { class: 'legend' });
    this.compared = h('select', {
      'aria-label': 'Compare with',
      onchange: () => this.compare(this.compared.value === '' ? null : +this.compared.value),
    });
    this.prev = button('Previous episode', 'up', () => this.changeEpisode(-1));
    this.next = button('Next episode', 'down', () => this.changeEpisode(1));
    this.edit = this.source.branch
      ? button('Branch from this turn', 'branch…', () => this.openEditor())
      : null;
    this.area = h('div', { class: 'views' });
    this.button = button('Play', 'play', () => this.toggle());
    this.slider = h('input', {
      type: 'range',
      min: 0,
      max: 0,
      value: 0,
      'aria-label': 'Step',
      oninput: () => this.seek(+this.slider.value),
    });
    this.where = h('span', { class: 'at', 'aria-live': 'off' });
    this.rate = select(
      'Steps per second',
      { 1: '1/s', 2: '2/s', 5: '5/s', 10: '10/s', 30: '30/s' },
      (value) => {
        this.speed = +value;
        if (this.timer) {
          this.pause();
          this.play();
        }
      },
    );
    this.rate.value = '2';
    this.table = h('div', { class: 'list' });
    this.editor = h('div', { class: 'edit', hidden: true });
    this.tip = h('div', { class: 'tip', role: 'tooltip', hidden: true });
    this.el = h(
      'div',
      {
        class: this.small ? 'widget small' : 'widget',
        tabindex: '0',
        role: 'region',
        'aria-label': 'Episode player: space plays, arrows step, j and k change the episode',
      },
      h(
        'div',
        { class: 'bar' },
        this.prev,
        this.next,
        this.title,
        h('label', {}, 'show', this.filterSelect),
        h('label', {}, 'color', this.colors),
        this.legend,
        h('label', {}, 'compare', this.compared),
        this.edit,
      ),
      h('div', { class: 'wide' }, this.area, this.tip),
      this.editor,
      h(
        'div',
        { class: 'controls' },
        button('First step', 'first', () => this.seek(0)),
        button('Step back', 'back', () => this.seek(this.step - 1)),
        this.button,
        button('Step forward', 'forward', () => this.seek(this.step + 1)),
        this.slider,
        this.where,
        this.rate,
      ),
      this.table,
    );
    this.el.addEventListener('keydown', (e) => this.key(e));
    this.root.append(h('style', {}, THEME + CSS), this.el);
  }

  sortList() {
    const [key, up] = this.sort;
    const all = range(this.source.episodes.length).filter(
      (i) => this.filter !== 'invalid' || this.source.episodes[i].invalid > 0,
    );
    const compare = (a, b) => {
      if (valueOf(a) < valueOf(b)) return -1;
      return valueOf(a) > valueOf(b) ? 1 : a - b;
    };
    const valueOf = (i) => {
      const x = this.source.episodes[i][key];
      return x == null ? -Infinity : x;
    };
    this.visibleIndices = key == null ? all : all.sort((a, b) => (up ? 1 : -1) * compare(a, b));
    this.renderList();
  }

  applyFilter(name) {
    this.filter = name;
    this.filterSelect.value = name;
    this.sort = FILTERS[name].slice(1);
    this.sortList();
    if (this.visibleIndices.length)
      this.openEpisode(this.source.episodes[this.visibleIndices[0]].key);
  }

  renderList() {
    const sorted = (key, ascending, descending, unsorted) => {
      if (this.sort[0] !== key) return unsorted;
      return this.sort[1] ? ascending : descending;
    };
    const head = h(
      'tr',
      {},
      ...COLUMNS.map(([key, name]) =>
        h(
          'th',
          { scope: 'col', 'aria-sort': sorted(key, 'ascending', 'descending', 'none') },
          h(
            'button',
            {
              type: 'button',
              onclick: () => {
                this.sort = [key, this.sort[0] === key ? !this.sort[1] : true];
                this.sortList();
              },
            },
            name + sorted(key, ' ↑', ' ↓', ''),
          ),
        ),
      ),
    );
    const body = this.visibleIndices.slice(0, 500).map((i) => {
      const e = this.source.episodes[i];
      return h(
        'tr',
        {
          class: e.key === this.current?.key ? 'here' : '',
          'data-episode': e.key,
          onclick: () => this.openEpisode(e.key),
        },
        ...COLUMNS.map(([key]) =>
          h(
            'td',
            {},
            typeof e[key] === 'number' && key !== 'seed'
              ? formatNumber(e[key], 2)
              : String(e[key] ?? ''),
          ),
        ),
      );
    });
    this.table.replaceChildren(
      h('table', { 'aria-label': 'Episodes' }, h('thead', {}, head), h('tbody', {}, ...body)),
    );
    this.table.hidden = this.source.episodes.length < 2;
    const same = this.source.episodes.filter(
      (e) =>
        this.current &&
        e.key !== this.current.key &&
        e.seed != null &&
        e.seed === this.current.seed,
    );
    this.compared.replaceChildren(
      h('option', { value: '' }, same.length ? 'nothing' : 'no other of this seed'),
      ...same.map((e) =>
        h(
          'option',
          { value: e.key },
          e.label || `episode ${e.index ?? e.key}, return ${formatNumber(e.return, 2)}`,
        ),
      ),
    );
    this.compared.value = this.comparedKey == null ? '' : String(this.comparedKey);
    this.compared.disabled = !same.length;
  }

  indexOf(key) {
    return this.source.episodes.findIndex((e) => e.key === key);
  }

  // Show a changed list. A viewer who steps, plays, compares or edits keeps the current episode,
  // even if it left the list. Otherwise the newest episode is opened if `follow` is set.
  refresh() {
    const { episodes } = this.source;
    const busy = this.step > 0 || this.timer || this.comparedKey != null || !this.editor.hidden;
    this.source.evict(this.current?.key, this.comparedKey);
    const at = this.current == null ? -1 : this.indexOf(this.current.key);
    if (at >= 0) this.current = episodes[at];
    const follows =
      this.follow && !busy && this.current === this.first && episodes[0]?.key !== this.current?.key;
    this.sortList();
    if (!this.views.length || follows || (at < 0 && !busy)) {
      if (episodes.length) this.openEpisode(this.source.episodes[this.visibleIndices[0] ?? 0].key);
      return;
    }
    this.first = episodes[0];
    this.updateTitle();
  }

  updateTitle() {
    const at = this.indexOf(this.current.key);
    const place = this.visibleIndices.indexOf(at);
    const label = this.current.label || `episode ${this.current.index ?? this.current.key}`;
    const position = place < 0 ? '' : ` — ${place + 1} of ${this.visibleIndices.length}`;
    const age = at < 0 ? ' — of an earlier update' : '';
    this.title.textContent = label + position + age;
  }

  async openEpisode(key) {
    if (!this.source.episodes.length) {
      this.title.textContent = 'no episodes yet';
      return;
    }
    this.pause();
    if (!this.editor.hidden) this.closeEditor();
    const next = this.source.episodes[this.indexOf(key)] ?? this.current;
    const beside = this.source.episodes[this.indexOf(this.comparedKey)];
    if (
      this.comparedKey !== null &&
      (key === this.comparedKey || !beside || beside.seed !== next.seed)
    ) {
      this.comparedKey = null;
    }
    this.first = this.source.episodes[0];
    this.current = next;
    const loading = (this.loading = Symbol('loading'));
    const wanted = [key, ...(this.comparedKey == null ? [] : [this.comparedKey])];
    let episodes;
    const slow = setTimeout(() => {
      if (this.loading === loading) this.title.textContent = 'waiting for the kernel…';
    }, 1500);
    try {
      episodes = await Promise.all(wanted.map((k) => this.source.episode(k)));
    } catch (error) {
      if (this.loading === loading) this.title.textContent = error.message;
      return;
    } finally {
      clearTimeout(slow);
    }
    if (this.loading !== loading) return;
    for (const view of this.views) view.resizeObserver.disconnect();
    this.views = episodes.map((episode) => {
      const view = new EpisodeView(this);
      view.load(episode);
      return view;
    });
    this.area.classList.toggle('two', this.views.length > 1);
    this.area.replaceChildren(...this.views.map((view) => view.el));
    if (this.views.length > 1) for (const view of this.views) view.draw();
    const has = (q) =>
      q === 'none' ||
      this.views.some((view) =>
        view.episode.turns.some(
          (t) => t.tokens && t.tokens[q] && t.tokens[q].some((x) => x != null),
        ),
      );
    for (const option of this.colors.options) option.disabled = !has(option.value);
    if (!has(this.quantity)) {
      this.quantity = 'none';
    }
    this.colors.value = this.quantity;
    this.recolor();
    this.updateTitle();
    this.slider.max = Math.max(...this.views.map((view) => view.steps));
    this.renderList();
    this.seek(0);
  }

  compare(key) {
    this.comparedKey = key;
    return this.openEpisode(this.current.key);
  }

  recolor() {
    for (const view of this.views) view.color();
    const { kind, help } = QUANTITIES[this.quantity];
    const scale = this.views.length ? this.views[0].scale : 0;
    const ends = {
      negative: [`−${formatNumber(scale)}`, '0'],
      sequential: ['0', formatNumber(scale)],
      diverging: [formatNumber(-scale), formatNumber(scale)],
      none: ['', ''],
    }[kind];
    const [from, to] = { negative: [-1, 0], diverging: [-1, 1] }[kind] ?? [0, 1];
    const stops = range(9).map(
      (k) => cssColor(kind, from + ((to - from) * k) / 8) || 'transparent',
    );
    this.legend.replaceChildren(
      ...(kind === 'none'
        ? []
        : [
            ends[0],
            h('i', { style: `background:linear-gradient(90deg, ${stops.join(', ')})` }),
            ends[1],
          ]),
    );
    this.legend.title = help;
  }

  changeEpisode(by) {
    const place = this.visibleIndices.indexOf(this.indexOf(this.current?.key)) + by;
    if (place >= 0 && place < this.visibleIndices.length) {
      this.openEpisode(this.source.episodes[this.visibleIndices[place]].key);
    }
  }

  seek(step) {
    const last = +this.slider.max;
    this.hideTip();
    this.step = Math.max(0, Math.min(last, step));
    this.slider.value = this.step;
    this.slider.setAttribute('aria-valuetext', `step ${this.step} of ${last}`);
    this.where.textContent = `step ${this.step} of ${last}`;
    for (const view of this.views) view.show(this.step);
    if (this.timer && this.step >= last) this.pause();
  }

  play() {
    if (this.step >= +this.slider.max) this.seek(0);
    this.timer = setInterval(() => {
      if (this.el.isConnected) this.seek(this.step + 1);
      else this.pause();
    }, 1000 / this.speed);
    this.button.replaceChildren(icon('pause'));
    this.button.setAttribute('aria-label', 'Pause');
    this.button.title = 'Pause';
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.button.replaceChildren(icon('play'));
    this.button.setAttribute('aria-label', 'Play');
    this.button.title = 'Play';
  }

  toggle() {
    if (this.timer) this.pause();
    else this.play();
  }

  key(e) {
    const target = e.composedPath()[0];
    const ignoreKey =
      /^(TEXTAREA|SELECT)$/.test(target.tagName) ||
      (target.tagName === 'BUTTON' && e.key === ' ') ||
      e.ctrlKey ||
      e.metaKey ||
      e.altKey;
    const action = {
      ' ': () => this.toggle(),
      ArrowLeft: () => this.seek(this.step - 1),
      ArrowRight: () => this.seek(this.step + 1),
      Home: () => this.seek(0),
      End: () => this.seek(+this.slider.max),
      j: () => this.changeEpisode(1),
      k: () => this.changeEpisode(-1),
    }[e.key];
    if (ignoreKey || !action) return;
    e.preventDefault();
    e.stopPropagation();
    action();
  }

  showTip(token, children) {
    this.tip.replaceChildren(...children);
    this.tip.hidden = false;
    const box = token.getBoundingClientRect();
    const area = this.tip.parentElement.getBoundingClientRect();
    const mine = this.tip.getBoundingClientRect();
    const below = box.bottom - area.top + 4;
    const above = box.top - area.top - mine.height - 4;
    const left = Math.max(4, Math.min(area.width - mine.width - 4, box.left - area.left));
    const fitsBelow = box.bottom + mine.height + 8 <= window.innerHeight;
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${fitsBelow || above <= 0 ? below : above}px`;
  }

  hideTip() {
    this.tip.hidden = true;
  }

  openEditor() {
    if (!this.views.length) return;
    this.pause();
    const { episode } = this.views[0];
    const { key } = this.current;
    const t = Math.min(this.step, episode.turns.length - 1);
    const turn = episode.turns[t];
    const field = (name, text, hint) => {
      const area = h('textarea', { 'aria-label': name, placeholder: hint, rows: 2 });
      area.value = text;
      return [h('label', {}, name, area), area, text];
    };
    const fields = {
      observation: field('observation', turn.observation),
      system_prompt: field('system prompt', episode.system ?? ''),
      response_prefix: field('response prefix', '', turn.response),
    };
    if (turn.candidates) delete fields.response_prefix; // candidates are whole responses
    const note = h(
      'span',
      { class: 'note', role: 'status' },
      'continued to the end with the current policy; not part of training',
    );
    const sampleButton = h(
      'button',
      {
        type: 'button',
        onclick: async () => {
          sampleButton.disabled = true;
          note.className = 'note';
          note.textContent = 'playing…';
          const changes = Object.fromEntries(
            Object.entries(fields)
              .filter(([, [, area, was]]) => area.value !== was)
              .map(([name, [, area]]) => [name, area.value]),
          );
          try {
            this.comparedKey = await this.source.branch(key, t, changes);
            await this.openEpisode(key);
            this.seek(t);
          } catch (error) {
            note.className = 'note bad';
            note.textContent = error.message;
            sampleButton.disabled = false;
          }
        },
      },
      'sample from here',
    );
    this.editor.replaceChildren(
      h('b', {}, `branch from turn ${t}`),
      h('div', { class: 'fields' }, ...Object.values(fields).map(([label]) => label)),
      h(
        'div',
        { class: 'row' },
        sampleButton,
        h('button', { type: 'button', onclick: () => this.closeEditor() }, 'cancel'),
        note,
      ),
    );
    this.editor.hidden = false;
    fields.observation[1].focus();
  }

  closeEditor() {
    this.editor.hidden = true;
    this.editor.replaceChildren();
    this.el.focus();
  }
}

const MAX_CACHED_FRAMES = 500; // pictures in the page's memory, at most

// The data of a widget's model: summaries at once, episodes and frames on request
class EpisodeSource {
  constructor(model) {
    this.model = model;
    this.pending = new Map();
    this.episodeCache = new Map();
    this.frameCache = new Map();
    this.next = Math.floor(Math.random() * 2 ** 40); // unique across views
    this.onMessage = (message, buffers) => this.onReply(message, buffers);
    model.on('msg:custom', this.onMessage);
    if (model.get('can_branch')) {
      this.branch = async (key, turn, changes) =>
        (await this.request({ type: 'branch', episode: key, turn, changes })).branch_key;
    }
  }

  get episodes() {
    return this.model.get('episodes');
  }

  // When a cell starts to run, the kernel may not have a thread yet that receives messages
  // meanwhile. Requests without side effects are therefore repeated.
  request(message) {
    const id = (this.next += 1);
    const send = () => this.model.send({ ...message, id });
    const retries =
      message.type === 'branch'
        ? []
        : [2000, 6000].map((after) =>
            setTimeout(() => {
              if (this.pending.has(id)) send();
            }, after),
          );
    return new Promise((resolve, reject) => {
      this.pending.set(id, { resolve, reject });
      send();
    }).finally(() => retries.forEach(clearTimeout));
  }

  onReply(message, buffers) {
    const wait = this.pending.get(message.id);
    if (!wait) return;
    this.pending.delete(message.id);
    if (message.error != null) wait.reject(new Error(message.error));
    else wait.resolve({ ...message, buffers });
  }

  episode(key) {
    const preloaded = this.model.get('preloaded');
    if (!this.episodeCache.has(key)) {
      this.episodeCache.set(
        key,
        preloaded?.key === key
          ? Promise.resolve(preloaded.data)
          : this.request({ type: 'episode', episode: key }).then((message) => message.data),
      );
    }
    return this.episodeCache.get(key);
  }

  evict(...shownKeys) {
    const keys = new Set([...this.episodes.map((e) => e.key), ...shownKeys]);
    for (const key of this.episodeCache.keys()) if (!keys.has(key)) this.episodeCache.delete(key);
  }

  frame(key) {
    const preloaded = this.model.get('preloaded')?.frames?.[key];
    if (preloaded && !this.frameCache.has(key)) {
      this.frameCache.set(key, Promise.resolve(preloaded));
    }
    if (!this.frameCache.has(key)) {
      const loading = this.request({ type: 'frame', frame: key }).then(
        ({ data, buffers }) =>
          data ?? URL.createObjectURL(new Blob([buffers[0]], { type: 'image/png' })),
      );
      loading.catch(() => this.frameCache.delete(key));
      this.frameCache.set(key, loading);
    }
    while (this.frameCache.size > MAX_CACHED_FRAMES) {
      const [oldest] = this.frameCache.keys();
      this.release(oldest);
    }
    return this.frameCache.get(key);
  }

  release(key) {
    this.frameCache.get(key).then(
      (url) => {
        if (url.startsWith('blob:')) URL.revokeObjectURL(url);
      },
      () => {},
    );
    this.frameCache.delete(key);
  }

  close() {
    this.model.off('msg:custom', this.onMessage);
    for (const key of [...this.frameCache.keys()]) this.release(key);
  }
}

function render({ model, el }) {
  const host = h('div');
  const source = new EpisodeSource(model);
  el.append(host);
  const player = new Player(source, host.attachShadow({ mode: 'open' }), {
    small: model.get('small'),
    follow: model.get('follow'),
  });
  const changed = () => player.refresh();
  model.on('change:episodes', changed);
  const stopFollowingTheme = followTheme(player.el);
  return () => {
    player.pause();
    stopFollowingTheme();
    model.off('change:episodes', changed);
    source.close();
  };
}

export default { render };
