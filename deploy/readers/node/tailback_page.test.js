'use strict';
/**
 * What the reader says of pages that this writes.
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
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'tailback-page-'));
after(() => fs.rmSync(folder, { recursive: true }));

// As on a machine that has not slept: CLOCK_BOOTTIME is CLOCK_MONOTONIC.
os.uptime = () => 0;
const bootNs = () => process.hrtime.bigint();

/** A page that says: critical, admit nothing, one queue of depth 7. */
class Written {
  #path = path.join(fs.mkdtempSync(path.join(folder, 'page-')), 'page');
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

  put({ version, seq, publishedNs, level, flags, depth }) {
    if (version !== undefined) this.#bytes.writeUInt32LE(version, 8);
    if (seq !== undefined) this.#bytes.writeBigUInt64LE(seq, 16);
    if (publishedNs !== undefined) this.#bytes.writeBigUInt64LE(publishedNs, 24);
    if (level !== undefined) this.#bytes.writeUInt32LE(level, 44);
    if (flags !== undefined) this.#bytes.writeUInt16LE(flags, 128 + 2);
    if (depth !== undefined) this.#bytes.writeUInt32LE(depth, 128 + 8);
    // In place: a page is never cut.
    fs.writeFileSync(this.#path, this.#bytes, { flag: fs.existsSync(this.#path) ? 'r+' : 'w' });
  }

  open() {
    return tailback.open(this.#path);
  }
}

/** Beyond the time for which the reader does not look, or longer. */
const sleep = (ms = 10) => new Promise((resolve) => setTimeout(resolve, ms));

test('all that is published is told', () => {
  const page = new Written(LONG_MS).open();
  const { alive, levelName, admit, load, cpu } = page.pressure();
  assert.deepEqual({ alive, levelName, admit }, { alive: true, levelName: 'critical', admit: 0 });
  assert.deepEqual({ load, cpu }, { load: 1.5, cpu: 0.25 });
  assert.equal(page.shouldAdmit(), false);
  assert.deepEqual(page.entries().map((entry) => entry.depth), [7]);
});

test('the flag tells whether a limit is known, and a level beyond the last has no name', () => {
  const written = new Written(LONG_MS);
  assert.equal(written.open().entries()[0].limit, null);
  written.put({ flags: 1, level: 4 });
  const page = written.open();
  assert.equal(page.entries()[0].limit, 0);
  assert.equal(page.pressure().levelName, 'unknown');
});

test('while the agent stands still in the middle of writing, what it said last holds for its time', async () => {
  const written = new Written(1_000);
  const page = written.open();
  assert.equal(page.pressure().alive, true);
  written.put({ seq: 3n, level: 0, depth: 8 });
  await sleep();
  assert.equal(page.pressure().level, 2);
  assert.equal(page.shouldAdmit(), false);
  assert.equal(page.entries()[0].depth, 7);
  await sleep(1_000);
  assert.equal(page.pressure().alive, false);
  assert.equal(page.shouldAdmit(), true);
  assert.deepEqual(page.entries(), []);
  written.put({ seq: 4n, publishedNs: bootNs() });
  await sleep();
  assert.equal(page.entries()[0].depth, 8);
});

test('whether it is a page of this version is asked at each read', async () => {
  const written = new Written(LONG_MS);
  const page = written.open();
  assert.equal(page.pressure().alive, true);
  written.put({ version: 2, seq: 4n });
  await sleep();
  assert.equal(page.pressure().alive, false);
  assert.deepEqual(page.entries(), []);
});

test('a time to come is that of another clock, beyond what os.uptime() is rounded down by', () => {
  const isBelieved = (publishedNs) => {
    const written = new Written(LONG_MS);
    written.put({ publishedNs });
    return written.open().pressure().alive;
  };
  assert.equal(isBelieved(bootNs() + 900_000_000n), false);
  // In an old Node, of a machine that slept for an hour.
  const uptime = bootNs() / 1_000_000_000n + 3_600n;
  os.uptime = () => Number(uptime);
  assert.equal(isBelieved(uptime * 1_000_000_000n + 900_000_000n), true);
  assert.equal(isBelieved(uptime * 1_000_000_000n + 1_100_000_000n), false);
  os.uptime = () => 0;
});
