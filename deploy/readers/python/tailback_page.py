"""How full are this service's queues, and how much new work should it admit?

    import tailback_page

    page = tailback_page.open("/run/tailback/shop/page")  # need not exist yet
    if not page.should_admit_from(connection):            # or should_admit(): less than a microsecond
        return 503, {"Retry-After": page.pressure().retry_after_header}

Tailback writes one page of memory about ten times a second; this module maps and reads it. Everything fails open: no page,
a page of a dead agent, or an invalid page mean no pressure (level 0, admit ratio 1).

Threads may share a Page, and so may the children of a fork. Needs Python 3.9 or later and nothing else.

    $ python3 tailback_page.py /run/tailback/shop/page      # one line of JSON
"""

import json
import math
import mmap
import os
import random
import socket
import stat
import struct
import sys
import threading
import time
from typing import NamedTuple, Optional

__all__ = ["Entry", "Page", "Pressure", "open", "since_s", "waited_s"]

# The names of the kinds, by their number in the page. A number is never reused.
KINDS = (
    "syn accept recv udp unix pipe inflight workers eventloop runqueue lock disk memory downstream send fd uring app".split()
)
LEVELS = ("ok", "warn", "critical", "full")


class Pressure(NamedTuple):
    """The pressure on the service as a whole. The defaults mean no pressure."""

    alive: bool = False  # an agent publishes for the service
    level: int = 0  # 0 ok, 1 warn, 2 critical, 3 full
    score: float = 0.0  # saturation of the worst queue: 0 is none, 1 is saturated; may exceed 1
    admit_ratio: float = 1.0  # fraction of new work to admit, 0 to 1
    oldest_age_s: float = 0.0  # age of the oldest item waiting
    time_to_full_s: float = math.inf  # forecast; inf if no queue is filling
    retry_after_s: float = 0.0  # when rejected clients should retry
    load: float = 0.0  # demand as a fraction of capacity: 1 is all of it, 2 is twice that or more
    cpu: float = 0.0  # CPU time used, as a fraction of what the service may use
    pid: int = 0  # of the service, in the agent's /proc
    worst: int = 0  # index of the worst queue among the entries
    concurrency_limit: Optional[int] = None  # most requests to have in service at once; None: no limit
    max_queue_wait_s: Optional[float] = None  # reject work that waited longer before it was dequeued; None: no limit

    @property
    def level_name(self) -> str:
        return LEVELS[self.level] if self.level < len(LEVELS) else "unknown"

    @property
    def retry_after_header(self) -> str:
        """The value of a Retry-After header: whole seconds, rounded up, at least 1."""
        return str(max(1, math.ceil(self.retry_after_s)))


class Entry(NamedTuple):
    """One queue. An unknown value is None."""

    kind: str  # one of KINDS, or "unknown"
    flags: int
    id: int  # identifies the queue for as long as it exists
    depth: int
    limit: Optional[int]
    standing_delay_s: float  # minimum delay over the last second or so
    p99_s: Optional[float]
    oldest_age_s: float  # age of the oldest item waiting
    score: float
    arrivals_per_s: Optional[int]
    departures_per_s: Optional[int]
    losses: int  # work lost since the queue was first observed


_SIZE = 4096
_SEQ = 2  # index of the seqlock word: odd while the agent writes
_MAX_READ_ATTEMPTS = 100
_NEVER = 2**64 - 1
_PPM = 1_000_000
_HAS_LIMIT = 1
_HAS_RATES = 2
_HAS_P99 = 4

# magic, version, entries, seq, published_ns, ttl_ns, pid, level, score_ppm, admit_ppm, worst, wake, oldest_age_ns,
# time_to_full_ns, retry_after_ms, load_ppm, cpu_ppm, concurrency_limit, max_queue_wait_ns
_HEADER = struct.Struct("<8sIIQQQIIIIIIQQIIIIQ")
# kind, flags, id, depth, limit, standing_delay_ns, p99_ns, oldest_age_ns, score_ppm, arrivals, departures, losses
_ENTRY = struct.Struct("<HHIIIQQQIIII8x")
# tcpi_last_data_recv (ms) in struct tcp_info.
_TCP_INFO = struct.Struct("<52xI")
_ENTRIES_AT = 128
_ENTRIES_MAX = 62
assert _HEADER.size == 104 and _ENTRY.size == 64

_monotonic = time.monotonic


def open(path: "str | os.PathLike[str]") -> "Page":
    """Never fails: a page that does not exist is looked for once a second."""
    return Page(path)


def waited_s(connection: "socket.socket | int | None") -> Optional[float]:
    """How long ago data last arrived on a TCP connection, by the kernel's clock, to a few milliseconds.

    Right after a request was read, that is how long it waited. None if it is not a TCP connection, and for an SSLSocket, where
    the handshake arrived last. A bare descriptor does not show that this process terminates TLS on it: it gives about 0.
    """
    try:
        if isinstance(connection, int):
            # SOCK_NONBLOCK: otherwise Python may change the connection's mode, depending on the default timeout.
            kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
            borrowed = socket.socket(socket.AF_INET, kind, 0, fileno=connection)
            try:
                return waited_s(borrowed)
            finally:
                borrowed.detach()  # must not close the caller's descriptor
        if hasattr(connection, "cipher"):
            return None  # TLS: the handshake arrived last
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        return _TCP_INFO.unpack(info)[0] / 1e3
    except (AttributeError, OSError, ValueError, struct.error):
        return None


def since_s(started: "str | None") -> Optional[float]:
    """Age of a request, from the X-Request-Start header of a proxy on this machine. Without a proxy, clients can forge it.

    Seconds (nginx: "t=${msec}"), milliseconds, or microseconds (HAProxy: t=%[date(0,us)]) since 1970; the unit is recognized by
    magnitude. None if the header is not such a time.
    """
    try:
        start = float((started or "").strip().removeprefix("t="))
    except ValueError:
        return None
    for unit in (1, 1e3, 1e6):
        passed = time.time() - start / unit
        if abs(passed) < 3600:
            return max(passed, 0.0)
    return None


class _View(NamedTuple):
    """The state of the page at the last read. Immutable and replaced as a whole, so that threads can read it without a lock."""

    words: memoryview  # the mapped page as 64-bit words
    file: Optional[tuple]  # device and inode of the file
    seq: int  # seq of the page at the last read
    recheck: float  # monotonic: when to read again even if seq is unchanged, because the page may be stale
    copy: bytes  # the last consistent copy of the page
    admit_ppm: int
    pressure: Pressure


# Stands in for a missing page, so that the fast path needs no check for one.
_NO_VIEW = _View(memoryview(bytes(_SIZE)).cast("Q"), None, 0, -math.inf, bytes(_SIZE), _PPM, Pressure())


class Page:
    """The page of one target."""

    def __init__(self, path: "str | os.PathLike[str]"):
        self._path = path
        self._reopen_at = -math.inf
        self._view = _NO_VIEW
        self._reset_phase()
        self._poll()

    def admit_ratio(self) -> float:
        """Fraction of new work to admit, 0 to 1."""
        return self._poll().pressure.admit_ratio

    def should_admit(self) -> bool:
        """Whether to admit this piece of work, by the admit ratio.

        Admissions are evenly spaced, not random: at 0.75, three are admitted, then one is rejected.
        """
        return self._by_ratio(self._poll())

    def should_admit_from(self, connection: "socket.socket | int | None") -> bool:
        """Whether to admit a request that was just read from this TCP connection (a socket or its descriptor).

        While the page has a max queue wait, this asks the kernel how long the request waited. Otherwise, and for an SSLSocket, the
        admit ratio decides. If this process terminates TLS and only has the descriptor, use should_admit(): the handshake precedes
        the request, so everything would be admitted.
        """
        view = self._poll()
        if view.pressure.max_queue_wait_s is None:
            return self._by_ratio(view)
        return self._by_wait(view, waited_s(connection))

    def should_admit_after(self, waited_s: Optional[float]) -> bool:
        """Whether to admit work that waited this long before it was dequeued.

        If that is None, or the page has no max queue wait, the admit ratio decides.
        """
        return self._by_wait(self._poll(), waited_s)

    def pressure(self) -> Pressure:
        """The pressure on the service as a whole."""
        return self._poll().pressure

    def entries(self) -> "list[Entry]":
        """The queues, worst first; none without a live page."""
        view = self._poll()
        if not view.pressure.alive:
            return []
        count = min(_HEADER.unpack_from(view.copy)[2], _ENTRIES_MAX)
        return [_entry(*_ENTRY.unpack_from(view.copy, _ENTRIES_AT + _ENTRY.size * i)) for i in range(count)]

    def _by_wait(self, view: _View, waited_s: Optional[float]) -> bool:
        max_s = view.pressure.max_queue_wait_s
        if max_s is None or waited_s is None or not waited_s >= 0:
            return self._by_ratio(view)
        return waited_s <= max_s

    def _by_ratio(self, view: _View) -> bool:
        ppm = view.admit_ppm
        if ppm == _PPM:
            return True
        if self._pid != os.getpid():
            self._reset_phase()
        with self._lock:
            self._credit_ppm += ppm
            if self._credit_ppm < _PPM:
                return False
            self._credit_ppm -= _PPM
            return True

    def _reset_phase(self) -> None:
        """Sets a random phase, so that workers do not reject in step, and a lock that no thread held during a fork.

        A fork is noticed by the pid, not by os.register_at_fork(), because uWSGI forks without Python's knowledge.
        """
        self._lock = threading.Lock()
        self._credit_ppm = random.SystemRandom().randrange(_PPM)
        self._pid = os.getpid()

    def _poll(self) -> _View:
        view = self._view
        if view.words[_SEQ] == view.seq and _monotonic() < view.recheck:
            return view
        # Threads that get here at the same time do the same work; each stores a consistent view.
        now = _monotonic()
        view = _read(view, now)
        if not view.pressure.alive:
            if now >= self._reopen_at:
                self._reopen_at = now + 1
                view = _read(_map(self._path, view), now)
            if not view.pressure.alive:
                view = view._replace(recheck=self._reopen_at)
        self._view = view
        return view


def _map(path: "str | os.PathLike[str]", view: _View) -> _View:
    """Maps the file at the path, if it is not the file that is mapped already."""
    try:
        found = os.stat(path)
        if (found.st_dev, found.st_ino) == view.file:
            return view
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a FIFO must not block
        try:
            found = os.fstat(fd)
            # Reading beyond the end of a mapped file raises SIGBUS.
            if not stat.S_ISREG(found.st_mode) or found.st_size < _SIZE:
                return _NO_VIEW
            words = memoryview(mmap.mmap(fd, _SIZE, mmap.MAP_SHARED, mmap.PROT_READ)).cast("Q")
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return _NO_VIEW
    # 1 is odd, so it differs from the seq of any consistent page.
    return _NO_VIEW._replace(words=words, file=(found.st_dev, found.st_ino), seq=1)


def _read(view: _View, now: float) -> _View:
    """Reads the page if it changed. If the agent stays in the middle of a write, the last copy applies until its time to live is over."""
    seq, copy = view.words[_SEQ], view.copy
    if seq != view.seq:
        for _ in range(_MAX_READ_ATTEMPTS):
            # Reading the clock implies a load barrier, because the kernel's vDSO reads a seqlock itself. Python has no barrier of its
            # own, and processors that reorder loads need one.
            seq = view.words[_SEQ]
            time.monotonic_ns()
            candidate = view.words.tobytes()
            time.monotonic_ns()
            if seq % 2 == 0 and view.words[_SEQ] == seq:
                copy = candidate
                break
    ttl_left_s, admit_ppm, pressure = _decode(copy)
    # The seq is stored even after a failed read, so that a page whose writer died is not read again and again.
    return view._replace(
        seq=seq, copy=copy, recheck=now + min(ttl_left_s, 1.0), admit_ppm=admit_ppm, pressure=pressure
    )


def _decode(copy: bytes) -> "tuple[float, int, Pressure]":
    """Remaining time to live, admit ratio and pressure of a copy of the page."""
    (magic, version, _, _, published_ns, ttl_ns, pid, level, score_ppm, admit_ppm, worst, _, oldest_age_ns,
     time_to_full_ns, retry_after_ms, load_ppm, cpu_ppm, concurrency_limit, max_queue_wait_ns) = _HEADER.unpack_from(copy)  # fmt: skip
    if magic == b"TAILBACK" and version == 1:
        age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - published_ns
        # A page from the future (written in another time namespace) counts as stale.
        if 0 <= age_ns < ttl_ns:
            admit_ppm = min(admit_ppm, _PPM)
            return (ttl_ns - age_ns) / 1e9, admit_ppm, Pressure(
                alive=True,
                level=level,
                score=score_ppm / _PPM,
                admit_ratio=admit_ppm / _PPM,
                oldest_age_s=oldest_age_ns / 1e9,
                time_to_full_s=math.inf if time_to_full_ns == _NEVER else time_to_full_ns / 1e9,
                retry_after_s=retry_after_ms / 1e3,
                load=load_ppm / _PPM,
                cpu=cpu_ppm / _PPM,
                pid=pid,
                worst=worst,
                concurrency_limit=concurrency_limit or None,
                max_queue_wait_s=max_queue_wait_ns / 1e9 if max_queue_wait_ns else None,
            )
    return 0.0, _PPM, Pressure()


def _entry(kind, flags, id, depth, limit, standing_delay_ns, p99_ns, oldest_age_ns, score_ppm, arrivals, departures, losses):
    return Entry(
        kind=KINDS[kind] if kind < len(KINDS) else "unknown",
        flags=flags,
        id=id,
        depth=depth,
        limit=limit if flags & _HAS_LIMIT else None,
        standing_delay_s=standing_delay_ns / 1e9,
        p99_s=p99_ns / 1e9 if flags & _HAS_P99 else None,
        oldest_age_s=oldest_age_ns / 1e9,
        score=score_ppm / _PPM,
        arrivals_per_s=arrivals if flags & _HAS_RATES else None,
        departures_per_s=departures if flags & _HAS_RATES else None,
        losses=losses,
    )


def _json(fields: dict) -> dict:
    """Converts times to the units of the page: whole nanoseconds, and milliseconds for retry_after."""
    named = {}
    for name, value in fields.items():
        if name == "retry_after_s":
            named["retry_after_ms"] = round(value * 1e3)
        elif name.endswith("_s") and not name.endswith("_per_s"):
            named[name[:-1] + "ns"] = None if value in (None, math.inf) else round(value * 1e9)
        elif name != "flags":
            named[name] = value
    return named


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: tailback_page.py PATH", file=sys.stderr)
        return 2
    page = open(sys.argv[1])
    line = _json(page.pressure()._asdict())
    line["entries"] = [_json(entry._asdict()) for entry in page.entries()]
    print(json.dumps(line, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
