// The live page. Names come from watched processes, which are hostile until shown otherwise: they are only ever set as text.
'use strict';

const POLL_MS = 1000, TIMEOUT_MS = 5000, ANNOUNCE_MS = 3000;
// Points of a history: ten minutes of five seconds, and the one in progress.
const POINTS = 121;
const SVG = 'http://www.w3.org/2000/svg';
const byId = id => document.getElementById(id);

// ---- Text

const HARMFUL = /[\u0000-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
const safe = text => String(text ?? '').replace(HARMFUL, c => `\\u{${c.charCodeAt(0).toString(16)}}`);

function duration(ns) {
  if (ns === undefined) return '';
  if (ns < 999.5e3) return `${(ns / 1e3).toFixed(0)} µs`;
  if (ns < 9.95e6) return `${(ns / 1e6).toFixed(1)} ms`;
  if (ns < 999.5e6) return `${(ns / 1e6).toFixed(0)} ms`;
  if (ns < 9.95e9) return `${(ns / 1e9).toFixed(1)} s`;
  if (ns < 119.5e9) return `${(ns / 1e9).toFixed(0)} s`;
  if (ns < 7.2e12) return `${Math.floor(ns / 6e10)} min ${Math.floor(ns / 1e9) % 60} s`;
  return `${(ns / 3.6e12).toFixed(1)} h`;
}

function bytes(value) {
  for (const unit of ['B', 'kB', 'MB', 'GB', 'TB']) {
    if (value < 999.5) return `${value.toFixed(unit === 'B' || value >= 99.5 ? 0 : 1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(0)} PB`;
}

const number = (value, unit) => unit === 'bytes' ? bytes(value) : value.toLocaleString('en-US');
const amount = ({ depth, limit, unit }) =>
  number(depth, unit) + (limit === undefined ? '' : ` of ${number(limit, unit)}`) + (unit === 'bytes' ? '' : ` ${safe(unit)}`);
const rate = (per_s, unit) => unit === 'bytes' ? bytes(per_s) : per_s >= 100 ? Math.round(per_s).toLocaleString('en-US') : per_s.toFixed(1);
const clock = unix_ns => new Date(unix_ns / 1e6).toLocaleTimeString();
const count = (n, one, many) => `${n} ${n === 1 ? one : many}`;

function trend(queue) {
  if (queue.time_to_full_ns !== undefined && queue.level !== 'full') return `▲ full in ${duration(queue.time_to_full_ns)}`;
  const { arrivals_per_s: ins, departures_per_s: outs, depth } = queue;
  if (ins === undefined || outs === undefined || depth === 0) return '';
  const more = ins - outs, least = Math.max(1, 0.1 * Math.max(ins, outs));
  return more > least ? '▲ filling' : more < -least ? '▼ draining' : '● steady';
}

function signal(service) {
  const parts = [];
  if (service.admit_ratio < 1) parts.push(`admit ${(service.admit_ratio * 100).toFixed(0)}%`);
  if (service.concurrency_limit !== undefined) parts.push(`at most ${service.concurrency_limit} at once`);
  if (service.max_queue_wait_ns !== undefined) parts.push(`reject after ${duration(service.max_queue_wait_ns)} in the queue`);
  if (service.retry_after_ms > 0) parts.push(`retry after ${duration(service.retry_after_ms * 1e6)}`);
  return parts.join(', ') || 'admit everything';
}

// ---- DOM. Nodes are created once and then updated, so that focus, selection and scroll position survive.

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) name in node ? node[name] = value : node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const name = (tag = 'bdi', properties) => element(tag, properties);
const setText = (node, text) => { if (node.textContent !== text) node.textContent = text };
const setClass = (node, text) => { if (node.className !== text) node.className = text };

// Keeps one child of `parent` per item, in their order. `create(item)` returns a node with a method `update(item)`.
function sync(parent, items, keyOf, create) {
  const known = parent.known ??= new Map(), keyed = new Map();
  for (const [at, item] of items.entries()) {
    let key = keyOf(item, at);
    while (keyed.has(key)) key += '\u0000';
    keyed.set(key, item);
  }
  // Removed first. Otherwise all nodes behind a removed one would move, and a node that moves loses the focus.
  for (const [key, node] of known) if (!keyed.has(key)) { node.remove(); known.delete(key) }
  let before = parent.firstElementChild?.dataset.fixed ? parent.firstElementChild : null;
  for (const [key, item] of keyed) {
    let node = known.get(key);
    if (!node) known.set(key, node = create(item));
    node.update(item);
    const next = before ? before.nextElementSibling : parent.firstElementChild;
    if (next !== node) parent.insertBefore(node, next);
    before = node;
  }
}

// ---- Plots

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// The last ten minutes. `values` end now; before them the queue was empty, and before `observed` points it is not known.
function plot() {
  const svg = shape('svg', { viewBox: `0 0 ${POINTS} 32`, preserveAspectRatio: 'none', role: 'img' });
  const unknown = shape('rect', { class: 'unknown', x: 0, y: 0, height: 32 });
  const tip = shape('title', {});
  tip.textContent = 'not observed yet';
  unknown.append(tip);
  const area = shape('path', { class: 'area' });
  const limit = shape('line', { class: 'limit', x1: 0, x2: POINTS });
  svg.append(unknown, shape('line', { class: 'base', x1: 0, x2: POINTS, y1: 32, y2: 32 }), area, limit);
  svg.update = (what, values, observed, bound, text) => {
    const max = Math.max(...values, 0), scale = Math.max(max, bound ?? 0, 1);
    const y = value => (32 - 31 * Math.min(value / scale, 1)).toFixed(1);
    unknown.setAttribute('width', Math.max(POINTS - observed, 0));
    let path = '';
    if (max > 0) {
      const start = POINTS - values.length;
      path = `M${start} 32` + values.map((value, at) => `V${y(value)}H${start + at + 1}`).join('') + 'V32Z';
    }
    area.setAttribute('d', path);
    limit.setAttribute('visibility', bound > 0 && max > 0 ? 'visible' : 'hidden');
    if (bound > 0) { limit.setAttribute('y1', y(bound)); limit.setAttribute('y2', y(bound)) }
    const minutes = Math.min(10, Math.max(1, Math.round(observed / 12)));
    const at = max > 0 ? (values.length - 1 - values.lastIndexOf(max)) * 5 : 0;
    const past = `${what} in the last ${count(minutes, 'minute', 'minutes')}`;
    const label = max > 0
      ? `${past}: maximum ${text(max)}, ${at ? `${duration(at * 1e9)} ago` : 'now'}; now ${text(values.at(-1))}`
      : `${past}: zero`;
    if (svg.getAttribute('aria-label') !== label) svg.setAttribute('aria-label', label);
    return max;
  };
  return svg;
}

// ---- Services

function queueRow() {
  const kind = element('span'), label = name('bdi', { className: 'sub' });
  const fill = element('span'), bar = element('span', { className: 'bar', 'aria-hidden': 'true' }), depths = plot();
  const wait = element('span'), waits = plot(), waitMax = element('span', { className: 'sub' });
  const rates = element('span'), sub = { className: 'sub' };
  const direction = element('span', sub), losses = element('span', sub);
  fill.append(element('span'));
  bar.append(element('span'));
  const row = element('tr', {},
    element('th', { scope: 'row' }, kind, label), element('td', {}, fill, bar, depths),
    element('td', {}, wait, waitMax, waits), element('td', {}, rates, direction, losses));
  row.update = queue => {
    setText(kind, queue.level === 'ok' ? safe(queue.kind) : `${safe(queue.kind)} (${queue.level})`);
    setText(label, safe(queue.name));
    setText(fill.firstChild, amount(queue));
    const share = queue.limit > 0 ? Math.min(queue.fill ?? queue.depth / queue.limit, 1) : undefined;
    bar.hidden = share === undefined;
    setClass(bar, `bar ${queue.level}`);
    bar.firstChild.style.width = `${((share ?? 0) * 100).toFixed(1)}%`;
    depths.update('Depth', queue.depths, state.observed, queue.limit, value => amount({ ...queue, limit: undefined, depth: value }));
    setText(wait, queue.wait_ns === undefined ? '–' : duration(queue.wait_ns));
    const max = waits.update('Wait', queue.waits_ms, state.observed, undefined, value => duration(value * 1e6));
    setText(waitMax, max > 0 ? `max ${duration(max * 1e6)}` : '');
    const { arrivals_per_s: ins, departures_per_s: outs, unit } = queue;
    setText(rates, ins === undefined || outs === undefined ? '–' : `${rate(ins, unit)} in, ${rate(outs, unit)} out`);
    setText(direction, trend(queue));
    setText(losses, queue.losses > 0 ? `${queue.losses.toLocaleString('en-US')} lost` : '');
  };
  return row;
}

// The wait chain: the service, what it waits for, …, the root cause.
function steps(episode) {
  const path = episode.path.map(({ name, state }) => ({ name, state }));
  if (!episode.root) return path;
  const { culprit, cause = '' } = episode.root, last = path.at(-1);
  if (last && (culprit === undefined || culprit === last.name)) Object.assign(last, { root: cause });
  else if (culprit === undefined) path.push({ name: cause, state: '', root: '' });
  else path.push({ name: culprit, state: cause, root: cause });
  return path;
}

function stepItem() {
  const label = element('span', { className: 'label' }), who = name('strong'), what = element('span', { className: 'quiet' });
  const item = element('li', {}, label, who, what);
  item.update = step => {
    const isRoot = step.root !== undefined;
    setClass(item, isRoot ? 'root' : '');
    label.hidden = !isRoot;
    setText(label, isRoot && step.root && step.root !== step.state ? `Root cause: ${safe(step.root)}` : 'Root cause');
    setText(who, safe(step.name));
    setText(what, safe(step.state));
  };
  return item;
}

function row(list, term) {
  const title = element('dt', {}, term), value = name('dd');
  list.append(title, value);
  return text => { title.hidden = value.hidden = !text; setText(value, text) };
}

function consumers(service) {
  const of = state.adapters.filter(({ target }) => target !== undefined && [service.target, service.directory].includes(target));
  const listeners = state.view.subscribers.filter(({ target }) => target === undefined || target === service.target);
  return [
    ...service.readers.map(({ pid, name }) => `${safe(name)} (${pid}) reads its page`),
    ...of.map(({ adapter, at }) => `${safe(adapter)} ${safe(at)}`),
    ...listeners.map(({ pid }) => `PID ${pid ?? '?'} subscribed to the stream`),
  ].join(', ');
}

// Verdict and queues of one service.
function details() {
  const body = element('div'), verdict = name('p', { className: 'verdict' });
  const path = element('ol', { className: 'path', ariaLabel: 'Wait chain, from the service to the root cause' });
  const list = element('dl'), advice = row(list, 'What to do'), evidence = row(list, 'Evidence'), since = row(list, 'Since');
  const also = row(list, 'Also'), signalled = row(list, 'Signal'), listening = row(list, 'Received by');
  const caption = element('caption', { className: 'hidden-text' }), rows = element('tbody'), omitted = element('p', { className: 'quiet' });
  const table = element('table', { className: 'queues' }, caption, element('thead', {}, element('tr', {},
    ...['Queue', 'Depth, last 10 min', 'Wait, last 10 min', 'Per second'].map(text => element('th', { scope: 'col' }, text)))), rows);
  body.append(verdict, path, list, table, omitted);
  body.update = service => {
    const [lead, ...others] = service.episodes;
    verdict.hidden = path.hidden = !lead;
    if (lead) {
      const text = safe(lead.verdict ?? `the ${lead.kind} queue fills; the cause is not known yet`);
      setText(verdict, text.charAt(0).toUpperCase() + text.slice(1));
      const chain = steps(lead);
      path.hidden = chain.length === 0;
      sync(path, chain, (_, at) => String(at), stepItem);
    }
    advice(lead ? safe(lead.advice) : '');
    evidence(lead ? safe(lead.evidence) : '');
    since(lead ? [
      `${clock(lead.onset_unix_ns)}, for ${duration(state.view.time_unix_ns - lead.onset_unix_ns)}`,
      ...(lead.confidence ? [`confidence ${safe(lead.confidence)}`] : []),
    ].join('; ') : '');
    also(others.map(it => {
      const why = it.verdict && it.verdict !== lead.verdict ? `: ${safe(it.verdict)}` : '';
      return `${safe(it.kind)} ${safe(it.name)} is ${it.level}${why}`;
    }).join('; '));
    signalled(`${signal(service)} (load ${service.load.toFixed(2)})`);
    listening(consumers(service) || 'nobody');
    setText(caption, `Queues of ${safe(service.target)}, worst first`);
    sync(rows, service.queues, ({ kind, name }) => `${kind} ${name}`, queueRow);
    setText(omitted, service.queues_omitted ? `${count(service.queues_omitted, 'more queue', 'more queues')}, less busy.` : '');
  };
  return body;
}

function card() {
  const badge = element('span'), title = name('bdi'), pid = element('span', { className: 'quiet' }), body = details();
  const heading = element('h3', {}, title);
  const node = element('article', {}, element('div', { className: 'title' }, badge, heading, pid), body);
  node.update = service => {
    setClass(node, `is-${service.level}`);
    setClass(badge, `badge ${service.level}`);
    setText(badge, service.level);
    setText(title, safe(service.target));
    if (node.ariaLabel !== title.textContent) node.ariaLabel = title.textContent;
    setText(pid, `PID ${service.pid}`);
    body.update(service);
  };
  return node;
}

const expanded = new Set();

function okRows(service) {
  const key = keyOf(service), toggle = element('button', { type: 'button' }, name('bdi'));
  const busiest = element('td'), wait = element('td'), depths = plot(), signalled = element('td');
  const inner = element('td', { colSpan: 5 }), more = element('tr', {}, inner), body = details();
  inner.append(body);
  const node = element('tbody', {}, element('tr', {},
    element('th', { scope: 'row' }, toggle), busiest, wait, element('td', {}, depths), signalled));
  let last = service;
  const show = () => {
    const isOpen = expanded.has(key);
    toggle.setAttribute('aria-expanded', isOpen);
    if (!isOpen) return more.remove();
    body.update(last);
    if (!more.isConnected) node.append(more);
  };
  toggle.onclick = () => { expanded.delete(key) || expanded.add(key); show() };
  node.update = service => {
    last = service;
    setText(toggle.firstChild, safe(service.target));
    const queue = service.queues[0];
    setText(busiest, !queue ? '–' : queue.depth > 0 ? `${safe(queue.kind)}: ${amount(queue)}` : 'idle');
    setText(wait, queue?.wait_ns === undefined ? '–' : duration(queue.wait_ns));
    depths.update('Depth', queue?.depths ?? [], state.observed, undefined, value => number(value, queue.unit));
    setText(signalled, signal(service));
    show();
  };
  return node;
}

// ---- The rest of the page

function endedItem() {
  const item = name('li');
  item.update = it => {
    const lasted = duration(it.end_unix_ns - it.onset_unix_ns), why = it.verdict ? `; ${safe(it.verdict)}` : '';
    const queue = `${safe(it.target ?? '?')} ${safe(it.kind)} ${safe(it.name)}`;
    setText(item, `${clock(it.end_unix_ns)}: ${queue} was ${it.level_max} for ${lasted}${why}`);
  };
  return item;
}

function consumerRow() {
  const cells = [element('th', { scope: 'row' }), element('td'), element('td'), element('td')];
  const node = element('tr', {}, ...cells);
  node.update = texts => cells.forEach((cell, at) => setText(cell, texts[at]));
  return node;
}

function consumerTexts() {
  const { view, adapters } = state, now = Date.now() * 1e6;
  return [
    ...adapters.map(it => [
      `${safe(it.adapter)} ${safe(it.at)}`, safe(it.target ?? 'all'), String(it.connections ?? ''),
      it.failure ? `failed: ${safe(it.failure)}` : [
        it.last_unix_ns ? `${safe(it.last_reply)} (${duration(Math.max(now - it.last_unix_ns, 0))} ago)` : 'none yet',
        ...(it.warnings ?? []).map(({ text }) => safe(text)),
      ].join('; '),
    ]),
    ...view.subscribers.map(it => [`unix stream, PID ${it.pid ?? '?'}`, safe(it.target ?? 'all'), '1', 'subscribed']),
    ...view.services.flatMap(it => it.readers.map(reader => [
      `page, ${safe(reader.name)} (${reader.pid})`, safe(it.target), '1', 'reads memory',
    ])),
  ];
}

const state = { view: undefined, adapters: [], observed: 1, paused: false, announced: new Map(), heard: 0 };
const keyOf = ({ target, directory, pid }) => directory || `${target} ${pid}`;

// Screen readers hear changes of level and verdict, not every number.
function announce(services) {
  if (Date.now() - state.heard < ANNOUNCE_MS) return;
  const texts = [], is_first = state.heard === 0, now = new Map();
  for (const service of services) {
    const verdict = service.episodes[0]?.verdict, key = keyOf(service);
    const text = service.level === 'ok' ? 'ok' : `${service.level}${verdict ? `: ${safe(verdict)}` : ''}`;
    now.set(key, text);
    if (text !== (state.announced.get(key) ?? 'ok')) texts.push(`${safe(service.target)} is ${text}`);
  }
  if (is_first && !texts.length) texts.push('All services are ok');
  state.announced = now;
  if (!texts.length) return;
  state.heard = Date.now();
  setText(byId('announcer'), texts.slice(0, 5).join('. ') + (texts.length > 5 ? `. And ${texts.length - 5} more` : ''));
}

function render() {
  const { view } = state;
  const bad = view.services.filter(it => it.level !== 'ok'), ok = view.services.filter(it => it.level === 'ok');
  state.observed = Math.floor((view.time_unix_ns - view.began_unix_ns) / view.point_ns) + 1;
  setText(byId('node'), safe(view.agent?.node ?? ''));
  const all = view.services.length + view.services_omitted;
  const text = bad.length ? `${bad.length} of ${count(all, 'service', 'services')} not ok` : `${count(all, 'service', 'services')}, all ok`;
  setText(byId('summary'), text);
  document.title = bad.length ? `(${bad.length}) Tailback` : 'Tailback';
  setText(byId('clock'), clock(view.time_unix_ns));
  byId('attention-none').hidden = bad.length > 0;
  setText(byId('attention-none'), all ? 'All queues are ok.' : 'No service is watched yet.');
  sync(byId('attention'), bad, keyOf, card);
  byId('ok-section').hidden = ok.length === 0;
  byId('ok').tHead.dataset.fixed = 'true';
  sync(byId('ok'), ok, keyOf, okRows);
  const omitted = count(view.services_omitted, 'more service is', 'more services are');
  setText(byId('omitted'), view.services_omitted ? `${omitted} not shown; none is worse.` : '');
  byId('ended-section').hidden = view.ended.length === 0;
  sync(byId('ended'), view.ended, ({ id }) => id, endedItem);
  const texts = consumerTexts();
  byId('consumers-section').hidden = texts.length === 0;
  sync(byId('consumers'), texts, ([output, service]) => `${output} ${service}`, consumerRow);
  announce(view.services);
}

function problem(text) {
  byId('problem').hidden = !text;
  setText(byId('problem'), text);
  document.body.classList.toggle('stale', Boolean(text));
}

async function poll() {
  if (!state.paused && !document.hidden) {
    try {
      const response = await fetch('live', { cache: 'no-store', signal: AbortSignal.timeout(TIMEOUT_MS) });
      if (!response.ok) throw new Error(`status ${response.status}`);
      const { live, adapter_process } = await response.json();
      if (live && !state.paused) {
        state.view = live;
        state.adapters = adapter_process?.adapters ?? [];
        render();
      }
      const since = state.view ? ` This is the state of ${clock(state.view.time_unix_ns)}.` : '';
      problem(!live ? `No agent replies: all signals have failed open, so all work is admitted.${since}`
        : live.agent?.sampling === false ? 'The agent takes no samples: all signals have failed open, so all work is admitted.' : '');
    } catch (error) {
      const since = state.view ? ` This is the state of ${clock(state.view.time_unix_ns)}.` : '';
      problem(`Tailback's HTTP adapter cannot be reached (${safe(error.message)}).${since} Trying again.`);
    }
  }
  setTimeout(poll, POLL_MS);
}

byId('pause').onclick = () => {
  state.paused = !state.paused;
  byId('pause').setAttribute('aria-pressed', state.paused);
};
poll();
