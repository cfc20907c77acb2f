'use strict';
/**
 * Tests the reader on pages written here.
 *
 *     node tailback_page.test.js      # Node 18 or later
 */
const assert = require('node:assert/strict');
const fs = require('node:fs');
const os = require('node:os');
const path = require('node:path');
const { after, test } = require('node:test');
const tailback = require('./tailback_page');

const LONG_MS = 100_000;
// Longer than a busy machine pauses.
const STILL_MS = 3_000;
const directory = fs.mkdtempSync(path.join(os.tmpdir(), 'tailback-page-'));
after(() => fs.rmSync(directory, { recursive: true }));

// As on a machine that was never suspended: CLOCK_BOOTTIME equals CLOCK_MONOTONIC.
os.uptime = () => 0;
const bootNs = () => process.hrtime.bigint();

/** A page: critical, admit nothing, one queue of depth 7. */
class Written {
  #path = path.join(fs.mkdtempSync(path.join(directory, 'page-')), 'page');
  #bytes = Buffer.alloc(4096);

  constructor(ttlMs) {
    this.#bytes.write('TAILBACK');
    this.put({ version: 1, seq: 2n, publishedNs: bootNs(), level: 2, depth: 7 });
    this.#bytes.writeUInt32LE(1, 12);
    this.#bytes.writeBigUInt64LE(BigInt(ttlMs) * 1_000_000n, 32);
    this.#bytes.writeUInt32LE(1_500_000, 84);
    this.#bytes.writeUInt32LE(250_000, 88);
    this.put({});
  }

  put({ version, seq, publishedNs, level, admitPpm, flags, depth }) {
    if (version !== undefined) this.#bytes.writeUInt32LE(version, 8);
    if (seq !== undefined) this.#bytes.writeBigUInt64LE(seq, 16);
    if (publishedNs !== undefined) this.#bytes.writeBigUInt64LE(publishedNs, 24);
    if (level !== undefined) this.#bytes.writeUInt32LE(level, 44);
    if (admitPpm !== undefined) this.#bytes.writeUInt32LE(admitPpm, 52);
    if (flags !== undefined) this.#bytes.writeUInt16LE(flags, 128 + 2);
    if (depth !== undefined) this.#bytes.writeUInt32LE(depth, 128 + 8);
    // Written in place: a page is never truncated.
    fs.writeFileSync(this.#path, this.#bytes, { flag: fs.existsSync(this.#path) ? 'r+' : 'w' });
  }

  open() {
    return tailback.open(this.#path);
  }
}

/** At least as long as the reader's poll interval. */
const sleep = (ms = 10) => new Promise((resolve) => setTimeout(resolve, ms));

test('published values are read', () => {
  const page = new Written(LONG_MS).open();
  const { alive, levelName, admitRatio, load, cpu } = page.pressure();
  assert.deepEqual({ alive, levelName, admitRatio }, { alive: true, levelName: 'critical', admitRatio: 0 });
  assert.deepEqual({ load, cpu }, { load: 1.5, cpu: 0.25 });
  assert.equal(page.shouldAdmit(), false);
  assert.deepEqual(page.entries().map((entry) => entry.depth), [7]);
});

test('a limit is known only with its flag, and an unknown level has no name', () => {
  const written = new Written(LONG_MS);
  assert.equal(written.open().entries()[0].limit, null);
  written.put({ flags: 1, level: 4 });
  const page = written.open();
  assert.equal(page.entries()[0].limit, 0);
  assert.equal(page.pressure().levelName, 'unknown');
});

test('if the agent stalls in the middle of a write, the last values apply until their TTL is over', async () => {
  const written = new Written(STILL_MS);
  const page = written.open();
  assert.equal(page.pressure().alive, true);
  written.put({ seq: 3n, level: 0, depth: 8 });
  await sleep();
  assert.equal(page.pressure().level, 2);
  assert.equal(page.shouldAdmit(), false);
  assert.equal(page.entries()[0].depth, 7);
  await sleep(STILL_MS);
  assert.equal(page.pressure().alive, false);
  assert.equal(page.shouldAdmit(), true);
  assert.deepEqual(page.entries(), []);
  written.put({ seq: 4n, publishedNs: bootNs() });
  await sleep();
  assert.equal(page.entries()[0].depth, 8);
});

test('magic and version are checked at each read', async () => {
  const written = new Written(LONG_MS);
  const page = written.open();
  assert.equal(page.pressure().alive, true);
  written.put({ version: 2, seq: 4n });
  await sleep();
  assert.equal(page.pressure().alive, false);
  assert.deepEqual(page.entries(), []);
});

test('a page from the future is stale, beyond the rounding of os.uptime()', () => {
  const isAlive = (publishedNs) => {
    const written = new Written(LONG_MS);
    written.put({ publishedNs });
    return written.open().pressure().alive;
  };
  assert.equal(isAlive(bootNs() + 900_000_000n), false);
  // An old Node on a machine that was suspended for an hour.
  const uptime = bootNs() / 1_000_000_000n + 3_600n;
  os.uptime = () => Number(uptime);
  assert.equal(isAlive(uptime * 1_000_000_000n + 900_000_000n), true);
  assert.equal(isAlive(uptime * 1_000_000_000n + 1_100_000_000n), false);
  os.uptime = () => 0;
});

test('admissions are evenly spaced', async () => {
  const written = new Written(LONG_MS);
  const page = written.open();
  let seq = 2n;
  // A ratio above 1 counts as 1. Each one takes effect at once, and in every window of requests.
  for (const admitPpm of [0, 1, 50_000, 333_333, 500_000, 750_000, 999_999, 1_000_000, 2 ** 32 - 1]) {
    seq += 2n;
    written.put({ admitPpm, seq });
    await sleep();
    const sums = [0]; // admitted before each request
    for (let i = 0; i < 10_000; i++) sums.push(sums[i] + page.shouldAdmit());
    const ratio = Math.min(admitPpm, 1e6);
    for (const window of [1, 2, 3, 7, 100, 10_000]) {
      const [least, most] = [Math.floor((window * ratio) / 1e6), Math.ceil((window * ratio) / 1e6)];
      for (let end = window; end < sums.length; end++) {
        const passed = sums[end] - sums[end - window];
        assert.ok(least <= passed && passed <= most, `${passed} of ${window} at ${admitPpm}`);
      }
    }
  }
});

test('processes begin with different phases', () => {
  const written = new Written(LONG_MS);
  written.put({ admitPpm: 10_000 });
  // At 1 in 100, a process admits its first request at a random one of its first hundred.
  const first = () => {
    const page = written.open();
    let number = 0;
    while (!page.shouldAdmit()) number++;
    return number;
  };
  assert.ok(new Set(Array.from({ length: 5 }, first)).size > 1);
});
