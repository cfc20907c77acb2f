//! Asks the recognized processes, on a thread of its own: a task per process, so that a slow service delays neither a sample nor
//! another service.
//!
//! A request that is not answered in time stays under way for 30 s, and no second one is sent beside it; then its connection is
//! closed. After three failures, or one refused login, polling of the process is suspended for ten minutes, or until its listeners
//! change.

mod task;

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, Read as _},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use task::{Context, Task, Timing};
use tokio::{sync::watch, task::LocalSet};

pub use super::transport::Endpoint;
use super::{mapping::Clients, own::Own, recognize::Program, table::Preset};
use crate::sample::AppAnswer;

/// Time for an answer. One that takes longer is reported as missing.
pub const TIME_LIMIT: Duration = Duration::from_millis(200);
/// Maximum number of processes that are asked.
pub const MAX_PROCESSES: usize = 64;
/// Maximum number of listeners of a process that are tried. Those that are configured to answer are among the first.
pub const MAX_ENDPOINTS: usize = 8;
/// Maximum number of answers that wait for a sample. A process has one or two.
const MAX_ANSWERS: usize = 4 * MAX_PROCESSES;
/// Maximum number of threads that wait for a file system, on the way to a unix socket or to a password.
const MAX_BLOCKED: usize = MAX_PROCESSES;
/// Longest password, bytes.
const MAX_PASSWORD_BYTES: u64 = 4_096;

/// A process that is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Process {
    pub tgid: u32,
    /// When it started: distinguishes it from a later process with the same pid.
    pub start_ns: u64,
    pub preset: Arc<Preset>,
    pub program: Program,
    /// Where it may be asked, in this order.
    pub endpoints: Vec<Endpoint>,
    /// The highest of its user ids. `None`: unknown.
    pub uid: Option<u32>,
    /// Why it cannot be asked, if it has no endpoint.
    pub unreachable: Option<String>,
    pub is_focused: bool,
}

/// What the user configured for a preset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Login {
    /// User id of the processes and listeners that may receive the password: any process can take the name of a server.
    pub process_user: u32,
    pub user: Option<String>,
    pub password_file: PathBuf,
}

impl Login {
    fn password(&self) -> Result<String> {
        let path = self.password_file.display();
        let mut text = String::new();
        File::open(&self.password_file)
            .and_then(|file| file.take(MAX_PASSWORD_BYTES).read_to_string(&mut text))
            .with_context(|| format!("cannot read the password in {path}"))?;
        Ok(text.trim_end_matches(['\r', '\n']).to_owned())
    }
}

/// What is known about one process, for `doctor`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    pub tgid: u32,
    pub preset: String,
    pub exe: String,
    /// The listener that had the proof.
    pub endpoint: Option<String>,
    pub proof: String,
    pub queues: usize,
    /// Queues beyond the limit, and parts of the answer that were not understood.
    pub left_out: usize,
    pub malformed: usize,
    /// Of the last answer.
    pub took: Duration,
    /// Until the next request.
    pub pace: Duration,
    pub failure: Option<String>,
    /// A request whose answer was too large; it is not repeated.
    pub missing: Option<String>,
    /// The first attempt is over.
    pub is_asked: bool,
}

/// What both threads use.
#[derive(Default)]
struct Shared {
    answers: Mutex<Vec<AppAnswer>>,
    /// By process and preset.
    reports: Mutex<BTreeMap<(u32, String), Report>>,
    /// The clients that take items from their queues, as of the last answer.
    clients: Mutex<BTreeMap<(u32, String), Clients>>,
    own: Arc<Own>,
    has_answers: AtomicBool,
    /// The version of [`Wanted`] whose tasks are running.
    version: AtomicU64,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread. It ends when this is dropped.
pub struct Asker {
    shared: Arc<Shared>,
    processes: watch::Sender<Wanted>,
}

/// Which processes are asked, and how often that has changed.
#[derive(Clone, Default)]
struct Wanted {
    version: u64,
    processes: Vec<Process>,
}

impl fmt::Debug for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Asker").finish_non_exhaustive()
    }
}

impl Asker {
    /// Starts it. `now_ns`: CLOCK_MONOTONIC, which samples use.
    ///
    /// # Errors
    /// If no thread or no event queue can be created.
    pub fn start(logins: BTreeMap<String, Login>, now_ns: fn() -> u64) -> io::Result<Self> {
        Self::with_timing(logins, now_ns, Timing::default())
    }

    fn with_timing(
        logins: BTreeMap<String, Login>,
        now_ns: fn() -> u64,
        timing: Timing,
    ) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let (processes, watched) = watch::channel(Wanted::default());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(MAX_BLOCKED)
            .build()?;
        let context = Context {
            shared: Arc::clone(&shared),
            logins: Arc::new(logins),
            now_ns,
            timing,
        };
        thread::Builder::new()
            .name("app-queues".to_owned())
            .spawn(move || LocalSet::new().block_on(&runtime, supervise(context, watched)))?;
        Ok(Self { shared, processes })
    }

    /// Asks these processes from now on.
    pub fn set_processes(&self, processes: Vec<Process>) {
        self.processes.send_if_modified(|known| {
            let is_new = known.processes != processes;
            if is_new {
                known.processes = processes;
                known.version += 1;
            }
            is_new
        });
    }

    /// The answers since the last call.
    pub fn take(&self) -> Vec<AppAnswer> {
        if !self.shared.has_answers.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        std::mem::take(&mut *lock(&self.shared.answers))
    }

    /// How many processes were asked at least once, of how many.
    pub fn progress(&self) -> (usize, usize) {
        let (version, count) = {
            let wanted = self.processes.borrow();
            (wanted.version, wanted.processes.len().min(MAX_PROCESSES))
        };
        if self.shared.version.load(Ordering::Acquire) != version {
            return (0, count.max(1));
        }
        let reports = lock(&self.shared.reports);
        let asked = reports.values().filter(|report| report.is_asked).count();
        (asked, count)
    }

    pub fn reports(&self) -> Vec<Report> {
        lock(&self.shared.reports).values().cloned().collect()
    }

    /// The clients of each queue, by process and preset.
    pub fn clients(&self) -> BTreeMap<(u32, String), Clients> {
        lock(&self.shared.clients).clone()
    }

    pub fn own(&self) -> &Own {
        &self.shared.own
    }
}

/// Keeps a task for each process, until the agent ends.
async fn supervise(context: Context, mut watched: watch::Receiver<Wanted>) {
    let mut tasks: BTreeMap<(u32, String), Task> = BTreeMap::new();
    loop {
        let wanted = watched.borrow_and_update().clone();
        let mut next = BTreeMap::new();
        for process in wanted.processes.into_iter().take(MAX_PROCESSES) {
            let key = (process.tgid, process.preset.name.clone());
            let before = tasks.remove(&key);
            let task = match before {
                Some(task) if task.is_of(&process) => task,
                before => {
                    lock(&context.shared.reports).remove(&key);
                    Task::start(context.clone(), &process, before.as_ref())
                }
            };
            task.focus.send_if_modified(|is_focused| {
                let changed = *is_focused != process.is_focused;
                *is_focused = process.is_focused;
                changed
            });
            next.insert(key, task);
        }
        // Dropping a task cancels it.
        tasks = next;
        lock(&context.shared.reports).retain(|key, _| tasks.contains_key(key));
        lock(&context.shared.clients).retain(|key, _| tasks.contains_key(key));
        context
            .shared
            .version
            .store(wanted.version, Ordering::Release);
        if watched.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
#[path = "asker/tests.rs"]
mod tests;
