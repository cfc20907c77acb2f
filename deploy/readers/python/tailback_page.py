"""How full are this service's queues, and how much new work should it take?

    import tailback_page

    page = tailback_page.open("/run/tailback/shop/page")  # fine if it is not there yet
    if not page.should_admit_from(connection):            # or should_admit(): less than a microsecond
        return 503, {"Retry-After": page.pressure().retry_after_header}

Tailback writes one page of memory about ten times a second; this module maps it and reads it. Everything fails open: no
page, a page of a dead agent, a page that makes no sense are "no pressure": level 0, admit 1.

A Page may be shared by threads, and by the children of a fork. Python 3.9 or later, nothing else.

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

KINDS = (
    "syn accept recv udp unix pipe inflight workers eventloop runqueue lock disk memory downstream send fd uring".split()
)
LEVELS = ("ok", "warn", "critical", "full")


class Pressure(NamedTuple):
    """The service as a whole. As it is here: no pressure."""

    alive: bool = False  # False: no agent speaks for this service now
    level: int = 0  # 0 ok, 1 warn, 2 critical, 3 full
    score: float = 0.0  # of its fullest queue: 0 empty, 1 full; may pass 1
    admit: float = 1.0  # share of new work to take, 0 to 1
    oldest_wait_s: float = 0.0  # age of the oldest work that waits
    time_to_full_s: float = math.inf  # forecast; inf: never
    retry_after_s: float = 0.0  # when refused clients should come again
    load: float = 0.0  # what is asked of the service, of what it can do: 1 is all of it, 2 twice that or more
    cpu: float = 0.0  # CPU time, of what the service may use
    pid: int = 0  # of the service, as the agent's /proc numbers it
    worst: int = 0  # index of the fullest queue among the entries
    concurrency: Optional[int] = None  # so many requests at once keep the service busy; None: no limit
    max_wait_s: Optional[float] = None  # refuse what waited for longer before it was taken; None: no limit

    @property
    def level_name(self) -> str:
        return LEVELS[self.level] if self.level < len(LEVELS) else "unknown"

    @property
    def retry_after_header(self) -> str:
        """For the Retry-After of a refusal: whole seconds, rounded up, at least 1."""
        return str(max(1, math.ceil(self.retry_after_s)))


class Entry(NamedTuple):
    """One queue. None is what is not known."""

    kind: str  # one of KINDS, or "unknown"
    flags: int
    id: int  # names the queue as long as it is there
    depth: int
    limit: Optional[int]
    min_delay_s: float  # the delay that stands: no less for about a second
    p99_s: Optional[float]
    head_age_s: float  # of what has waited longest
    score: float
    arrivals_per_s: Optional[int]
    departures_per_s: Optional[int]
    losses: int  # since the queue is watched


_SIZE = 4096
_SEQ = 2  # word of the page; odd while the agent writes
_TRIES = 100
_NEVER = 2**64 - 1
_PPM = 1_000_000
_HAS_LIMIT = 1
_HAS_RATES = 2
_HAS_P99 = 4

# magic, version, entries, seq, published_ns, ttl_ns, pid, level, score_ppm, admit_ppm, worst, wake, oldest_age_ns,
# time_to_full_ns, retry_after_ms, load_ppm, cpu_ppm, concurrency, max_queue_wait_ns
_HEADER = struct.Struct("<8sIIQQQIIIIIIQQIIIIQ")
# kind, flags, id, depth, limit, standing_delay_ns, p99_ns, oldest_age_ns, score_ppm, arrivals, departures, losses
_ENTRY = struct.Struct("<HHIIIQQQIIII8x")
# Of struct tcp_info: tcpi_last_data_recv, ms.
_TCP_INFO = struct.Struct("<52xI")
_ENTRIES_AT = 128
_ENTRIES_MAX = 62
assert _HEADER.size == 104 and _ENTRY.size == 64

_monotonic = time.monotonic


def open(path: "str | os.PathLike[str]") -> "Page":
    """Never fails: a page that is not there is looked for again, at most once a second."""
    return Page(path)


def waited_s(connection: "socket.socket | int | None") -> Optional[float]:
    """For how long what came last on a TCP connection is there, by the kernel's clock, to a few milliseconds.

    Asked when a request was read, that is how long it waited for it. None for what is no TCP connection, and for an SSLSocket:
    with TLS, the handshake came last. A bare descriptor does not tell that this process speaks TLS on it: it gives about 0.
    """
    try:
        if isinstance(connection, int):
            # SOCK_NONBLOCK: Python leaves the connection's own mode alone, whatever the default timeout is.
            kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
            borrowed = socket.socket(socket.AF_INET, kind, 0, fileno=connection)
            try:
                return waited_s(borrowed)
            finally:
                borrowed.detach()  # not ours to close
        if hasattr(connection, "cipher"):
            return None  # TLS: the handshake came last, and the request did not wait before it
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        return _TCP_INFO.unpack(info)[0] / 1e3
    except (AttributeError, OSError, ValueError, struct.error):
        return None


def since_s(started: "str | None") -> Optional[float]:
    """For how long a request is under way, by the X-Request-Start that a proxy on this machine gave it. Others can forge it.

    Seconds (nginx: "t=${msec}"), milliseconds, or microseconds (HAProxy: t=%[date(0,us)]) since 1970, told by their size.
    None for what is no such time.
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
    """What is known of the page. Never changed, only replaced as a whole, so that threads need no lock to read it."""

    words: memoryview  # the mapped page as 64-bit words
    file: Optional[tuple]  # device and inode of the file
    seq: int  # of the page, when the rest of this was read
    look_again: float  # monotonic: though seq is the same, the page may be stale by then
    copy: bytes  # the last good copy of the page
    admit_ppm: int
    pressure: Pressure


# Stands in for a page that is not there: the fast path need not ask whether there is one.
_NO_VIEW = _View(memoryview(bytes(_SIZE)).cast("Q"), None, 0, -math.inf, bytes(_SIZE), _PPM, Pressure())


class Page:
    """The page of one target."""

    def __init__(self, path: "str | os.PathLike[str]"):
        self._path = path
        self._open_again = -math.inf
        self._view = _NO_VIEW
        self._own_phase()
        self._look()

    def admit(self) -> float:
        """Share of new work to take, 0 to 1."""
        return self._look().pressure.admit

    def should_admit(self) -> bool:
        """Whether to take this piece of work, by the share.

        Not by lot: at a share of 0.75, three are taken and one is refused, in turn, so what is taken comes evenly spaced.
        """
        return self._by_share(self._look())

    def should_admit_from(self, connection: "socket.socket | int | None") -> bool:
        """Whether to take a request that was read from this TCP connection (a socket, or its descriptor).

        By how long it waited before it is taken, which the kernel is asked for while the page says how long that may be.
        Else, and for an SSLSocket, by the share. Where this process itself speaks TLS and there is only the descriptor,
        should_admit(): the handshake came just before the request, and everything would be admitted.
        """
        view = self._look()
        if view.pressure.max_wait_s is None:
            return self._by_share(view)
        return self._by_wait(view, waited_s(connection))

    def should_admit_after(self, waited_s: Optional[float]) -> bool:
        """Whether to take a piece of work that waited for so long: by that, while the page says how long it may be.

        Else, and where it is None, by the share.
        """
        return self._by_wait(self._look(), waited_s)

    def pressure(self) -> Pressure:
        return self._look().pressure

    def entries(self) -> "list[Entry]":
        """The queues, the fullest first; none without a live page."""
        view = self._look()
        if not view.pressure.alive:
            return []
        count = min(_HEADER.unpack_from(view.copy)[2], _ENTRIES_MAX)
        return [_entry(*_ENTRY.unpack_from(view.copy, _ENTRIES_AT + _ENTRY.size * i)) for i in range(count)]

    def _by_wait(self, view: _View, waited_s: Optional[float]) -> bool:
        most_s = view.pressure.max_wait_s
        if most_s is None or waited_s is None or not waited_s >= 0:
            return self._by_share(view)
        return waited_s <= most_s

    def _by_share(self, view: _View) -> bool:
        ppm = view.admit_ppm
        if ppm == _PPM:
            return True
        if self._pid != os.getpid():
            self._own_phase()
        with self._lock:
            self._diffused_ppm += ppm
            if self._diffused_ppm < _PPM:
                return False
            self._diffused_ppm -= _PPM
            return True

    def _own_phase(self) -> None:
        """A random phase, so that many workers do not refuse in step; and a lock that no thread held during a fork.

        Asked by pid and not left to os.register_at_fork(): uWSGI forks without telling Python.
        """
        self._lock = threading.Lock()
        self._diffused_ppm = random.SystemRandom().randrange(_PPM)
        self._pid = os.getpid()

    def _look(self) -> _View:
        view = self._view
        if view.words[_SEQ] == view.seq and _monotonic() < view.look_again:
            return view
        # Threads that come here together do the same work, and each leaves a view that is whole.
        now = _monotonic()
        view = _read(view, now)
        if not view.pressure.alive:
            if now >= self._open_again:
                self._open_again = now + 1
                view = _read(_mapped(self._path, view), now)
            if not view.pressure.alive:
                view = view._replace(look_again=self._open_again)
        self._view = view
        return view


def _mapped(path: "str | os.PathLike[str]", view: _View) -> _View:
    """Maps what the path names now, if that is another file than before."""
    try:
        found = os.stat(path)
        if (found.st_dev, found.st_ino) == view.file:
            return view
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # never hang on a FIFO
        try:
            found = os.fstat(fd)
            # Memory mapped beyond the end of a file is a SIGBUS to whoever reads it.
            if not stat.S_ISREG(found.st_mode) or found.st_size < _SIZE:
                return _NO_VIEW
            words = memoryview(mmap.mmap(fd, _SIZE, mmap.MAP_SHARED, mmap.PROT_READ)).cast("Q")
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return _NO_VIEW
    # 1 is not the seq of any whole page: read it.
    return _NO_VIEW._replace(words=words, file=(found.st_dev, found.st_ino), seq=1)


def _read(view: _View, now: float) -> _View:
    """Reads the page if it changed. One that does not come to rest leaves the last good copy, while that is fresh."""
    seq, copy = view.words[_SEQ], view.copy
    if seq != view.seq:
        for _ in range(_TRIES):
            # Each look at the clock holds a load barrier (the kernel's vDSO reads a seqlock itself), which Python has no
            # word for and a processor that reorders loads needs.
            seq = view.words[_SEQ]
            time.monotonic_ns()
            candidate = view.words.tobytes()
            time.monotonic_ns()
            if seq % 2 == 0 and view.words[_SEQ] == seq:
                copy = candidate
                break
    fresh_for_s, admit_ppm, pressure = _decode(copy)
    # The seq of a failed try is kept, too: a page whose writer died is not read again and again.
    return view._replace(
        seq=seq, copy=copy, look_again=now + min(fresh_for_s, 1.0), admit_ppm=admit_ppm, pressure=pressure
    )


def _decode(copy: bytes) -> "tuple[float, int, Pressure]":
    """For how long it may be believed, and what it says."""
    (magic, version, _, _, published_ns, ttl_ns, pid, level, score_ppm, admit_ppm, worst, _, oldest_age_ns,
     time_to_full_ns, retry_after_ms, load_ppm, cpu_ppm, concurrency, max_queue_wait_ns) = _HEADER.unpack_from(copy)  # fmt: skip
    if magic == b"TAILBACK" and version == 1:
        age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - published_ns
        # A time yet to come is that of another clock (a time namespace, say), and as bad as a stale one.
        if 0 <= age_ns < ttl_ns:
            admit_ppm = min(admit_ppm, _PPM)
            return (ttl_ns - age_ns) / 1e9, admit_ppm, Pressure(
                alive=True,
                level=level,
                score=score_ppm / _PPM,
                admit=admit_ppm / _PPM,
                oldest_wait_s=oldest_age_ns / 1e9,
                time_to_full_s=math.inf if time_to_full_ns == _NEVER else time_to_full_ns / 1e9,
                retry_after_s=retry_after_ms / 1e3,
                load=load_ppm / _PPM,
                cpu=cpu_ppm / _PPM,
                pid=pid,
                worst=worst,
                concurrency=concurrency or None,
                max_wait_s=max_queue_wait_ns / 1e9 if max_queue_wait_ns else None,
            )
    return 0.0, _PPM, Pressure()


def _entry(kind, flags, id, depth, limit, standing_delay_ns, p99_ns, oldest_age_ns, score_ppm, arrivals, departures, losses):
    return Entry(
        kind=KINDS[kind] if kind < len(KINDS) else "unknown",
        flags=flags,
        id=id,
        depth=depth,
        limit=limit if flags & _HAS_LIMIT else None,
        min_delay_s=standing_delay_ns / 1e9,
        p99_s=p99_ns / 1e9 if flags & _HAS_P99 else None,
        head_age_s=oldest_age_ns / 1e9,
        score=score_ppm / _PPM,
        arrivals_per_s=arrivals if flags & _HAS_RATES else None,
        departures_per_s=departures if flags & _HAS_RATES else None,
        losses=losses,
    )


def _json(fields: dict) -> dict:
    """Times in the units of the page: whole nanoseconds, and milliseconds for retry_after."""
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
