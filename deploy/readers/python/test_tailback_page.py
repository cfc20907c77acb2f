"""Tests the reader on pages written here.

    python3 test_tailback_page.py
"""

import itertools
import os
import struct
import sys
import tempfile
import threading
import time
import unittest

import tailback_page

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "examples"))
import wsgi

LONG_S = 100
# Longer than a busy machine pauses.
STILL_S = 3


class Written:
    """A page: critical, admit nothing, one queue of depth 7."""

    def __init__(self, ttl_s):
        self.file = tempfile.NamedTemporaryFile()
        self.file.truncate(4096)
        self.put("<8sII", 0, b"TAILBACK", 1, 1)
        self.put("<QQQ", 16, 2, boot_ns(), int(ttl_s * 1e9))
        self.put("<I", 44, 2)
        self.put("<II", 84, 1_500_000, 250_000)
        self.put("<I", 128 + 8, 7)

    def put(self, form, at, *values):
        os.pwrite(self.file.fileno(), struct.pack(form, *values), at)

    def seq(self, seq):
        self.put("<Q", 16, seq)

    def ratio(self, ppm, seq):
        self.put("<I", 52, ppm)
        self.seq(seq)

    def open(self):
        return tailback_page.open(self.file.name)


def exact_share(count, ppm):
    """Of this many requests at this ratio, how many may be admitted: the exact share, rounded up or down."""
    total = count * min(ppm, 1_000_000)
    return range(total // 1_000_000, -(-total // 1_000_000) + 1)


def boot_ns():
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Reader(unittest.TestCase):
    def test_published_values_are_read(self):
        page = Written(LONG_S).open()
        pressure = page.pressure()
        self.assertEqual((pressure.alive, pressure.level_name, pressure.admit_ratio), (True, "critical", 0.0))
        self.assertEqual((pressure.load, pressure.cpu), (1.5, 0.25))
        self.assertFalse(page.should_admit())
        self.assertEqual([entry.depth for entry in page.entries()], [7])

    def test_a_limit_is_known_only_with_its_flag_and_an_unknown_level_has_no_name(self):
        written = Written(LONG_S)
        self.assertIsNone(written.open().entries()[0].limit)
        written.put("<H", 128 + 2, 1)
        written.put("<I", 44, 4)
        page = written.open()
        self.assertEqual((page.entries()[0].limit, page.pressure().level_name), (0, "unknown"))

    def test_if_the_agent_stalls_in_the_middle_of_a_write_the_last_values_apply_until_their_ttl(self):
        written = Written(STILL_S)
        page = written.open()
        written.seq(3)
        written.put("<I", 44, 0)
        written.put("<I", 128 + 8, 8)
        self.assertEqual((page.pressure().level, page.should_admit(), page.entries()[0].depth), (2, False, 7))
        time.sleep(STILL_S)
        self.assertEqual((page.pressure().alive, page.should_admit(), page.entries()), (False, True, []))
        written.put("<Q", 24, boot_ns())
        written.seq(4)
        self.assertEqual((page.pressure().alive, page.entries()[0].depth), (True, 8))

    def test_magic_and_version_are_checked_at_each_read(self):
        written = Written(LONG_S)
        page = written.open()
        self.assertTrue(page.pressure().alive)
        written.put("<I", 8, 2)
        written.seq(4)
        self.assertEqual((page.pressure().alive, page.should_admit(), page.entries()), (False, True, []))

    def test_a_page_from_the_future_is_stale(self):
        written = Written(LONG_S)
        written.put("<Q", 24, boot_ns() + 10 * 10**9)
        self.assertFalse(written.open().pressure().alive)

    def test_admissions_are_evenly_spaced(self):
        written = Written(LONG_S)
        page = written.open()
        # A ratio above 1 counts as 1. Each one takes effect at once, and in every window of requests.
        ratios = [0, 1, 50_000, 333_333, 500_000, 750_000, 999_999, 1_000_000, 2**32 - 1]
        for number, ppm in enumerate(ratios):
            written.ratio(ppm, 4 + 2 * number)
            sums = list(itertools.accumulate((page.should_admit() for _ in range(10_000)), initial=0))
            for window in [1, 2, 3, 7, 100, 10_000]:
                passed = {end - start for start, end in zip(sums, sums[window:])}
                self.assertLessEqual(passed, set(exact_share(window, ppm)), f"of {window} at {ppm}")

    def test_threads_share_the_ratio_evenly(self):
        written = Written(LONG_S)
        written.ratio(300_001, 4)
        page, passed = written.open(), []
        count = lambda: passed.append(sum(page.should_admit() for _ in range(25_000)))
        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertIn(sum(passed), exact_share(100_000, 300_001))

    def test_processes_begin_with_different_phases(self):
        written = Written(LONG_S)
        written.ratio(10_000, 4)
        page = written.open()
        # At 1 in 100, a process admits its first request at a random one of its first hundred.
        self.assertGreater(len({first_admitted_after_fork(page) for _ in range(5)}), 1)


def first_admitted_after_fork(page):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, struct.pack("<I", next(i for i in range(1_000) if page.should_admit())))
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as file:
        return struct.unpack("<I", file.read())[0]


class Examples(unittest.TestCase):
    def test_wsgi_does_not_use_the_connection_if_the_service_terminates_tls(self):
        connection = object()
        environ = {"gunicorn.socket": connection, "wsgi.url_scheme": "http"}
        self.assertIs(wsgi.connection(environ), connection)
        self.assertIsNone(wsgi.connection({**environ, "wsgi.url_scheme": "https"}))


if __name__ == "__main__":
    unittest.main()
