//! Reads the page on which Tailback publishes the pressure on a service: `/run/tailback/<target>/page`.
//!
//! Everything fails **open**: while there is no page, or the agent does not renew it within the time to live that it names,
//! there is no pressure and everything is admitted. A page that is not there yet, or that was made anew, is looked for again
//! once a second.
//!
//! Threads may share a [`Page`]. A process that forks opens its pages in the children: with one from before they would all turn
//! away in step, and a lock that another thread held then is held in them for good.
//!
//! ```no_run
//! # let connection = std::net::TcpStream::connect("[::1]:80").unwrap();
//! let page = tailback_page::Page::open("/run/tailback/shop/page");
//! // A request that was read from this connection. Where that is not at hand: `page.should_admit()`.
//! if !page.should_admit_from(&connection) {
//!     // 503, with `Retry-After: {}` and page.pressure().retry_after
//! }
//! ```

use std::{
    collections::hash_map::RandomState,
    ffi::{c_int, c_long, c_void},
    fs::File,
    hash::BuildHasher as _,
    os::fd::{AsFd, AsRawFd as _},
    path::{Path, PathBuf},
    ptr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, fence},
    },
    time::{Duration, Instant},
};

/// Where what stands on the page. Little-endian; offsets in bytes, each field at a multiple of its size.
pub mod layout {
    /// The first 8 bytes.
    pub const MAGIC: [u8; 8] = *b"TAILBACK";
    /// Size of the page, and of the same in 64-bit words.
    pub const SIZE: usize = 4096;
    pub const WORDS: usize = SIZE / 8;
    /// u32 each.
    pub const VERSION: u32 = 1;
    pub const VERSION_AT: usize = 8;
    pub const COUNT_AT: usize = 12;
    /// u64: odd while the page is written.
    pub const SEQ_AT: usize = 16;
    /// u64, CLOCK_BOOTTIME and a duration, ns.
    pub const PUBLISHED_AT: usize = 24;
    pub const TTL_AT: usize = 32;
    /// u32 each. Ratios in millionths.
    pub const PID_AT: usize = 40;
    pub const LEVEL_AT: usize = 44;
    pub const SCORE_AT: usize = 48;
    pub const ADMIT_AT: usize = 52;
    pub const WORST_AT: usize = 56;
    /// A futex word, raised whenever the level changes.
    pub const WAKE_AT: usize = 60;
    /// u64, ns; the second is [`NEVER`] when no queue is filling.
    pub const OLDEST_AGE_AT: usize = 64;
    pub const TIME_TO_FULL_AT: usize = 72;
    /// u32, ms.
    pub const RETRY_AFTER_AT: usize = 80;
    pub const LOAD_AT: usize = 84;
    pub const CPU_AT: usize = 88;
    /// u32, 0: no limit.
    pub const CONCURRENCY_LIMIT_AT: usize = 92;
    /// u64, ns, 0: no limit.
    pub const MAX_QUEUE_WAIT_AT: usize = 96;
    pub const NEVER: u64 = u64::MAX;

    /// Entry `i` begins at `ENTRIES_AT + ENTRY * i`.
    pub const ENTRIES_AT: usize = 128;
    pub const ENTRY: usize = 64;
    pub const ENTRIES: usize = (SIZE - ENTRIES_AT) / ENTRY;
    /// The entry's limit, its rates, its 99th percentile are known; its queue takes work in, so that `admit` heeds it.
    pub const HAS_LIMIT: u16 = 1;
    pub const HAS_RATES: u16 = 2;
    pub const HAS_P99: u16 = 4;
    pub const TAKES_WORK_IN: u16 = 8;
    /// The names of the kinds, by number.
    pub const KINDS: [&str; 17] = [
        "syn",
        "accept",
        "recv",
        "udp",
        "unix",
        "pipe",
        "inflight",
        "workers",
        "eventloop",
        "runqueue",
        "lock",
        "disk",
        "memory",
        "downstream",
        "send",
        "fd",
        "uring",
    ];
    /// The names of the levels, by number.
    pub const LEVELS: [&str; 4] = ["ok", "warn", "critical", "full"];
}
use layout::{
    ADMIT_AT, CONCURRENCY_LIMIT_AT, COUNT_AT, CPU_AT, ENTRIES, ENTRIES_AT, ENTRY, LEVEL_AT, LEVELS,
    LOAD_AT, MAGIC, MAX_QUEUE_WAIT_AT, NEVER, OLDEST_AGE_AT, PID_AT, PUBLISHED_AT, RETRY_AFTER_AT,
    SCORE_AT, SEQ_AT, SIZE, TIME_TO_FULL_AT, TTL_AT, VERSION, VERSION_AT, WAKE_AT, WORDS, WORST_AT,
};

/// Everything is admitted: in millionths.
const ALL: u32 = 1_000_000;
/// Tries to read while the page is written; writing takes a microsecond.
const TRIES: u32 = 1_000;
/// A page that is not there is looked for this often.
const LOOK_AGAIN_NS: u64 = 1_000_000_000;

/// The pressure on a service at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pressure {
    /// The agent publishes; else all is as under no pressure.
    pub alive: bool,
    /// 0 ok, 1 warn, 2 critical, 3 full.
    pub level: u32,
    /// 0 to 1, may pass 1: how saturated the worst queue is.
    pub score: f64,
    /// Share of new work to admit, 0 to 1.
    pub admit: f64,
    /// The age of the oldest work that nobody has taken yet.
    pub oldest_age: Duration,
    /// `None`: no queue is filling.
    pub time_to_full: Option<Duration>,
    /// What to tell those who are turned away; zero when nobody is to be.
    pub retry_after: Duration,
    /// What is asked of the service, of what it can do: 1 is all of it, 2 twice that or more.
    pub load: f64,
    /// CPU time, of what the service may use.
    pub cpu: f64,
    /// So many requests at once keep the service busy, while work is to be turned away; `None`: nothing is, or it is not known.
    pub concurrency: Option<u32>,
    /// Work that has waited for longer is to be turned away, while there is too much; `None`: none is, or it is not known.
    pub max_queue_wait: Option<Duration>,
    /// Of the service, as the agent's /proc numbers it.
    pub pid: u32,
    /// The worst of the entries.
    pub worst: u32,
    /// How many entries there are.
    pub entries: u32,
}

impl Pressure {
    /// What holds while nobody says anything else.
    pub const NONE: Self = Self {
        alive: false,
        level: 0,
        score: 0.0,
        admit: 1.0,
        oldest_age: Duration::ZERO,
        time_to_full: None,
        retry_after: Duration::ZERO,
        load: 0.0,
        cpu: 0.0,
        concurrency: None,
        max_queue_wait: None,
        pid: 0,
        worst: 0,
        entries: 0,
    };

    /// The word for the level.
    pub fn level_name(&self) -> &'static str {
        let name = LEVELS.get(self.level as usize).copied();
        name.unwrap_or("unknown")
    }

    /// For an HTTP header: whole seconds, rounded up, and one at least.
    pub fn retry_after_seconds(&self) -> u64 {
        (self.retry_after.as_millis().div_ceil(1_000) as u64).max(1)
    }
}

/// One queue of the service.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry {
    /// See [`layout::KINDS`].
    pub kind: u16,
    pub flags: u16,
    /// Names the queue for as long as it is there.
    pub id: u32,
    pub depth: u32,
    pub limit: Option<u32>,
    /// The delay that stands: no less for about a second.
    pub standing_delay: Duration,
    pub p99: Option<Duration>,
    /// The age of what has waited longest.
    pub oldest_age: Duration,
    pub score: f64,
    pub arrivals_per_s: Option<u32>,
    pub departures_per_s: Option<u32>,
    /// Since the queue is watched.
    pub losses: u32,
}

impl Entry {
    /// The word for the kind.
    pub fn kind_name(&self) -> &'static str {
        let name = layout::KINDS.get(usize::from(self.kind)).copied();
        name.unwrap_or("unknown")
    }
}

/// The page of one service. Threads may share it.
#[derive(Debug)]
pub struct Page {
    path: PathBuf,
    /// The newest mapping, or null.
    map: AtomicPtr<Map>,
    /// What was read last: the `seq` it was read at, until when it holds (CLOCK_MONOTONIC_COARSE, ns), and what it said.
    seq: AtomicU64,
    until_ns: AtomicU64,
    admit: AtomicU32,
    /// The longest that work may have waited, ns; 0: no limit.
    max_queue_wait_ns: AtomicU64,
    last_pressure: Mutex<Option<Lasting<Pressure>>>,
    last_entries: Mutex<Option<Lasting<Vec<Entry>>>>,
    /// Not before this time is the page looked for again.
    next_look_ns: AtomicU64,
    /// What is owed to work that is turned away, in millionths: see [`Page::should_admit`].
    phase: AtomicU32,
    /// All mappings there ever were: one may still be read.
    #[expect(
        clippy::vec_box,
        reason = "`map` points to one of them: they must not move"
    )]
    maps: Mutex<Vec<Box<Map>>>,
}

/// What the page said, and for how long that holds.
#[derive(Clone, Debug)]
struct Lasting<T> {
    term: Term,
    what: T,
}

/// When the page was published, and how long that holds, ns.
#[derive(Clone, Copy, Debug)]
struct Term {
    published_ns: u64,
    ttl_ns: u64,
}

#[derive(Debug)]
struct Map {
    words: *const [AtomicU64; WORDS],
    inode: (u64, u64),
    /// The odd `seq` at which the page did not come to rest: its writer was stopped or killed there, and until somebody goes on, it
    /// is not tried again. Even: it came to rest.
    unsettled: AtomicU64,
}

// SAFETY: the mapping is read through atomics alone, and lives as long as the value.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Page {
    /// Of a page that need not be there yet.
    pub fn open(path: impl AsRef<Path>) -> Self {
        let page = Self {
            path: path.as_ref().to_owned(),
            map: AtomicPtr::new(ptr::null_mut()),
            seq: AtomicU64::new(u64::MAX),
            until_ns: AtomicU64::new(0),
            admit: AtomicU32::new(ALL),
            max_queue_wait_ns: AtomicU64::new(0),
            last_pressure: Mutex::default(),
            last_entries: Mutex::default(),
            next_look_ns: AtomicU64::new(0),
            // Many processes must not turn away in step: those of one parent differ by their pid, those of containers, where it is
            // often 1, by chance.
            phase: AtomicU32::new(
                (RandomState::new().hash_one(std::process::id()) % u64::from(ALL)) as u32,
            ),
            maps: Mutex::new(Vec::new()),
        };
        page.look_for();
        page
    }

    /// The share of new work to admit, 0 to 1. A load of shared memory and of a coarse clock: no system call.
    pub fn admit(&self) -> f64 {
        f64::from(self.admit_ppm()) / f64::from(ALL)
    }

    /// Whether to admit the next piece of work. Of all that ask, the share [`Page::admit`] is, evenly spaced.
    pub fn should_admit(&self) -> bool {
        let admit = self.admit_ppm();
        if admit >= ALL {
            return true;
        }
        let before = self.phase.fetch_add(admit, Ordering::Relaxed);
        // The sum wraps at 2^32, which shifts the phase once in thousands of requests.
        before / ALL != before.wrapping_add(admit) / ALL
    }

    /// Whether to take a request that was read from this TCP connection: by how long it waited before, which the kernel is asked
    /// for while the page says how long that may be. Else by the share.
    ///
    /// Not where this process itself speaks TLS on the connection: the handshake came just before the request, and everything
    /// would be admitted. There, [`Page::should_admit`].
    pub fn should_admit_from(&self, connection: &impl AsFd) -> bool {
        match self.max_queue_wait_ns() {
            0 => self.should_admit(),
            _ => self.should_admit_after(waited(connection)),
        }
    }

    /// Whether to take a piece of work that waited for so long before: by that, while the page says how long it may be. Else, and
    /// where it is not known, by the share.
    pub fn should_admit_after(&self, waited: impl Into<Option<Duration>>) -> bool {
        match (self.max_queue_wait_ns(), waited.into()) {
            (0, _) | (_, None) => self.should_admit(),
            (most_ns, Some(waited)) => waited.as_nanos() <= u128::from(most_ns),
        }
    }

    /// All that the head of the page says.
    pub fn pressure(&self) -> Pressure {
        self.whole(&self.last_pressure, Map::pressure)
            .unwrap_or(Pressure::NONE)
    }

    /// The queues of the service, the worst first; none when the agent is gone.
    pub fn entries(&self) -> Vec<Entry> {
        self.whole(&self.last_entries, Map::entries)
            .unwrap_or_default()
    }

    /// What is read of the page as one whole, while it holds. Where the agent was always in the middle of writing (its CPU may
    /// have been taken from it there), what was read last holds for as long as it said.
    fn whole<T: Clone>(
        &self,
        last: &Mutex<Option<Lasting<T>>>,
        read: impl Fn(&Map) -> T,
    ) -> Option<T> {
        let read = self.live()?.read(|map| Lasting {
            term: map.term(),
            what: read(map),
        });
        let lasting = match read {
            Some(read) => {
                // Whoever holds it just now keeps one that is as good.
                if let Ok(mut last) = last.try_lock() {
                    *last = Some(read.clone());
                }
                read
            }
            None => last
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone()?,
        };
        (lasting.term.left_ns() > 0).then_some(lasting.what)
    }

    /// Waits until the level is another one than `seen`, or for so long; answers whether it is.
    pub fn wait_for_level(&self, seen: u32, timeout: Duration) -> bool {
        let began = Instant::now();
        loop {
            let map = self.live();
            // Before the level: a change in between is seen by the wait.
            let wake = map.map(|map| map.u32(WAKE_AT));
            if self.pressure().level != seen {
                return true;
            }
            let left = timeout.saturating_sub(began.elapsed());
            if left.is_zero() {
                return false;
            }
            // An agent that dies wakes nobody.
            let step = left.min(Duration::from_millis(500));
            match (map, wake) {
                (Some(map), Some(wake)) => map.wait(wake, step),
                _ => std::thread::sleep(step),
            }
        }
    }

    fn admit_ppm(&self) -> u32 {
        if self.is_fresh() || self.renew() {
            return self.admit.load(Ordering::Relaxed);
        }
        ALL
    }

    fn max_queue_wait_ns(&self) -> u64 {
        if self.is_fresh() || self.renew() {
            return self.max_queue_wait_ns.load(Ordering::Relaxed);
        }
        0
    }

    fn is_fresh(&self) -> bool {
        // SAFETY: mappings live as long as the page.
        let map = unsafe { self.map.load(Ordering::Acquire).as_ref() };
        map.is_some_and(|map| {
            map.words()[SEQ_AT / 8].load(Ordering::Acquire) == self.seq.load(Ordering::Acquire)
                && coarse_ns() < self.until_ns.load(Ordering::Relaxed)
        })
    }

    /// The page says something else than before, or nothing for too long: whether somebody is there.
    #[cold]
    fn renew(&self) -> bool {
        let Some(map) = self.live() else {
            return false;
        };
        let read = map.read(|map| {
            let left = map.term().left_ns();
            let said = (map.u32(ADMIT_AT).min(ALL), map.u64(MAX_QUEUE_WAIT_AT));
            (map.u64(SEQ_AT), left, said)
        });
        let now_ns = coarse_ns();
        match read {
            Some((seq, left, (admit, max_queue_wait_ns))) if left > 0 => {
                self.admit.store(admit, Ordering::Relaxed);
                self.max_queue_wait_ns
                    .store(max_queue_wait_ns, Ordering::Relaxed);
                self.until_ns
                    .store(now_ns.saturating_add(left), Ordering::Relaxed);
                self.seq.store(seq, Ordering::Release);
                true
            }
            // Nobody is there.
            Some(_) => false,
            // It was being written all the time: what it said last holds for as long as it said.
            None => now_ns < self.until_ns.load(Ordering::Relaxed),
        }
    }

    /// The mapping, where the agent publishes; looks for a new one now and then where not.
    fn live(&self) -> Option<&Map> {
        // SAFETY: mappings live as long as the page.
        let map = unsafe { self.map.load(Ordering::Acquire).as_ref() };
        if let Some(map) = map
            && map.term().left_ns() > 0
        {
            return Some(map);
        }
        let now_ns = coarse_ns();
        let due = self.next_look_ns.load(Ordering::Relaxed);
        if now_ns >= due
            && self
                .next_look_ns
                .compare_exchange(
                    due,
                    now_ns + LOOK_AGAIN_NS,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                )
                .is_ok()
        {
            self.look_for();
        }
        // SAFETY: as above.
        unsafe { self.map.load(Ordering::Acquire).as_ref() }
    }

    fn look_for(&self) {
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        let current = maps.last().map(|map| map.inode);
        if let Some(map) = Map::of(&self.path, current) {
            let map = Box::new(map);
            self.map
                .store(ptr::from_ref(&*map).cast_mut(), Ordering::Release);
            maps.push(map);
        }
    }
}

impl Map {
    /// `None`: there is no such page, or it is the one that is mapped.
    fn of(path: &Path, current: Option<(u64, u64)>) -> Option<Self> {
        use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
        // What is no plain file must not hold us up: a FIFO would wait for its writer.
        const O_NONBLOCK: c_int = 0o4000;
        let mut options = File::options();
        let file = options
            .read(true)
            .custom_flags(O_NONBLOCK)
            .open(path)
            .ok()?;
        let metadata = file.metadata().ok()?;
        let inode = (metadata.dev(), metadata.ino());
        // To read beyond the end of a file raises SIGBUS.
        if !metadata.is_file() || metadata.len() < SIZE as u64 || Some(inode) == current {
            return None;
        }
        const PROT_READ: c_int = 1;
        const MAP_SHARED: c_int = 1;
        // SAFETY: a new mapping of a file that is at least as long; the result is checked.
        let address = unsafe {
            mmap(
                ptr::null_mut(),
                SIZE,
                PROT_READ,
                MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if address.addr() == usize::MAX {
            return None;
        }
        Some(Self {
            words: address.cast(),
            inode,
            unsettled: AtomicU64::new(0),
        })
    }

    fn words(&self) -> &[AtomicU64; WORDS] {
        // SAFETY: the mapping is as long as the array and aligned to pages; it is written by another process, through
        // aligned stores, which is what atomics are for.
        unsafe { &*self.words }
    }

    /// Reads until nothing was written meanwhile; `None` where that does not happen.
    fn read<T>(&self, read: impl Fn(&Self) -> T) -> Option<T> {
        let seq = &self.words()[SEQ_AT / 8];
        let mut before = seq.load(Ordering::Acquire);
        if before == self.unsettled.load(Ordering::Relaxed) && !before.is_multiple_of(2) {
            return None;
        }
        for _ in 0..TRIES {
            if before.is_multiple_of(2) {
                let read = read(self);
                fence(Ordering::Acquire);
                if seq.load(Ordering::Relaxed) == before {
                    return Some(read);
                }
            }
            std::hint::spin_loop();
            before = seq.load(Ordering::Acquire);
        }
        self.unsettled.store(before, Ordering::Relaxed);
        None
    }

    /// Sleeps until the word for the level is raised, or for so long.
    fn wait(&self, wake: u32, time: Duration) {
        let time = Timespec {
            seconds: time.as_secs() as i64,
            nanoseconds: i64::from(time.subsec_nanos()),
        };
        let word = self.words.cast::<u8>().wrapping_add(WAKE_AT);
        // SAFETY: FUTEX_WAIT (0) reads a word of the live mapping and a time that outlives the call.
        unsafe { syscall(SYS_FUTEX, word, 0, wake, &raw const time, 0, 0) };
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le(self.words()[at / 8].load(Ordering::Relaxed))
    }

    fn u32(&self, at: usize) -> u32 {
        (self.u64(at) >> (at % 8 * 8)) as u32
    }

    fn u16(&self, at: usize) -> u16 {
        (self.u64(at) >> (at % 8 * 8)) as u16
    }

    fn pressure(&self) -> Pressure {
        let never = self.u64(TIME_TO_FULL_AT);
        Pressure {
            alive: true,
            level: self.u32(LEVEL_AT),
            score: ratio(self.u32(SCORE_AT)),
            admit: ratio(self.u32(ADMIT_AT)).min(1.0),
            oldest_age: Duration::from_nanos(self.u64(OLDEST_AGE_AT)),
            time_to_full: (never != NEVER).then(|| Duration::from_nanos(never)),
            retry_after: Duration::from_millis(u64::from(self.u32(RETRY_AFTER_AT))),
            load: ratio(self.u32(LOAD_AT)),
            cpu: ratio(self.u32(CPU_AT)),
            concurrency: Some(self.u32(CONCURRENCY_LIMIT_AT)).filter(|most| *most > 0),
            max_queue_wait: limit(self.u64(MAX_QUEUE_WAIT_AT)),
            pid: self.u32(PID_AT),
            worst: self.u32(WORST_AT),
            entries: self.count() as u32,
        }
    }

    fn entries(&self) -> Vec<Entry> {
        let entries = 0..self.count();
        entries
            .map(|i| self.entry(ENTRIES_AT + ENTRY * i))
            .collect()
    }

    fn count(&self) -> usize {
        (self.u32(COUNT_AT) as usize).min(ENTRIES)
    }

    /// For how long what it says holds: not at all, where this is no page, or one of another version. Another agent may go on with
    /// it, so nothing that was seen of it before tells.
    fn term(&self) -> Term {
        let is_known = self.u64(0).to_le_bytes() == MAGIC && self.u32(VERSION_AT) == VERSION;
        Term {
            published_ns: self.u64(PUBLISHED_AT),
            ttl_ns: if is_known { self.u64(TTL_AT) } else { 0 },
        }
    }

    fn entry(&self, at: usize) -> Entry {
        let flags = self.u16(at + 2);
        let known = |flag: u16, at: usize| (flags & flag != 0).then(|| self.u32(at));
        Entry {
            kind: self.u16(at),
            flags,
            id: self.u32(at + 4),
            depth: self.u32(at + 8),
            limit: known(layout::HAS_LIMIT, at + 12),
            standing_delay: Duration::from_nanos(self.u64(at + 16)),
            p99: (flags & layout::HAS_P99 != 0).then(|| Duration::from_nanos(self.u64(at + 24))),
            oldest_age: Duration::from_nanos(self.u64(at + 32)),
            score: ratio(self.u32(at + 40)),
            arrivals_per_s: known(layout::HAS_RATES, at + 44),
            departures_per_s: known(layout::HAS_RATES, at + 48),
            losses: self.u32(at + 52),
        }
    }
}

impl Term {
    /// How long that still holds, ns; 0: no longer. A time in the future is one of another clock: nobody may rely on it.
    fn left_ns(self) -> u64 {
        const BOOTTIME: c_int = 7;
        match now_ns(BOOTTIME).checked_sub(self.published_ns) {
            Some(age_ns) => self.ttl_ns.saturating_sub(age_ns),
            None => 0,
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this length; nobody can hold it any more.
        unsafe { munmap(self.words.cast_mut().cast(), SIZE) };
    }
}

/// For how long what came last on a TCP connection is there, by the kernel's clock, to a few milliseconds. Asked when a request was
/// read, that is how long it waited for it. `None` for what is no TCP connection.
///
/// A descriptor does not tell that this process speaks TLS on it. There, the handshake came last, and this is about 0.
pub fn waited(connection: &impl AsFd) -> Option<Duration> {
    const IPPROTO_TCP: c_int = 6;
    const TCP_INFO: c_int = 11;
    // Of `struct tcp_info`: tcpi_last_data_recv, ms.
    const LAST_DATA_AT: usize = 13;
    let mut info = [0_u32; LAST_DATA_AT + 1];
    let mut length = size_of_val(&info) as u32;
    // SAFETY: writes at most `length` bytes, into an array of ours.
    let failed = unsafe {
        getsockopt(
            connection.as_fd().as_raw_fd(),
            IPPROTO_TCP,
            TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    let is_whole = failed == 0 && length as usize == size_of_val(&info);
    is_whole.then(|| Duration::from_millis(u64::from(info[LAST_DATA_AT])))
}

fn limit(ns: u64) -> Option<Duration> {
    (ns > 0).then(|| Duration::from_nanos(ns))
}

fn ratio(ppm: u32) -> f64 {
    f64::from(ppm) / f64::from(ALL)
}

/// A few milliseconds coarse, and for it among the cheapest things to ask.
fn coarse_ns() -> u64 {
    const MONOTONIC_COARSE: c_int = 6;
    now_ns(MONOTONIC_COARSE)
}

fn now_ns(clock: c_int) -> u64 {
    let mut time = Timespec {
        seconds: 0,
        nanoseconds: 0,
    };
    // SAFETY: writes a timespec of ours; these clocks exist since Linux 2.6.39.
    unsafe { clock_gettime(clock, &raw mut time) };
    time.seconds as u64 * 1_000_000_000 + time.nanoseconds as u64
}

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

#[cfg(target_arch = "x86_64")]
const SYS_FUTEX: c_long = 202;
#[cfg(not(target_arch = "x86_64"))]
const SYS_FUTEX: c_long = 98;

// The C library's own, which std links: with these the file needs no dependency.
unsafe extern "C" {
    fn mmap(
        address: *mut c_void,
        length: usize,
        protection: c_int,
        flags: c_int,
        fd: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn munmap(address: *mut c_void, length: usize) -> c_int;
    fn clock_gettime(clock: c_int, time: *mut Timespec) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn getsockopt(
        socket: c_int,
        level: c_int,
        name: c_int,
        value: *mut c_void,
        length: *mut u32,
    ) -> c_int;
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        net::{TcpListener, TcpStream},
        os::unix::net::UnixStream,
    };

    use super::*;

    #[test]
    fn a_request_waits_from_when_it_came_and_on_tcp_only() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        // Longer than it waits: neither the connection's age nor that of the first data counts.
        let mut before = Instant::now();
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(300));
            before = Instant::now();
            client.write_all(b"a request").unwrap();
        }
        let came = Instant::now();
        std::thread::sleep(Duration::from_millis(100));
        let (taken, _) = listener.accept().unwrap();
        let tick = Duration::from_millis(12);
        let least = came.elapsed() - tick;
        let waited = waited(&taken).unwrap();
        let most = before.elapsed() + tick;
        assert!((least..most).contains(&waited), "{waited:?} of {most:?}");
        let (unix, _other) = UnixStream::pair().unwrap();
        assert_eq!(super::waited(&unix), None);
    }

    /// A page that a test writes, of level 2 and one queue without anything known.
    struct Written(PathBuf);

    impl Written {
        fn new(name: &str, ttl: Duration) -> Self {
            let name = format!("tailback-{name}-{}", std::process::id());
            let page = Self(std::env::temp_dir().join(name));
            std::fs::write(&page.0, [0; SIZE]).unwrap();
            page.put(0, &MAGIC);
            page.put(VERSION_AT, &VERSION.to_le_bytes());
            page.put(SEQ_AT, &2u64.to_le_bytes());
            page.put(PUBLISHED_AT, &now_ns(7).to_le_bytes());
            page.put(TTL_AT, &(ttl.as_nanos() as u64).to_le_bytes());
            page.put(LEVEL_AT, &2u32.to_le_bytes());
            page.put(ADMIT_AT, &0u32.to_le_bytes());
            page.put(COUNT_AT, &1u32.to_le_bytes());
            page
        }

        fn put(&self, at: usize, value: &[u8]) {
            let file = File::options().write(true).open(&self.0).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, value, at as u64).unwrap();
        }
    }

    impl Drop for Written {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    const LONG: Duration = Duration::from_secs(100);

    #[test]
    fn while_the_agent_stands_still_in_the_middle_of_writing_what_it_said_last_holds_for_its_time()
    {
        let ttl = Duration::from_secs(1);
        let written = Written::new("still", ttl);
        let page = Page::open(&written.0);
        let (before, entries) = (page.pressure(), page.entries());
        assert!(before.alive && before.level == 2 && entries.len() == 1);
        assert!(!page.should_admit());
        written.put(SEQ_AT, &3u64.to_le_bytes());
        written.put(LEVEL_AT, &0u32.to_le_bytes());
        assert_eq!((page.pressure(), page.entries()), (before, entries));
        assert!(!page.should_admit());
        // The coarse clock is behind by up to 10 ms.
        std::thread::sleep(ttl + Duration::from_millis(20));
        assert_eq!(
            (page.pressure(), page.entries()),
            (Pressure::NONE, Vec::new())
        );
        assert!(page.should_admit());
    }

    #[test]
    fn what_an_agent_left_half_written_is_not_tried_again_until_another_goes_on() {
        let written = Written::new("half", LONG);
        written.put(SEQ_AT, &3u64.to_le_bytes());
        let page = Page::open(&written.0);
        let tried = |page: &Page| page.live().unwrap().unsettled.load(Ordering::Relaxed);
        assert_eq!(tried(&page), 0);
        assert!(page.should_admit() && page.pressure() == Pressure::NONE);
        assert_eq!(tried(&page), 3);
        written.put(SEQ_AT, &4u64.to_le_bytes());
        assert!(!page.should_admit() && page.pressure().alive);
    }

    #[test]
    fn whether_it_is_a_page_of_this_version_is_asked_at_each_read() {
        let written = Written::new("version", LONG);
        written.put(0, b"ANOTHER ");
        let page = Page::open(&written.0);
        let is_told = || (page.pressure().alive, page.entries().len(), page.admit());
        assert_eq!(is_told(), (false, 0, 1.0));
        written.put(0, &MAGIC);
        assert_eq!(is_told(), (true, 1, 0.0));
        written.put(VERSION_AT, &(VERSION + 1).to_le_bytes());
        written.put(SEQ_AT, &4u64.to_le_bytes());
        assert_eq!(is_told(), (false, 0, 1.0));
    }

    #[test]
    fn a_time_to_come_is_that_of_another_clock() {
        let written = Written::new("future", LONG);
        written.put(PUBLISHED_AT, &(now_ns(7) + 10_000_000_000u64).to_le_bytes());
        assert_eq!(Page::open(&written.0).pressure(), Pressure::NONE);
    }

    #[test]
    fn the_flag_tells_whether_a_limit_is_known_and_a_level_beyond_the_last_has_no_name() {
        let written = Written::new("words", LONG);
        let page = Page::open(&written.0);
        let told = || (page.entries()[0].limit, page.pressure().level_name());
        assert_eq!(told(), (None, "critical"));
        written.put(ENTRIES_AT + 2, &layout::HAS_LIMIT.to_le_bytes());
        written.put(LEVEL_AT, &4u32.to_le_bytes());
        assert_eq!(told(), (Some(0), "unknown"));
    }

    #[test]
    fn pages_begin_at_other_places_in_the_turn() {
        let phases = [(); 3].map(|()| Page::open("/nonexistent/page").phase.into_inner());
        assert!(phases.iter().any(|phase| *phase != phases[0]), "{phases:?}");
    }

    #[test]
    fn without_a_page_everything_is_admitted_however_long_it_waited() {
        let page = Page::open("/nonexistent/page");
        let (unix, _other) = UnixStream::pair().unwrap();
        assert!(page.should_admit() && page.should_admit_from(&unix));
        assert!(page.should_admit_after(Duration::from_secs(3600)));
        assert_eq!(page.pressure(), Pressure::NONE);
    }
}
