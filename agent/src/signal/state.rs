//! Where the agent's loop leaves what it knows, and where those who serve others find it. Leaving never waits.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::broadcast;

use super::{pressure::Pressure, wait_histograms::WaitHistograms};
use crate::{collect::boot_ns, event::Level, sample::AgentReport};

/// Lines that a subscriber may be behind before it is let go.
const BEHIND: usize = 1_024;

/// Something that happened, as a line of JSON.
#[derive(Debug)]
pub struct Line {
    /// The service's name.
    pub target: Option<String>,
    /// The highest level that it is about.
    pub level: Level,
    pub text: String,
}

/// How things stand as of the last tick.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub unix_ns: u64,
    /// It holds until then, as the pages do. CLOCK_BOOTTIME, ns.
    pub until_ns: u64,
    pub pressures: Arc<Vec<Pressure>>,
    /// The names of their pages' directories, in the same order.
    pub names: Arc<Vec<String>>,
    pub report: Option<Arc<AgentReport>>,
    /// Pages written, pages that could not be, services beyond the bound.
    pub pages: (usize, usize, usize),
}

impl Snapshot {
    /// The loop still comes round.
    pub fn holds(&self) -> bool {
        boot_ns() < self.until_ns
    }
}

/// One who listens.
#[derive(Clone, Debug)]
pub struct Subscriber {
    pub pid: Option<u32>,
    pub target: Option<String>,
    pub min_level: Level,
    pub since_unix_ns: u64,
    pub lines: u64,
}

/// What became of those who wanted to listen.
#[derive(Debug, Default)]
pub struct Counts {
    pub lines: AtomicU64,
    /// Refused for want of room; let go because they did not read; that said what nobody understands.
    pub refused: AtomicU64,
    pub too_slow: AtomicU64,
    pub not_understood: AtomicU64,
}

pub struct SharedState {
    lines: broadcast::Sender<Arc<Line>>,
    snapshot: Mutex<Arc<Snapshot>>,
    waits: Mutex<WaitHistograms>,
    subscribers: Mutex<BTreeMap<u64, Subscriber>>,
    next: AtomicU64,
    pub counts: Counts,
}

impl Default for SharedState {
    fn default() -> Self {
        Self {
            lines: broadcast::Sender::new(BEHIND),
            snapshot: Mutex::default(),
            waits: Mutex::default(),
            subscribers: Mutex::default(),
            next: AtomicU64::new(0),
            counts: Counts::default(),
        }
    }
}

impl SharedState {
    /// Sends a line to all subscribers.
    pub fn publish(&self, line: Line) {
        self.counts.lines.fetch_add(1, Ordering::Relaxed);
        // Nobody listens: fine.
        let _ = self.lines.send(Arc::new(line));
    }

    /// What is said from now on.
    pub fn listen(&self) -> broadcast::Receiver<Arc<Line>> {
        self.lines.subscribe()
    }

    pub fn set(&self, snapshot: Snapshot) {
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(snapshot);
    }

    /// While somebody reads them they are left alone: what left meanwhile is counted the next time.
    pub fn count_waits(&self, pressures: &[Pressure]) {
        if let Ok(mut waits) = self.waits.try_lock() {
            waits.read(pressures);
        }
    }

    pub fn waits(&self) -> MutexGuard<'_, WaitHistograms> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How things stand. Where the loop does not come round any more there is nothing to say of any service, as on its page.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        let snapshot = Arc::clone(&self.snapshot.lock().unwrap_or_else(PoisonError::into_inner));
        if snapshot.holds() {
            return snapshot;
        }
        Arc::new(Snapshot {
            pressures: Arc::default(),
            names: Arc::default(),
            ..Snapshot::clone(&snapshot)
        })
    }

    /// Enters one who listens; the number is given back with [`SharedState::leave`].
    pub fn enter(&self, subscriber: Subscriber) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.book().insert(number, subscriber);
        number
    }

    /// That one got another line.
    pub fn got(&self, number: u64) {
        if let Some(subscriber) = self.book().get_mut(&number) {
            subscriber.lines += 1;
        }
    }

    pub fn leave(&self, number: u64) {
        self.book().remove(&number);
    }

    pub fn subscribers(&self) -> Vec<Subscriber> {
        self.book().values().cloned().collect()
    }

    fn book(&self) -> MutexGuard<'_, BTreeMap<u64, Subscriber>> {
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
        signal::{Board, metrics},
    };

    #[test]
    fn nothing_is_said_of_services_when_the_loop_does_not_come_round() {
        let shop = Arc::new(Target {
            name: "shop".to_owned(),
            ..Target::default()
        });
        let pressures = Board::default().read(0, std::iter::empty(), std::iter::once(&shop));
        let state = SharedState::default();
        for (until_ns, up) in [(u64::MAX, 1), (boot_ns(), 0)] {
            state.set(Snapshot {
                until_ns,
                pressures: Arc::new(pressures.clone()),
                names: Arc::new(vec!["shop".to_owned()]),
                ..Snapshot::default()
            });
            let text = metrics::render(&state);
            assert!(
                text.contains(&format!("tailback_agent_up {up}\n")),
                "{text}"
            );
            let is_told = text.contains("tailback_level{target=\"shop\"} 0\n");
            assert_eq!(is_told, up == 1, "{text}");
        }
    }
}
