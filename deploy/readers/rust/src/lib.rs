//! Reads the page on which Tailback publishes the pressure on a service: `/run/tailback/<service>/page`.
//!
//! Everything **fails open**: if there is no page, or the agent does not renew it within its time to live, there is no pressure
//! and everything is admitted. A page that does not exist yet, or that the agent recreates, is looked for once a second.
//!
//! Threads may share a [`Page`]. A process that forks must open its pages in the children: with a page from before the fork, all
//! children would reject in lockstep, and a lock that another thread held at the fork would stay locked in them for good.
//!
//! ```no_run
//! # let connection = std::net::TcpStream::connect("[::1]:80").unwrap();
//! let page = tailback_page::Page::open("/run/tailback/shop/page");
//! // After a request was read from `connection`. Without the connection: `page.should_admit()`.
//! if !page.should_admit_from(&connection) {
//!     // Respond 503 with `Retry-After: {page.pressure().retry_after_seconds()}`.
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

/// The layout of the page. Little-endian; offsets in bytes; each field is aligned to its size.
pub mod layout {
    /// The first 8 bytes.
    pub const MAGIC: [u8; 8] = *b"TAILBACK";
    /// Size of the page, bytes.
    pub const SIZE: usize = 4096;
    /// Size of the page in 64-bit words.
    pub const WORDS: usize = SIZE / 8;
    /// The version that this crate reads.
    pub const VERSION: u32 = 1;
    /// u32.
    pub const VERSION_AT: usize = 8;
    /// u32: number of entries.
    pub const COUNT_AT: usize = 12;
    /// u64, a seqlock: odd while the agent writes.
    pub const SEQ_AT: usize = 16;
    /// u64: when the page was written, CLOCK_BOOTTIME, ns.
    pub const PUBLISHED_AT: usize = 24;
    /// u64: time to live, ns.
    pub const TTL_AT: usize = 32;
    /// u32 each; ratios in parts per million.
    pub const PID_AT: usize = 40;
    pub const LEVEL_AT: usize = 44;
    pub const SCORE_AT: usize = 48;
    pub const ADMIT_AT: usize = 52;
    pub const WORST_AT: usize = 56;
    /// u32, a futex word: incremented whenever the level changes.
    pub const WAKE_AT: usize = 60;
    /// u64, ns.
    pub const OLDEST_AGE_AT: usize = 64;
    /// u64, ns; [`NEVER`] if no queue is filling.
    pub const TIME_TO_FULL_AT: usize = 72;
    /// u32, ms.
    pub const RETRY_AFTER_AT: usize = 80;
    /// u32 each, parts per million.
    pub const LOAD_AT: usize = 84;
    pub const CPU_AT: usize = 88;
    /// u32; 0: no limit.
    pub const CONCURRENCY_LIMIT_AT: usize = 92;
    /// u64, ns; 0: no limit.
    pub const MAX_QUEUE_WAIT_AT: usize = 96;
    pub const NEVER: u64 = u64::MAX;

    /// Entry `i` begins at `ENTRIES_AT + ENTRY * i`.
    pub const ENTRIES_AT: usize = 128;
    pub const ENTRY: usize = 64;
    pub const ENTRIES: usize = (SIZE - ENTRIES_AT) / ENTRY;
    /// Flag: the entry's limit is known.
    pub const HAS_LIMIT: u16 = 1;
    /// Flag: its rates are known.
    pub const HAS_RATES: u16 = 2;
    /// Flag: its 99th percentile is known.
    pub const HAS_P99: u16 = 4;
    /// Flag: work enters the service through this queue, so it counts for the admit ratio.
    pub const INBOUND: u16 = 8;
    /// Names of the queue kinds, by number. A number is never reused.
    pub const KINDS: [&str; 18] = [
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
        "app",
    ];
    /// Names of the levels, by number.
    pub const LEVELS: [&str; 4] = ["ok", "warn", "critical", "full"];
}
use layout::{
    ADMIT_AT, CONCURRENCY_LIMIT_AT, COUNT_AT, CPU_AT, ENTRIES, ENTRIES_AT, ENTRY, LEVEL_AT, LEVELS,
    LOAD_AT, MAGIC, MAX_QUEUE_WAIT_AT, NEVER, OLDEST_AGE_AT, PID_AT, PUBLISHED_AT, RETRY_AFTER_AT,
    SCORE_AT, SEQ_AT, SIZE, TIME_TO_FULL_AT, TTL_AT, VERSION, VERSION_AT, WAKE_AT, WORDS, WORST_AT,
};

/// An admit ratio of 1, in parts per million.
const PPM: u32 = 1_000_000;
/// Most attempts to read the page while the agent writes. A write takes about a microsecond.
const MAX_READ_ATTEMPTS: u32 = 1_000;
/// Time between attempts to open a page that does not exist, ns.
const REOPEN_INTERVAL_NS: u64 = 1_000_000_000;

/// The pressure on a service at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pressure {
    /// An agent publishes for the service. If not, all other fields mean no pressure.
    pub alive: bool,
    /// 0 ok, 1 warn, 2 critical, 3 full.
    pub level: u32,
    /// Saturation of the worst queue: 0 is none, 1 is saturated; may exceed 1.
    pub score: f64,
    /// Fraction of new work to admit, 0 to 1.
    pub admit_ratio: f64,
    /// Age of the oldest item waiting.
    pub oldest_age: Duration,
    /// Forecast of when a queue is full; `None`: no queue is filling.
    pub time_to_full: Option<Duration>,
    /// How long rejected clients should wait before a retry; zero while nothing is rejected.
    pub retry_after: Duration,
    /// Demand as a fraction of capacity: 1 is all of it, 2 is twice that or more.
    pub load: f64,
    /// CPU time used, as a fraction of what the service may use.
    pub cpu: f64,
    /// Most requests to have in service at once, while work is rejected; `None`: nothing is rejected, or it is unknown.
    pub concurrency_limit: Option<u32>,
    /// Under overload, reject work that has waited longer than this; `None`: no overload, or it is unknown.
    pub max_queue_wait: Option<Duration>,
    /// Process id of the service in the agent's /proc.
    pub pid: u32,
    /// Index of the worst queue among the entries.
    pub worst: u32,
    /// Number of entries.
    pub entries: u32,
}

impl Pressure {
    /// No pressure: what applies without a live page.
    pub const NONE: Self = Self {
        alive: false,
        level: 0,
        score: 0.0,
        admit_ratio: 1.0,
        oldest_age: Duration::ZERO,
        time_to_full: None,
        retry_after: Duration::ZERO,
        load: 0.0,
        cpu: 0.0,
        concurrency_limit: None,
        max_queue_wait: None,
        pid: 0,
        worst: 0,
        entries: 0,
    };

    /// The level's name, or "unknown".
    pub fn level_name(&self) -> &'static str {
        let name = LEVELS.get(self.level as usize).copied();
        name.unwrap_or("unknown")
    }

    /// The value of a Retry-After header: whole seconds, rounded up, at least 1.
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
    /// Identifies the queue for as long as it exists.
    pub id: u32,
    pub depth: u32,
    pub limit: Option<u32>,
    /// The minimum delay over the last second or so.
    pub standing_delay: Duration,
    pub p99: Option<Duration>,
    /// Age of the oldest item waiting.
    pub oldest_age: Duration,
    pub score: f64,
    pub arrivals_per_s: Option<u32>,
    pub departures_per_s: Option<u32>,
    /// Work lost since the queue was first observed.
    pub losses: u32,
}

impl Entry {
    /// The kind's name, or "unknown".
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
    /// The `seq` of the last read.
    seq: AtomicU64,
    /// When its result expires, CLOCK_MONOTONIC_COARSE, ns.
    until_ns: AtomicU64,
    /// Its admit ratio, parts per million.
    admit_ppm: AtomicU32,
    /// Its max queue wait, ns; 0: no limit.
    max_queue_wait_ns: AtomicU64,
    last_pressure: Mutex<Option<Cached<Pressure>>>,
    last_entries: Mutex<Option<Cached<Vec<Entry>>>>,
    /// When to try to open the page again, CLOCK_MONOTONIC_COARSE, ns.
    reopen_ns: AtomicU64,
    /// Sum of the admit ratios of all decisions, parts per million; see [`Page::should_admit`].
    credit_ppm: AtomicU64,
    /// All mappings so far: another thread may still be reading an old one.
    #[expect(
        clippy::vec_box,
        reason = "`map` points to one of them: they must not move"
    )]
    maps: Mutex<Vec<Box<Map>>>,
}

/// A value from the page, and how long it is valid.
#[derive(Clone, Debug)]
struct Cached<T> {
    validity: Validity,
    value: T,
}

/// When the page was written, and its time to live.
#[derive(Clone, Copy, Debug)]
struct Validity {
    published_ns: u64,
    ttl_ns: u64,
}

#[derive(Debug)]
struct Map {
    words: *const [AtomicU64; WORDS],
    inode: (u64, u64),
    /// The odd `seq` at which the last read gave up, because the writer was stopped or killed in the middle of a write. The page
    /// is not read again until `seq` changes. Even: no read has given up.
    unsettled: AtomicU64,
}

// SAFETY: the mapping is only read through atomics, and lives as long as the value.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Page {
    /// Opens a page, which need not exist yet. Never fails.
    pub fn open(path: impl AsRef<Path>) -> Self {
        let page = Self {
            path: path.as_ref().to_owned(),
            map: AtomicPtr::new(ptr::null_mut()),
            seq: AtomicU64::new(u64::MAX),
            until_ns: AtomicU64::new(0),
            admit_ppm: AtomicU32::new(PPM),
            max_queue_wait_ns: AtomicU64::new(0),
            last_pressure: Mutex::default(),
            last_entries: Mutex::default(),
            reopen_ns: AtomicU64::new(0),
            // Processes must not reject in lockstep. The pid is hashed with a random key, because in containers it is often 1.
            credit_ppm: AtomicU64::new(
                RandomState::new().hash_one(std::process::id()) % u64::from(PPM),
            ),
            maps: Mutex::new(Vec::new()),
        };
        page.reopen();
        page
    }

    /// Fraction of new work to admit, 0 to 1. Costs one load of shared memory and one read of a coarse clock, no system call.
    pub fn admit_ratio(&self) -> f64 {
        f64::from(self.admit_ppm()) / f64::from(PPM)
    }

    /// Whether to admit the next piece of work, by the admit ratio. Admissions are evenly spaced, not random: at 0.75, three are
    /// admitted, then one is rejected.
    pub fn should_admit(&self) -> bool {
        let admit_ppm = self.admit_ppm();
        if admit_ppm >= PPM {
            return true;
        }
        // One is admitted whenever the sum passes a multiple of one million. At a billion decisions a second it would wrap after
        // five hours, and then shift the phase once.
        let ppm = u64::from(admit_ppm);
        let before = self.credit_ppm.fetch_add(ppm, Ordering::Relaxed);
        before / u64::from(PPM) != before.wrapping_add(ppm) / u64::from(PPM)
    }

    /// Whether to admit a request that was just read from this TCP connection. While the page has a max queue wait, this asks
    /// the kernel how long the request waited; otherwise the admit ratio decides.
    ///
    /// If this process itself terminates TLS on the connection, use [`Page::should_admit`]: the handshake precedes the request,
    /// so no request seems to have waited and everything would be admitted.
    pub fn should_admit_from(&self, connection: &impl AsFd) -> bool {
        match self.max_queue_wait_ns() {
            0 => self.should_admit(),
            _ => self.should_admit_after(waited(connection)),
        }
    }

    /// Whether to admit work that waited `waited` before it was dequeued. If that is `None`, or the page has no max queue wait,
    /// the admit ratio decides.
    pub fn should_admit_after(&self, waited: impl Into<Option<Duration>>) -> bool {
        match (self.max_queue_wait_ns(), waited.into()) {
            (0, _) | (_, None) => self.should_admit(),
            (max_ns, Some(waited)) => waited.as_nanos() <= u128::from(max_ns),
        }
    }

    /// The pressure on the service as a whole.
    pub fn pressure(&self) -> Pressure {
        self.consistent(&self.last_pressure, Map::pressure)
            .unwrap_or(Pressure::NONE)
    }

    /// The queues of the service, worst first; none without a live page.
    pub fn entries(&self) -> Vec<Entry> {
        self.consistent(&self.last_entries, Map::entries)
            .unwrap_or_default()
    }

    /// Reads a consistent value. If the agent stays in the middle of writing (it may have been preempted there), the last value
    /// applies until its time to live is over.
    fn consistent<T: Clone>(
        &self,
        last: &Mutex<Option<Cached<T>>>,
        read: impl Fn(&Map) -> T,
    ) -> Option<T> {
        let read = self.live()?.read(|map| Cached {
            validity: map.validity(),
            value: read(map),
        });
        let cached = match read {
            Some(read) => {
                // A thread that holds the lock now stores a value that is as good.
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
        (cached.validity.left_ns() > 0).then_some(cached.value)
    }

    /// Waits until the level differs from `seen`, at most for `timeout`; returns whether it does.
    pub fn wait_for_level(&self, seen: u32, timeout: Duration) -> bool {
        let began = Instant::now();
        loop {
            let map = self.live();
            // Read before the level, so that the wait notices a change in between.
            let wake = map.map(|map| map.u32(WAKE_AT));
            if self.pressure().level != seen {
                return true;
            }
            let left = timeout.saturating_sub(began.elapsed());
            if left.is_zero() {
                return false;
            }
            // Bounded, because an agent that dies wakes nobody.
            let step = left.min(Duration::from_millis(500));
            match (map, wake) {
                (Some(map), Some(wake)) => map.wait(wake, step),
                _ => std::thread::sleep(step),
            }
        }
    }

    fn admit_ppm(&self) -> u32 {
        if self.is_fresh() || self.renew() {
            return self.admit_ppm.load(Ordering::Relaxed);
        }
        PPM
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

    /// Reads the page after it has changed, or its validity is over; returns whether it is live.
    #[cold]
    fn renew(&self) -> bool {
        let Some(map) = self.live() else {
            return false;
        };
        let read = map.read(|map| {
            let left = map.validity().left_ns();
            let values = (map.u32(ADMIT_AT).min(PPM), map.u64(MAX_QUEUE_WAIT_AT));
            (map.u64(SEQ_AT), left, values)
        });
        let now_ns = coarse_ns();
        match read {
            Some((seq, left, (admit_ppm, max_queue_wait_ns))) if left > 0 => {
                self.admit_ppm.store(admit_ppm, Ordering::Relaxed);
                self.max_queue_wait_ns
                    .store(max_queue_wait_ns, Ordering::Relaxed);
                self.until_ns
                    .store(now_ns.saturating_add(left), Ordering::Relaxed);
                self.seq.store(seq, Ordering::Release);
                true
            }
            // Stale.
            Some(_) => false,
            // Always in the middle of a write: the last values apply until their time to live is over.
            None => now_ns < self.until_ns.load(Ordering::Relaxed),
        }
    }

    /// The newest mapping. If it is stale, tries to map a new page, at most once a second.
    fn live(&self) -> Option<&Map> {
        // SAFETY: mappings live as long as the page.
        let map = unsafe { self.map.load(Ordering::Acquire).as_ref() };
        if let Some(map) = map
            && map.validity().left_ns() > 0
        {
            return Some(map);
        }
        let now_ns = coarse_ns();
        let due = self.reopen_ns.load(Ordering::Relaxed);
        if now_ns >= due
            && self
                .reopen_ns
                .compare_exchange(
                    due,
                    now_ns + REOPEN_INTERVAL_NS,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                )
                .is_ok()
        {
            self.reopen();
        }
        // SAFETY: as above.
        unsafe { self.map.load(Ordering::Acquire).as_ref() }
    }

    /// Maps the page if the path now refers to another file.
    fn reopen(&self) {
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
    /// `None`: there is no valid page, or it is the current one.
    fn of(path: &Path, current: Option<(u64, u64)>) -> Option<Self> {
        use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
        // Opening a FIFO would block until it has a writer.
        const O_NONBLOCK: c_int = 0o4000;
        let mut options = File::options();
        let file = options
            .read(true)
            .custom_flags(O_NONBLOCK)
            .open(path)
            .ok()?;
        let metadata = file.metadata().ok()?;
        let inode = (metadata.dev(), metadata.ino());
        // Reading beyond the end of a mapped file raises SIGBUS.
        if !metadata.is_file() || metadata.len() < SIZE as u64 || Some(inode) == current {
            return None;
        }
        const PROT_READ: c_int = 1;
        const MAP_SHARED: c_int = 1;
        // SAFETY: a new mapping of a file that is at least this long; the result is checked.
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

    /// Retries until no write interrupts a read; `None` if every attempt is interrupted.
    fn read<T>(&self, read: impl Fn(&Self) -> T) -> Option<T> {
        let seq = &self.words()[SEQ_AT / 8];
        let mut before = seq.load(Ordering::Acquire);
        if before == self.unsettled.load(Ordering::Relaxed) && !before.is_multiple_of(2) {
            return None;
        }
        for _ in 0..MAX_READ_ATTEMPTS {
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

    /// Sleeps until the wake word differs from `wake`, at most for `time`.
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
        let time_to_full_ns = self.u64(TIME_TO_FULL_AT);
        Pressure {
            alive: true,
            level: self.u32(LEVEL_AT),
            score: ratio(self.u32(SCORE_AT)),
            admit_ratio: ratio(self.u32(ADMIT_AT)).min(1.0),
            oldest_age: Duration::from_nanos(self.u64(OLDEST_AGE_AT)),
            time_to_full: (time_to_full_ns != NEVER).then(|| Duration::from_nanos(time_to_full_ns)),
            retry_after: Duration::from_millis(u64::from(self.u32(RETRY_AFTER_AT))),
            load: ratio(self.u32(LOAD_AT)),
            cpu: ratio(self.u32(CPU_AT)),
            concurrency_limit: Some(self.u32(CONCURRENCY_LIMIT_AT)).filter(|limit| *limit > 0),
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

    /// How long the page is valid: not at all if it is not a page, or has another version. Checked at each read, because another
    /// agent may take over the file.
    fn validity(&self) -> Validity {
        let is_valid = self.u64(0).to_le_bytes() == MAGIC && self.u32(VERSION_AT) == VERSION;
        Validity {
            published_ns: self.u64(PUBLISHED_AT),
            ttl_ns: if is_valid { self.u64(TTL_AT) } else { 0 },
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

impl Validity {
    /// Remaining time to live, ns. 0 also if the page is from the future: then it was written by another clock, such as that of
    /// another time namespace.
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
        // SAFETY: our own mapping, of this length; nobody refers to it any more.
        unsafe { munmap(self.words.cast_mut().cast(), SIZE) };
    }
}

/// How long ago data last arrived on a TCP connection, by the kernel's clock, to a few milliseconds. Right after a request was read,
/// that is how long it waited. `None` if it is not a TCP connection.
///
/// If this process terminates TLS on the connection, the result is about 0, because the handshake arrived last. A descriptor does
/// not show that.
pub fn waited(connection: &impl AsFd) -> Option<Duration> {
    const IPPROTO_TCP: c_int = 6;
    const TCP_INFO: c_int = 11;
    // Index of tcpi_last_data_recv (ms) in `struct tcp_info`, in u32.
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
    f64::from(ppm) / f64::from(PPM)
}

/// The cheapest clock: up to 10 ms behind.
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

// The C library, which std links anyway, so that this file has no dependency.
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
    fn a_request_waits_since_its_arrival_on_tcp_only() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        // Older than the request: neither the connection's age nor that of the first data counts.
        let mut before = Instant::now();
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(300));
            before = Instant::now();
            client.write_all(b"a request").unwrap();
        }
        let arrived = Instant::now();
        std::thread::sleep(Duration::from_millis(100));
        let (accepted, _) = listener.accept().unwrap();
        let tick = Duration::from_millis(12);
        let least = arrived.elapsed() - tick;
        let waited = waited(&accepted).unwrap();
        let most = before.elapsed() + tick;
        assert!((least..most).contains(&waited), "{waited:?} of {most:?}");
        let (unix, _other) = UnixStream::pair().unwrap();
        assert_eq!(super::waited(&unix), None);
    }

    /// A page written by a test: level critical, one entry without flags.
    struct Written(PathBuf, std::cell::Cell<u64>);

    impl Written {
        fn new(name: &str, ttl: Duration) -> Self {
            let name = format!("tailback-{name}-{}", std::process::id());
            let page = Self(std::env::temp_dir().join(name), std::cell::Cell::new(2));
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
    fn if_the_agent_stalls_in_the_middle_of_a_write_the_last_values_apply_until_their_ttl() {
        // Longer than a busy machine pauses.
        let ttl = Duration::from_secs(3);
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
    fn a_half_written_page_is_not_read_again_until_it_changes() {
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
    fn magic_and_version_are_checked_at_each_read() {
        let written = Written::new("version", LONG);
        written.put(0, b"ANOTHER ");
        let page = Page::open(&written.0);
        let read = || {
            (
                page.pressure().alive,
                page.entries().len(),
                page.admit_ratio(),
            )
        };
        assert_eq!(read(), (false, 0, 1.0));
        written.put(0, &MAGIC);
        assert_eq!(read(), (true, 1, 0.0));
        written.put(VERSION_AT, &(VERSION + 1).to_le_bytes());
        written.put(SEQ_AT, &4u64.to_le_bytes());
        assert_eq!(read(), (false, 0, 1.0));
    }

    #[test]
    fn a_page_from_the_future_is_stale() {
        let written = Written::new("future", LONG);
        written.put(PUBLISHED_AT, &(now_ns(7) + 10_000_000_000u64).to_le_bytes());
        assert_eq!(Page::open(&written.0).pressure(), Pressure::NONE);
    }

    #[test]
    fn a_limit_is_known_only_with_its_flag_and_an_unknown_level_has_no_name() {
        let written = Written::new("words", LONG);
        let page = Page::open(&written.0);
        let read = || (page.entries()[0].limit, page.pressure().level_name());
        assert_eq!(read(), (None, "critical"));
        written.put(ENTRIES_AT + 2, &layout::HAS_LIMIT.to_le_bytes());
        written.put(LEVEL_AT, &4u32.to_le_bytes());
        assert_eq!(read(), (Some(0), "unknown"));
    }

    #[test]
    fn pages_begin_with_different_phases() {
        let phases = [(); 3].map(|()| Page::open("/nonexistent/page").credit_ppm.into_inner());
        assert!(phases.iter().any(|phase| *phase != phases[0]), "{phases:?}");
    }

    impl Written {
        /// Publishes this ratio, which an open reader notices.
        fn put_ratio(&self, admit_ppm: u32) {
            let seq = self.1.get() + 2;
            self.1.set(seq);
            self.put(ADMIT_AT, &admit_ppm.to_le_bytes());
            self.put(SEQ_AT, &seq.to_le_bytes());
        }
    }

    /// Of `count` requests at this ratio, how many may be admitted: the exact share, rounded up or down.
    fn exact_share(count: u64, admit_ppm: u32) -> std::ops::RangeInclusive<u64> {
        let sum = count * u64::from(admit_ppm.min(PPM));
        sum / u64::from(PPM)..=sum.div_ceil(u64::from(PPM))
    }

    #[test]
    fn admissions_are_evenly_spaced() {
        let written = Written::new("even", LONG);
        let page = Page::open(&written.0);
        // A ratio above 1 counts as 1. Each one takes effect at once, and in every window of requests.
        for admit_ppm in [
            0,
            1,
            50_000,
            333_333,
            500_000,
            750_000,
            999_999,
            PPM,
            u32::MAX,
        ] {
            written.put_ratio(admit_ppm);
            let admitted: Vec<bool> = (0..10_000).map(|_| page.should_admit()).collect();
            for window in [1, 2, 3, 7, 100, 10_000] {
                let expected = exact_share(window as u64, admit_ppm);
                for requests in admitted.windows(window) {
                    let passed = requests.iter().filter(|passed| **passed).count() as u64;
                    assert!(
                        expected.contains(&passed),
                        "{passed} of {window} at {admit_ppm}"
                    );
                }
            }
        }
    }

    #[test]
    fn threads_share_the_ratio_evenly() {
        let written = Written::new("threads", LONG);
        written.put_ratio(300_001);
        let page = Page::open(&written.0);
        let passed: u64 = std::thread::scope(|scope| {
            let count = || (0..25_000).filter(|_| page.should_admit()).count() as u64;
            let threads = [(); 4].map(|()| scope.spawn(count));
            threads.map(|thread| thread.join().unwrap()).iter().sum()
        });
        let expected = exact_share(100_000, 300_001);
        assert!(expected.contains(&passed), "{passed} of 100,000");
    }

    #[test]
    fn without_a_page_everything_is_admitted_whatever_it_waited() {
        let page = Page::open("/nonexistent/page");
        let (unix, _other) = UnixStream::pair().unwrap();
        assert!(page.should_admit() && page.should_admit_from(&unix));
        assert!(page.should_admit_after(Duration::from_secs(3600)));
        assert_eq!(page.pressure(), Pressure::NONE);
    }
}
