'use strict';
/**
 * How full are this service's queues, and how much new work should it take?
 *
 *     const page = require('./tailback_page').open('/run/tailback/shop/page'); // fine if it is not there yet
 *
 *     if (!page.shouldAdmit()) { // tens of nanoseconds; every 5 ms a microsecond more
 *       res.writeHead(503, { 'Retry-After': page.pressure().retryAfterHeader }).end();
 *     }
 *
 * Tailback writes one page of memory about ten times a second. Node cannot map memory without native code, so this reads
 * the file's first bytes (it lies in memory: no disk is touched), at most every 5 ms, and all of it where it changed.
 * Everything fails open: no page, a page of a dead agent, a page that makes no sense are "no pressure": level 0, admit 1.
 *
 * Node 16 or later, nothing else. From an ES module: import { open } from './tailback_page.js'
 *
 *     $ node tailback_page.js /run/tailback/shop/page      # one line of JSON
 */

const fs = require('node:fs');
const os = require('node:os');

const KINDS =
  'syn accept recv udp unix pipe inflight workers eventloop runqueue lock disk memory downstream send fd uring'.split(' ');
const LEVELS = ['ok', 'warn', 'critical', 'full'];

/**
 * The service as a whole.
 * @typedef {object} Pressure
 * @property {boolean} alive          false: no agent speaks for this service now; all else is then "no pressure"
 * @property {number} level           0 ok, 1 warn, 2 critical, 3 full
 * @property {string} levelName
 * @property {number} score           of its fullest queue: 0 empty, 1 full; may pass 1
 * @property {number} admit           share of new work to take, 0 to 1
 * @property {number} oldestWaitMs    age of the oldest work that waits
 * @property {number} timeToFullMs    forecast; Infinity: never
 * @property {number} retryAfterMs    when refused clients should come again
 * @property {string} retryAfterHeader  the same for Retry-After: whole seconds, rounded up, at least 1
 * @property {number} load            what is asked of the service, of what it can do: 1 is all of it, 2 twice that or more
 * @property {number} cpu             CPU time, of what the service may use
 * @property {number} pid             of the service, as the agent's /proc numbers it
 * @property {number} worst           index of the fullest queue among the entries
 * @property {number|null} concurrency  so many requests at once keep the service busy; null: no limit
 * @property {number|null} maxWaitMs  refuse what waited for longer before it was taken; null: no limit
 */

/**
 * One queue. Null is what is not known.
 * @typedef {object} Entry
 * @property {string} kind            one of KINDS, or "unknown"
 * @property {number} flags
 * @property {number} id              names the queue as long as it is there
 * @property {number} depth
 * @property {number|null} limit
 * @property {number} minDelayMs      the delay that stands: no less for about a second
 * @property {number|null} p99Ms
 * @property {number} headAgeMs       of what has waited longest
 * @property {number} score
 * @property {number|null} arrivalsPerS
 * @property {number|null} departuresPerS
 * @property {number} losses          since the queue is watched
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
const LOOK_EVERY_MS = 5;
const OPEN_EVERY_MS = 1000;
const TRIES = 20;

/** @type {Pressure} */
const NO_PRESSURE = Object.freeze({
  alive: false,
  level: 0,
  levelName: LEVELS[0],
  score: 0,
  admit: 1,
  oldestWaitMs: 0,
  timeToFullMs: Infinity,
  retryAfterMs: 0,
  retryAfterHeader: '1',
  load: 0,
  cpu: 0,
  pid: 0,
  worst: 0,
  concurrency: null,
  maxWaitMs: null,
});

/** The page of one target. */
class Page {
  #path;
  #fd = -1;
  #seq = Buffer.alloc(SEQ_BYTES); // of the page when it was read last
  #seqNow = Buffer.alloc(SEQ_BYTES);
  #last = Buffer.alloc(PAGE_BYTES); // the last good copy
  #spare = Buffer.alloc(PAGE_BYTES);
  #pressure = NO_PRESSURE;
  #admitPpm = PPM;
  // On the clock of performance.now():
  #lookAgain = 0;
  #openAgain = 0;
  #staleAt = 0;
  // A random phase, so that many workers do not refuse in step.
  #diffusedPpm = Math.floor(Math.random() * PPM);

  /** @param {string} path */
  constructor(path) {
    this.#path = path;
    this.#look();
  }

  /** Share of new work to take, 0 to 1. */
  admit() {
    this.#look();
    return this.#pressure.admit;
  }

  /**
   * Whether to take this piece of work. Not by lot: at a share of 0.75, three are taken and one is refused, in turn, so
   * what is taken comes evenly spaced.
   */
  shouldAdmit() {
    this.#look();
    this.#diffusedPpm += this.#admitPpm;
    if (this.#diffusedPpm < PPM) return false;
    this.#diffusedPpm -= PPM;
    return true;
  }

  /**
   * Whether to take a piece of work that waited for so long before: by that, while the page says how long it may be. Else, and
   * where it is not known, by the share.
   * @param {number|null|undefined} waitedMs
   */
  shouldAdmitAfter(waitedMs) {
    this.#look();
    const mostMs = this.#pressure.maxWaitMs;
    return mostMs !== null && waitedMs != null && waitedMs >= 0 ? waitedMs <= mostMs : this.shouldAdmit();
  }

  /** @returns {Pressure} */
  pressure() {
    this.#look();
    return this.#pressure;
  }

  /** The queues, the fullest first; none without a live page. @returns {Entry[]} */
  entries() {
    this.#look();
    const count = this.#pressure.alive ? Math.min(this.#last.readUInt32LE(12), ENTRIES_MAX) : 0;
    return Array.from({ length: count }, (_, i) => decodeEntry(this.#last, ENTRIES_AT + ENTRY_BYTES * i));
  }

  /** For tests and the like: the page of a service is open as long as the service runs. */
  close() {
    if (this.#fd >= 0) fs.closeSync(this.#fd);
    this.#fd = -1;
    this.#lookAgain = Infinity;
    this.#forget();
  }

  #look() {
    const now = performance.now();
    if (now < this.#lookAgain) return;
    this.#lookAgain = now + LOOK_EVERY_MS;
    this.#read(now);
    if (now < this.#staleAt) return;
    if (now >= this.#openAgain) {
      this.#openAgain = now + OPEN_EVERY_MS;
      this.#open();
      this.#read(now);
    }
    if (now >= this.#staleAt) this.#forget();
  }

  /** The agent may have started since, or have made the file anew. */
  #open() {
    if (this.#fd >= 0) fs.closeSync(this.#fd);
    this.#fd = -1;
    this.#seq.fill(0xff); // not that of any whole page
    try {
      this.#fd = fs.openSync(this.#path, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK); // never hang on a FIFO
    } catch {
      // No page yet.
    }
  }

  /** Reads the page if it changed. One that does not come to rest leaves the last good copy, while that is fresh. */
  #read(now) {
    if (!this.#readAt(SEQ_AT, this.#seqNow) || this.#seqNow.equals(this.#seq)) return;
    for (let tries = 0; tries < TRIES; tries++) {
      this.#seqNow.copy(this.#seq);
      if (!this.#readAt(0, this.#spare) || !this.#readAt(SEQ_AT, this.#seqNow)) return;
      if (this.#seq[0] % 2 === 0 && this.#seqNow.equals(this.#seq)) {
        [this.#last, this.#spare] = [this.#spare, this.#last];
        this.#staleAt = now + freshForMs(this.#last);
        this.#pressure = decodePressure(this.#last);
        this.#admitPpm = Math.min(this.#last.readUInt32LE(52), PPM);
        return;
      }
    }
  }

  /** False if there are not as many bytes, or none at all. */
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

/** For how long a page may still be believed; 0: not at all. */
function freshForMs(page) {
  if (page.toString('latin1', 0, 8) !== 'TAILBACK' || page.readUInt32LE(8) !== 1) return 0;
  const ttlNs = u64(page, 32);
  const { nowNs, behindNs } = bootClock();
  const ageNs = nowNs - u64(page, 24);
  // A time yet to come is that of another clock, and as bad as a stale one.
  return ageNs >= -behindNs && ageNs < ttlNs ? (ttlNs - Math.max(ageNs, 0)) / 1e6 : 0;
}

/**
 * CLOCK_BOOTTIME, and how far it may be behind. Node has it as os.uptime() only, which is rounded down (to 10 ms, or 1 s in
 * old versions) and, under lxcfs, is that of the container. It is never behind CLOCK_MONOTONIC, which is exact, and ahead of
 * it only where the machine has slept.
 */
function bootClock() {
  const monotonicNs = Number(process.hrtime.bigint());
  const uptimeNs = os.uptime() * 1e9;
  return uptimeNs > monotonicNs ? { nowNs: uptimeNs, behindNs: 1e9 } : { nowNs: monotonicNs, behindNs: 0 };
}

/** As a Number: exact up to 104 days in nanoseconds. */
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
    admit: Math.min(page.readUInt32LE(52) / PPM, 1),
    oldestWaitMs: u64(page, 64) / 1e6,
    timeToFullMs: page.readBigUInt64LE(72) === NEVER ? Infinity : u64(page, 72) / 1e6,
    retryAfterMs,
    retryAfterHeader: String(Math.max(1, Math.ceil(retryAfterMs / 1000))),
    load: page.readUInt32LE(84) / PPM,
    cpu: page.readUInt32LE(88) / PPM,
    pid: page.readUInt32LE(40),
    worst: page.readUInt32LE(56),
    concurrency: page.readUInt32LE(92) || null,
    maxWaitMs: u64(page, 96) / 1e6 || null,
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
    minDelayMs: u64(page, at + 16) / 1e6,
    p99Ms: flags & HAS_P99 ? u64(page, at + 24) / 1e6 : null,
    headAgeMs: u64(page, at + 32) / 1e6,
    score: page.readUInt32LE(at + 40) / PPM,
    arrivalsPerS: flags & HAS_RATES ? page.readUInt32LE(at + 44) : null,
    departuresPerS: flags & HAS_RATES ? page.readUInt32LE(at + 48) : null,
    losses: page.readUInt32LE(at + 52),
  };
}

/**
 * For how long a request is under way, by the X-Request-Start that a proxy on this machine gave it (others can forge it): seconds (nginx: "t=${msec}"),
 * milliseconds, or microseconds (HAProxy: t=%[date(0,us)]) since 1970, told by their size. Null for what is no such time.
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
 * Never fails: a page that is not there is looked for again, at most once a second.
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
    admit: p.admit,
    oldest_age_ns: ns(p.oldestWaitMs),
    time_to_full_ns: ns(p.timeToFullMs), // Infinity is null in JSON
    retry_after_ms: p.retryAfterMs,
    load: p.load,
    cpu: p.cpu,
    pid: p.pid,
    worst: p.worst,
    concurrency: p.concurrency,
    max_queue_wait_ns: p.maxWaitMs === null ? null : ns(p.maxWaitMs),
    entries: page.entries().map((e) => ({
      kind: e.kind,
      id: e.id,
      depth: e.depth,
      limit: e.limit,
      standing_delay_ns: ns(e.minDelayMs),
      p99_ns: e.p99Ms === null ? null : ns(e.p99Ms),
      oldest_age_ns: ns(e.headAgeMs),
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
