'use strict';
/**
 * How full are this service's queues, and how much new work should it admit?
 *
 *     const page = require('./tailback_page').open('/run/tailback/shop/page'); // need not exist yet
 *
 *     if (!page.shouldAdmit()) { // tens of nanoseconds; every 5 ms a microsecond more
 *       res.writeHead(503, { 'Retry-After': page.pressure().retryAfterHeader }).end();
 *     }
 *
 * Tailback writes one page of memory about ten times a second. Node cannot map memory without native code, so this reads
 * the file's first bytes (it is in memory: no disk is read), at most every 5 ms, and all of it if it changed. Everything fails
 * open: no page, a page of a dead agent, or an invalid page mean no pressure (level 0, admit ratio 1).
 *
 * Needs Node 16 or later and nothing else. From an ES module: import { open } from './tailback_page.js'
 *
 *     $ node tailback_page.js /run/tailback/shop/page      # one line of JSON
 */

const fs = require('node:fs');
const os = require('node:os');

// The names of the kinds, by their number in the page. A number is never reused.
const KINDS =
  'syn accept recv udp unix pipe inflight workers eventloop runqueue lock disk memory downstream send fd uring app'.split(' ');
const LEVELS = ['ok', 'warn', 'critical', 'full'];

/**
 * The pressure on the service as a whole.
 * @typedef {object} Pressure
 * @property {boolean} alive          an agent publishes for the service; if not, all other fields mean no pressure
 * @property {number} level           0 ok, 1 warn, 2 critical, 3 full
 * @property {string} levelName
 * @property {number} score           saturation of the worst queue: 0 is none, 1 is saturated; may exceed 1
 * @property {number} admitRatio      fraction of new work to admit, 0 to 1
 * @property {number} oldestAgeMs     age of the oldest item waiting
 * @property {number} timeToFullMs    forecast; Infinity if no queue is filling
 * @property {number} retryAfterMs    when rejected clients should retry
 * @property {string} retryAfterHeader  value of a Retry-After header: whole seconds, rounded up, at least 1
 * @property {number} load            demand as a fraction of capacity: 1 is all of it, 2 is twice that or more
 * @property {number} cpu             CPU time used, as a fraction of what the service may use
 * @property {number} pid             of the service, in the agent's /proc
 * @property {number} worst           index of the worst queue among the entries
 * @property {number|null} concurrencyLimit  most requests to have in service at once; null: no limit
 * @property {number|null} maxQueueWaitMs  reject work that waited longer before it was dequeued; null: no limit
 */

/**
 * One queue. An unknown value is null.
 * @typedef {object} Entry
 * @property {string} kind            one of KINDS, or "unknown"
 * @property {number} flags
 * @property {number} id              identifies the queue for as long as it exists
 * @property {number} depth
 * @property {number|null} limit
 * @property {number} standingDelayMs  minimum delay over the last second or so
 * @property {number|null} p99Ms
 * @property {number} oldestAgeMs     age of the oldest item waiting
 * @property {number} score
 * @property {number|null} arrivalsPerS
 * @property {number|null} departuresPerS
 * @property {number} losses          work lost since the queue was first observed
 */

const PAGE_BYTES = 4096;
const SEQ_AT = 16;
const SEQ_BYTES = 8;
const ENTRIES_AT = 128;
const ENTRY_BYTES = 64;
const ENTRIES_MAX = 62;
const NEVER = 2n ** 64n - 1n;
const PPM = 1_000_000;
const HAS_LIMIT = 1;
const HAS_RATES = 2;
const HAS_P99 = 4;
const POLL_INTERVAL_MS = 5;
const REOPEN_INTERVAL_MS = 1000;
const MAX_READ_ATTEMPTS = 20;

/** @type {Pressure} */
const NO_PRESSURE = Object.freeze({
  alive: false,
  level: 0,
  levelName: LEVELS[0],
  score: 0,
  admitRatio: 1,
  oldestAgeMs: 0,
  timeToFullMs: Infinity,
  retryAfterMs: 0,
  retryAfterHeader: '1',
  load: 0,
  cpu: 0,
  pid: 0,
  worst: 0,
  concurrencyLimit: null,
  maxQueueWaitMs: null,
});

/** The page of one target. */
class Page {
  #path;
  #fd = -1;
  #seq = Buffer.alloc(SEQ_BYTES); // seq of the page at the last read
  #seqNow = Buffer.alloc(SEQ_BYTES);
  #last = Buffer.alloc(PAGE_BYTES); // the last consistent copy
  #spare = Buffer.alloc(PAGE_BYTES);
  #pressure = NO_PRESSURE;
  #admitPpm = PPM;
  // Times on the clock of performance.now().
  #pollAt = 0;
  #reopenAt = 0;
  #staleAt = 0;
  // A random phase, so that workers do not reject in step.
  #creditPpm = Math.floor(Math.random() * PPM);

  /** @param {string} path */
  constructor(path) {
    this.#path = path;
    this.#poll();
  }

  /** Fraction of new work to admit, 0 to 1. */
  admitRatio() {
    this.#poll();
    return this.#pressure.admitRatio;
  }

  /**
   * Whether to admit this piece of work, by the admit ratio. Admissions are evenly spaced, not random: at 0.75, three are
   * admitted, then one is rejected.
   */
  shouldAdmit() {
    this.#poll();
    this.#creditPpm += this.#admitPpm;
    if (this.#creditPpm < PPM) return false;
    this.#creditPpm -= PPM;
    return true;
  }

  /**
   * Whether to admit work that waited this long before it was dequeued. If that is not known, or the page has no max queue wait,
   * the admit ratio decides.
   * @param {number|null|undefined} waitedMs
   */
  shouldAdmitAfter(waitedMs) {
    this.#poll();
    const maxMs = this.#pressure.maxQueueWaitMs;
    return maxMs !== null && waitedMs != null && waitedMs >= 0 ? waitedMs <= maxMs : this.shouldAdmit();
  }

  /** The pressure on the service as a whole. @returns {Pressure} */
  pressure() {
    this.#poll();
    return this.#pressure;
  }

  /** The queues, worst first; none without a live page. @returns {Entry[]} */
  entries() {
    this.#poll();
    const count = this.#pressure.alive ? Math.min(this.#last.readUInt32LE(12), ENTRIES_MAX) : 0;
    return Array.from({ length: count }, (_, i) => decodeEntry(this.#last, ENTRIES_AT + ENTRY_BYTES * i));
  }

  /** For tests; a service keeps its page open as long as it runs. */
  close() {
    if (this.#fd >= 0) fs.closeSync(this.#fd);
    this.#fd = -1;
    this.#pollAt = Infinity;
    this.#forget();
  }

  #poll() {
    const now = performance.now();
    if (now < this.#pollAt) return;
    this.#pollAt = now + POLL_INTERVAL_MS;
    this.#read(now);
    if (now < this.#staleAt) return;
    if (now >= this.#reopenAt) {
      this.#reopenAt = now + REOPEN_INTERVAL_MS;
      this.#open();
      this.#read(now);
    }
    if (now >= this.#staleAt) this.#forget();
  }

  /** Opens the file again: the agent may have started since, or may have recreated it. */
  #open() {
    if (this.#fd >= 0) fs.closeSync(this.#fd);
    this.#fd = -1;
    this.#seq.fill(0xff); // odd, so it differs from that of any consistent page
    try {
      this.#fd = fs.openSync(this.#path, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK); // opening a FIFO must not block
    } catch {
      // No page yet.
    }
  }

  /** Reads the page if it changed. If the agent stays in the middle of a write, the last copy applies until its TTL is over. */
  #read(now) {
    if (!this.#readAt(SEQ_AT, this.#seqNow) || this.#seqNow.equals(this.#seq)) return;
    for (let attempts = 0; attempts < MAX_READ_ATTEMPTS; attempts++) {
      this.#seqNow.copy(this.#seq);
      if (!this.#readAt(0, this.#spare) || !this.#readAt(SEQ_AT, this.#seqNow)) return;
      if (this.#seq[0] % 2 === 0 && this.#seqNow.equals(this.#seq)) {
        [this.#last, this.#spare] = [this.#spare, this.#last];
        this.#staleAt = now + ttlLeftMs(this.#last);
        this.#pressure = decodePressure(this.#last);
        this.#admitPpm = Math.min(this.#last.readUInt32LE(52), PPM);
        return;
      }
    }
  }

  /** Fills the buffer from the file; false if it cannot. */
  #readAt(position, buffer) {
    try {
      return this.#fd >= 0 && fs.readSync(this.#fd, buffer, 0, buffer.length, position) === buffer.length;
    } catch {
      return false;
    }
  }

  #forget() {
    this.#staleAt = 0;
    this.#pressure = NO_PRESSURE;
    this.#admitPpm = PPM;
  }
}

/** Remaining time to live of a page; 0: invalid or stale. */
function ttlLeftMs(page) {
  if (page.toString('latin1', 0, 8) !== 'TAILBACK' || page.readUInt32LE(8) !== 1) return 0;
  const ttlNs = u64(page, 32);
  const { nowNs, behindNs } = bootClock();
  const ageNs = nowNs - u64(page, 24);
  // A page from the future (written in another time namespace) counts as stale.
  return ageNs >= -behindNs && ageNs < ttlNs ? (ttlNs - Math.max(ageNs, 0)) / 1e6 : 0;
}

/**
 * CLOCK_BOOTTIME, and how far the result may be behind it. Node has it only as os.uptime(), which is rounded down (to 10 ms, or
 * 1 s in old versions) and, under lxcfs, is that of the container. It is never behind CLOCK_MONOTONIC, which is exact, and
 * ahead of it only if the machine was suspended.
 */
function bootClock() {
  const monotonicNs = Number(process.hrtime.bigint());
  const uptimeNs = os.uptime() * 1e9;
  return uptimeNs > monotonicNs ? { nowNs: uptimeNs, behindNs: 1e9 } : { nowNs: monotonicNs, behindNs: 0 };
}

/** As a Number: exact to the nanosecond up to 104 days. */
function u64(page, at) {
  return Number(page.readBigUInt64LE(at));
}

/** @returns {Pressure} */
function decodePressure(page) {
  const level = page.readUInt32LE(44);
  const retryAfterMs = page.readUInt32LE(80);
  return Object.freeze({
    alive: true,
    level,
    levelName: LEVELS[level] ?? 'unknown',
    score: page.readUInt32LE(48) / PPM,
    admitRatio: Math.min(page.readUInt32LE(52) / PPM, 1),
    oldestAgeMs: u64(page, 64) / 1e6,
    timeToFullMs: page.readBigUInt64LE(72) === NEVER ? Infinity : u64(page, 72) / 1e6,
    retryAfterMs,
    retryAfterHeader: String(Math.max(1, Math.ceil(retryAfterMs / 1000))),
    load: page.readUInt32LE(84) / PPM,
    cpu: page.readUInt32LE(88) / PPM,
    pid: page.readUInt32LE(40),
    worst: page.readUInt32LE(56),
    concurrencyLimit: page.readUInt32LE(92) || null,
    maxQueueWaitMs: u64(page, 96) / 1e6 || null,
  });
}

/** @returns {Entry} */
function decodeEntry(page, at) {
  const flags = page.readUInt16LE(at + 2);
  return {
    kind: KINDS[page.readUInt16LE(at)] ?? 'unknown',
    flags,
    id: page.readUInt32LE(at + 4),
    depth: page.readUInt32LE(at + 8),
    limit: flags & HAS_LIMIT ? page.readUInt32LE(at + 12) : null,
    standingDelayMs: u64(page, at + 16) / 1e6,
    p99Ms: flags & HAS_P99 ? u64(page, at + 24) / 1e6 : null,
    oldestAgeMs: u64(page, at + 32) / 1e6,
    score: page.readUInt32LE(at + 40) / PPM,
    arrivalsPerS: flags & HAS_RATES ? page.readUInt32LE(at + 44) : null,
    departuresPerS: flags & HAS_RATES ? page.readUInt32LE(at + 48) : null,
    losses: page.readUInt32LE(at + 52),
  };
}

/**
 * Age of a request, from the X-Request-Start header of a proxy on this machine; without a proxy, clients can forge it. Seconds
 * (nginx: "t=${msec}"), milliseconds, or microseconds (HAProxy: t=%[date(0,us)]) since 1970; the unit is recognized by magnitude.
 * Null if the header is not such a time.
 * @param {string|undefined} started
 */
function sinceMs(started) {
  const start = Number.parseFloat((started ?? '').trim().replace(/^t=/, ''));
  for (const inMs of [1e3, 1, 1e-3]) {
    const passed = Date.now() - start * inMs;
    if (Math.abs(passed) < 3_600_000) return Math.max(passed, 0);
  }
  return null;
}

/**
 * Never fails: a page that does not exist is looked for once a second.
 * @param {string} path
 */
function open(path) {
  return new Page(path);
}

function main() {
  if (process.argv.length !== 3) {
    console.error('usage: tailback_page.js PATH');
    return 2;
  }
  const page = open(process.argv[2]);
  const p = page.pressure();
  const ns = (ms) => Math.round(ms * 1e6);
  const line = {
    alive: p.alive,
    level: p.level,
    score: p.score,
    admit_ratio: p.admitRatio,
    oldest_age_ns: ns(p.oldestAgeMs),
    time_to_full_ns: ns(p.timeToFullMs), // Infinity is null in JSON
    retry_after_ms: p.retryAfterMs,
    load: p.load,
    cpu: p.cpu,
    pid: p.pid,
    worst: p.worst,
    concurrency_limit: p.concurrencyLimit,
    max_queue_wait_ns: p.maxQueueWaitMs === null ? null : ns(p.maxQueueWaitMs),
    entries: page.entries().map((e) => ({
      kind: e.kind,
      id: e.id,
      depth: e.depth,
      limit: e.limit,
      standing_delay_ns: ns(e.standingDelayMs),
      p99_ns: e.p99Ms === null ? null : ns(e.p99Ms),
      oldest_age_ns: ns(e.oldestAgeMs),
      score: e.score,
      arrivals_per_s: e.arrivalsPerS,
      departures_per_s: e.departuresPerS,
      losses: e.losses,
    })),
  };
  console.log(JSON.stringify(line));
  return 0;
}

module.exports = { open, sinceMs, Page, KINDS, LEVELS };

if (require.main === module) process.exitCode = main();
