//! State shared between the agent's loop, which writes it, and the servers of the stream, which read it. Writing never
//! blocks.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::{Notify, broadcast};

use super::{
    exact_waits::ExactWaits, live::Live, pages::PageCounts, pressure::Pressure,
    readers::ReaderCache, wait_histograms::WaitHistograms,
};
use crate::{
    cause::Cause,
    collect::boot_ns,
    event::Level,
    queue::QueueKey,
    sample::{AgentReport, HookReport},
    target::Downward,
};

/// Maximum number of lines that a subscriber may lag behind before it is disconnected.
const MAX_LAG_LINES: usize = 1_024;

/// An event as a line of JSON.
#[derive(Debug)]
pub struct Line {
    /// The service's name.
    pub target: Option<String>,
    /// The highest level that the event concerns.
    pub level: Level,
    pub text: String,
}

/// The cause of each queue that is not ok and has a verdict.
pub type Causes = Arc<BTreeMap<Arc<QueueKey>, Cause>>;

/// The state after the last sample.
#[derive(Clone, Default)]
pub struct Snapshot {
    pub unix_ns: u64,
    /// End of its time to live, as on the pages. CLOCK_BOOTTIME, ns.
    pub until_ns: u64,
    pub pressures: Arc<Vec<Pressure>>,
    /// The names of their pages' directories, in the same order.
    pub names: Arc<Vec<String>>,
    /// Why queues fill, as far as it is known.
    pub causes: Causes,
    pub report: Option<Arc<AgentReport>>,
    pub pages: PageCounts,
    /// The past of queues, and their episodes.
    pub live: Arc<Live>,
    /// Where the agent runs in Kubernetes.
    pub downward: Arc<Downward>,
}

impl Snapshot {
    /// Whether the agent's loop is still running.
    pub fn is_current(&self) -> bool {
        boot_ns() < self.until_ns
    }
}

/// A subscriber of the stream.
#[derive(Clone, Debug)]
pub struct Subscriber {
    pub pid: Option<u32>,
    pub target: Option<String>,
    pub min_level: Level,
    pub since_unix_ns: u64,
    pub lines: u64,
}

/// Counters of the stream.
#[derive(Debug, Default)]
pub struct Counts {
    /// Lines published.
    pub lines: AtomicU64,
    /// Clients rejected for lack of room, disconnected as too slow, and disconnected for an invalid command.
    pub rejected: AtomicU64,
    pub too_slow: AtomicU64,
    pub invalid_commands: AtomicU64,
}

/// The configuration file of a running agent.
#[derive(Clone, Debug, Default)]
pub struct ConfigFile {
    pub path: String,
    /// When the configuration in force was loaded.
    pub loaded_unix_ns: u64,
    /// How often the file was loaded again, and how often it was rejected.
    pub reloads: u64,
    pub rejected: u64,
    /// Why the file was rejected when it was last read, if it was.
    pub error: Option<String>,
    /// Keys whose values in the file take effect only after a restart.
    pub needs_restart: Vec<String>,
}

/// The shared state. Locked only briefly.
pub struct SharedState {
    lines: broadcast::Sender<Arc<Line>>,
    snapshot: Mutex<Arc<Snapshot>>,
    /// Notified after each new snapshot.
    changed: Notify,
    waits: Mutex<WaitHistograms>,
    exact_waits: Mutex<ExactWaits>,
    config_file: Mutex<Option<Arc<ConfigFile>>>,
    subscribers: Mutex<BTreeMap<u64, Subscriber>>,
    next: AtomicU64,
    pub(super) readers: ReaderCache,
    pub counts: Counts,
}

impl Default for SharedState {
    fn default() -> Self {
        Self {
            lines: broadcast::Sender::new(MAX_LAG_LINES),
            snapshot: Mutex::default(),
            changed: Notify::new(),
            waits: Mutex::default(),
            exact_waits: Mutex::default(),
            config_file: Mutex::default(),
            subscribers: Mutex::default(),
            next: AtomicU64::new(0),
            readers: ReaderCache::default(),
            counts: Counts::default(),
        }
    }
}

impl SharedState {
    /// Sends a line to all subscribers.
    pub fn publish(&self, line: Line) {
        self.counts.lines.fetch_add(1, Ordering::Relaxed);
        // An error only means that there is no subscriber.
        let _ = self.lines.send(Arc::new(line));
    }

    /// Receives all lines from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<Line>> {
        self.lines.subscribe()
    }

    /// Replaces the state after a sample.
    pub fn set(&self, snapshot: Snapshot) {
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(snapshot);
        self.changed.notify_waiters();
    }

    /// Replaces the state of the configuration file.
    pub fn set_config_file(&self, file: ConfigFile) {
        let mut slot = self
            .config_file
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *slot = Some(Arc::new(file));
    }

    /// The state of the configuration file; `None` without one.
    pub fn config_file(&self) -> Option<Arc<ConfigFile>> {
        let slot = self
            .config_file
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        slot.clone()
    }

    /// Adds to the wait histograms. Skipped while they are being read; the next call counts the missed departures.
    pub fn count_waits(&self, pressures: &[Pressure]) {
        if let Ok(mut waits) = self.waits.try_lock() {
            waits.read(pressures);
        }
    }

    /// The wait histograms.
    pub fn waits(&self) -> MutexGuard<'_, WaitHistograms> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the waits for a CPU that hooks have measured, which replace those that samples estimate.
    pub fn count_exact_waits(&self, now_ns: u64, report: &HookReport) {
        self.waits().read_exact(now_ns, report);
    }

    /// What hooks have measured.
    pub fn exact_waits(&self) -> MutexGuard<'_, ExactWaits> {
        self.exact_waits
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The state after the last sample. If the agent's loop hangs it has no services, as their pages have expired.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        let snapshot = Arc::clone(&self.snapshot.lock().unwrap_or_else(PoisonError::into_inner));
        if snapshot.is_current() {
            return snapshot;
        }
        Arc::new(Snapshot {
            pressures: Arc::default(),
            names: Arc::default(),
            causes: Causes::default(),
            ..Snapshot::clone(&snapshot)
        })
    }

    /// Waits for a state that is current: at once, except before the first sample and while the agent's loop hangs.
    pub async fn current_snapshot(&self) -> Arc<Snapshot> {
        loop {
            // Created before the check, so that a change in between is not missed.
            let changed = self.changed.notified();
            let snapshot = self.snapshot();
            if snapshot.is_current() {
                return snapshot;
            }
            changed.await;
        }
    }

    /// Registers a subscriber; the returned number is for [`SharedState::remove_subscriber`].
    pub fn add_subscriber(&self, subscriber: Subscriber) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock_subscribers().insert(number, subscriber);
        number
    }

    /// Counts a line sent to a subscriber.
    pub fn count_line(&self, number: u64) {
        if let Some(subscriber) = self.lock_subscribers().get_mut(&number) {
            subscriber.lines += 1;
        }
    }

    /// Removes a subscriber that has disconnected.
    pub fn remove_subscriber(&self, number: u64) {
        self.lock_subscribers().remove(&number);
    }

    /// All present subscribers.
    pub fn subscribers(&self) -> Vec<Subscriber> {
        self.lock_subscribers().values().cloned().collect()
    }

    fn lock_subscribers(&self) -> MutexGuard<'_, BTreeMap<u64, Subscriber>> {
        self.subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        sample::Target,
        signal::{PressureTracker, metrics},
    };

    #[test]
    fn a_hung_agent_reports_no_services() {
        let shop = Arc::new(Target {
            name: "shop".to_owned(),
            ..Target::default()
        });
        let pressures =
            PressureTracker::default().read(0, std::iter::empty(), std::iter::once(&shop));
        let state = SharedState::default();
        for (until_ns, up) in [(u64::MAX, 1), (boot_ns(), 0)] {
            state.set(Snapshot {
                until_ns,
                pressures: Arc::new(pressures.clone()),
                names: Arc::new(vec!["shop".to_owned()]),
                ..Snapshot::default()
            });
            let text = metrics::render(&state).text();
            assert!(
                text.contains(&format!("tailback_agent_up {up}\n")),
                "{text}"
            );
            let is_present = text.contains("tailback_level{target=\"shop\"} 0\n");
            assert_eq!(is_present, up == 1, "{text}");
        }
    }
}
