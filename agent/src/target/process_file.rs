//! Reads files of /proc whose content comes from the memory of their process (`cmdline`, `environ`), or for which the kernel
//! locks that memory (`maps`), and other files whose names a process chooses.
//!
//! The process influences how long this takes: a thread that waits for a page can hold the lock, and a file system may not answer.
//! So a separate thread reads. A read that takes too long is abandoned together with its thread. Until it ends, and for at least
//! [`SLOW_FOR`], its process is not read again.

use std::{
    fs::File,
    io::{self, Read as _},
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// Time limit of a read. It takes microseconds, or up to 100 ms for the longest `maps`.
const TIME_LIMIT: Duration = Duration::from_millis(250);
/// Maximum time spent waiting for slow reads in each [`WINDOW`]: half the default time to live of signals, so that slow reads do
/// not make them expire.
const MAX_WAITED: Duration = Duration::from_millis(500);
const WINDOW: Duration = Duration::from_secs(10);
/// A process whose read took too long is not read again for this time, even if that read has ended.
const SLOW_FOR: Duration = Duration::from_secs(5);
/// Maximum number of abandoned reads that have not ended. At this number nothing is read until one of them ends. Bounds the
/// threads.
const MAX_ABANDONED: usize = 8;

static READER: Mutex<Reader> = Mutex::new(Reader::new());

/// Why a file was not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unread {
    /// It cannot be read: the process has ended, or access is denied.
    Failed,
    /// Not in time, or not attempted because of other slow reads. It may be read later.
    Late,
}

/// At most the first `max_bytes` of `/proc/PID/FILE`. `None`: it cannot be read, or not in time.
pub(crate) fn read(pid: u32, file: &str, max_bytes: u64) -> Option<Vec<u8>> {
    try_read(pid, file, max_bytes).ok()
}

/// What `job` reads of a process, under the same limits. `None`: nothing, or not in time.
pub(crate) fn run(
    pid: u32,
    job: impl FnOnce() -> Option<Vec<u8>> + Send + 'static,
) -> Option<Vec<u8>> {
    let mut reader = READER.lock().unwrap_or_else(PoisonError::into_inner);
    reader.run(pid, Box::new(job)).ok()
}

/// Like [`read`], with the reason if it is not read.
pub(super) fn try_read(pid: u32, file: &str, max_bytes: u64) -> Result<Vec<u8>, Unread> {
    let mut reader = READER.lock().unwrap_or_else(PoisonError::into_inner);
    reader.read(pid, format!("/proc/{pid}/{file}").into(), max_bytes)
}

struct Reader {
    worker: Option<Worker>,
    /// Abandoned reads: those that have not ended, and those of the last [`SLOW_FOR`].
    abandoned: Vec<Abandoned>,
    /// Time spent waiting for slow reads since `window_start`.
    waited: Duration,
    window_start: Option<Instant>,
}

/// Reads something; `None`: it cannot be read.
type Job = Box<dyn FnOnce() -> Option<Vec<u8>> + Send>;

/// A thread that does one job after another, until `requests` is dropped.
struct Worker {
    requests: Sender<Job>,
    replies: Receiver<Option<Vec<u8>>>,
}

struct Abandoned {
    pid: u32,
    since: Instant,
    replies: Receiver<Option<Vec<u8>>>,
}

impl Abandoned {
    fn has_ended(&self) -> bool {
        self.replies.try_recv() != Err(TryRecvError::Empty)
    }
}

impl Reader {
    const fn new() -> Self {
        Self {
            worker: None,
            abandoned: Vec::new(),
            waited: Duration::ZERO,
            window_start: None,
        }
    }

    fn read(&mut self, pid: u32, path: PathBuf, max_bytes: u64) -> Result<Vec<u8>, Unread> {
        let job = move || {
            let mut bytes = Vec::new();
            let file = File::open(path).ok()?;
            file.take(max_bytes).read_to_end(&mut bytes).ok()?;
            Some(bytes)
        };
        self.run(pid, Box::new(job))
    }

    fn run(&mut self, pid: u32, job: Job) -> Result<Vec<u8>, Unread> {
        let now = Instant::now();
        self.abandoned
            .retain(|it| !it.has_ended() || now - it.since < SLOW_FOR);
        if self.window_start.is_none_or(|start| now - start >= WINDOW) {
            self.window_start = Some(now);
            self.waited = Duration::ZERO;
        }
        let limit = TIME_LIMIT.min(MAX_WAITED.saturating_sub(self.waited));
        let is_slow = self.abandoned.iter().any(|it| it.pid == pid);
        let stuck = self.abandoned.iter().filter(|it| !it.has_ended());
        if is_slow || limit.is_zero() || stuck.count() >= MAX_ABANDONED {
            return Err(Unread::Late);
        }
        let worker = match self.worker.take() {
            Some(worker) => worker,
            None => Worker::start().map_err(|_| Unread::Failed)?,
        };
        worker.requests.send(job).map_err(|_| Unread::Failed)?;
        if let Ok(bytes) = worker.replies.recv_timeout(limit) {
            self.worker = Some(worker);
            return bytes.ok_or(Unread::Failed);
        }
        self.waited += limit;
        self.abandoned.push(Abandoned {
            pid,
            since: now,
            replies: worker.replies,
        });
        Err(Unread::Late)
    }
}

impl Worker {
    fn start() -> io::Result<Self> {
        let (requests, received) = channel::<Job>();
        let (reply, replies) = channel();
        let serve = move || {
            for job in received {
                if reply.send(job()).is_err() {
                    break;
                }
            }
        };
        let named = thread::Builder::new().name("proc-reader".to_owned());
        named.spawn(serve)?;
        Ok(Self { requests, replies })
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _, path::Path, process};

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    /// A FIFO, whose reader waits for a writer.
    struct Fifo(PathBuf);

    impl Fifo {
        fn new(name: &str) -> Self {
            let name = format!("tailback-{name}-{}", process::id());
            let path = std::env::temp_dir().join(name);
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
            Self(path)
        }

        /// Ends the wait of its reader.
        fn write(&self) {
            let mut fifo = fs::OpenOptions::new().write(true).open(&self.0).unwrap();
            fifo.write_all(b"late").unwrap();
        }
    }

    impl Drop for Fifo {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    fn own(reader: &mut Reader, pid: u32) -> Result<Vec<u8>, Unread> {
        reader.read(pid, Path::new("/proc/self/cmdline").to_owned(), 4)
    }

    #[test]
    fn a_read_that_waits_is_abandoned_and_other_processes_are_still_read() {
        let fifo = Fifo::new("slow");
        let mut reader = Reader::new();
        assert_eq!(own(&mut reader, 1).unwrap().len(), 4);
        let begun = Instant::now();
        assert_eq!(reader.read(2, fifo.0.clone(), 10), Err(Unread::Late));
        assert!(begun.elapsed() >= TIME_LIMIT);
        let begun = Instant::now();
        assert_eq!(own(&mut reader, 2), Err(Unread::Late));
        assert_eq!(own(&mut reader, 1).unwrap().len(), 4);
        assert!(begun.elapsed() < TIME_LIMIT);
        fifo.write();
        let end = Instant::now() + 2 * SLOW_FOR;
        while own(&mut reader, 2).is_err() {
            assert!(Instant::now() < end, "it is never read again");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_number_of_abandoned_reads_is_bounded() {
        let fifo = Fifo::new("slow-many");
        let mut reader = Reader::new();
        for pid in 0..MAX_ABANDONED as u32 {
            reader.waited = Duration::ZERO;
            assert_eq!(reader.read(pid, fifo.0.clone(), 10), Err(Unread::Late));
        }
        reader.waited = Duration::ZERO;
        let begun = Instant::now();
        assert_eq!(own(&mut reader, 99), Err(Unread::Late));
        assert!(begun.elapsed() < TIME_LIMIT);
        assert_eq!(reader.abandoned.len(), MAX_ABANDONED);
        fifo.write();
    }

    #[test]
    fn a_process_whose_read_never_ends_costs_one_thread() {
        let fifo = Fifo::new("slow-forever");
        let mut reader = Reader::new();
        assert_eq!(reader.read(7, fifo.0.clone(), 10), Err(Unread::Late));
        reader.abandoned[0].since -= 2 * SLOW_FOR;
        reader.waited = Duration::ZERO;
        assert_eq!(reader.read(7, fifo.0.clone(), 10), Err(Unread::Late));
        assert_eq!(reader.abandoned.len(), 1);
        assert_eq!(reader.waited, Duration::ZERO);
        fifo.write();
    }

    #[test]
    fn many_slow_processes_delay_the_agent_no_longer_than_the_budget() {
        let fifo = Fifo::new("slow-budget");
        let mut reader = Reader::new();
        let begun = Instant::now();
        for pid in 0..1_000 {
            assert_eq!(reader.read(pid, fifo.0.clone(), 10), Err(Unread::Late));
        }
        // Without the budget it would be minutes.
        assert!(begun.elapsed() < 10 * MAX_WAITED, "{:?}", begun.elapsed());
        fifo.write();
    }

    #[test]
    fn a_file_that_does_not_exist_is_not_read_and_delays_nothing() {
        let mut reader = Reader::new();
        let missing = || Path::new("/proc/self/no-such-file").to_owned();
        for _ in 0..100 {
            assert_eq!(reader.read(1, missing(), 4), Err(Unread::Failed));
        }
        assert!(reader.abandoned.is_empty() && reader.worker.is_some());
    }
}
