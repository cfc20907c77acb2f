//! What the live page and `tailback top` show: services with their queues, the last ten minutes of the busiest queues, verdicts, and
//! who receives the signals.
//!
//! `history` keeps the past of a bounded number of queues, `episodes` the open and the latest ended ones, and `exact_waits` what
//! hooks have measured. `view` puts them together with the present state. Pure: the agent's loop and a replay feed it alike.
#![forbid(unsafe_code)]

mod episodes;
mod exact_waits;
#[cfg(test)]
pub(crate) mod fixture;
mod history;
#[cfg(test)]
mod tests;
pub mod view;

use std::{collections::BTreeMap, sync::Arc};

use episodes::Episodes;
use exact_waits::Wait;
use history::Histories;

use super::pressure::Pressure;
use crate::{
    event::Event,
    sample::{Architecture, HookReport, Target, TargetId},
};

/// Shortest and longest point of a recording, ns: twice the default sampling interval, and the point of a running agent.
const MIN_POINT_NS: u64 = 200_000_000;
const MAX_POINT_NS: u64 = 5_000_000_000;

/// Gathers what is shown. Cheap to clone: its parts are shared until they change.
#[derive(Clone, Default)]
pub struct Live {
    episodes: Episodes,
    histories: Histories,
    /// What hooks have measured in the last second.
    waits: Arc<BTreeMap<TargetId, Vec<Wait>>>,
    /// Including neighbours, which verdicts name.
    targets: Arc<BTreeMap<TargetId, Arc<Target>>>,
    /// Wall clock of the first reading, ns since 1970: what was before is unknown.
    began_unix_ns: Option<u64>,
    read_ns: u64,
}

impl Live {
    /// For a recording of this length: its points are shorter if it is shorter than a history.
    pub fn of_recording(length_ns: u64) -> Self {
        let point_ns = (length_ns / history::POINTS as u64).clamp(MIN_POINT_NS, MAX_POINT_NS);
        Self {
            histories: Histories::new(point_ns),
            ..Self::default()
        }
    }

    /// Adds an event of the pipeline. Returns whether it changes what is shown.
    pub fn take(&mut self, event: &Event) -> bool {
        if let Event::Targets { targets, .. } = event {
            let by_id = targets.iter().map(|one| (one.id, Arc::clone(one)));
            self.targets = Arc::new(by_id.collect());
            return true;
        }
        self.episodes.take(event)
    }

    /// Replaces the exact waits by those of a report. Returns whether that changes what is shown.
    pub fn set_exact_waits(&mut self, report: &HookReport, architecture: Architecture) -> bool {
        let waits = exact_waits::by_target(report, architecture);
        let is_changed = *self.waits != waits;
        if is_changed {
            self.waits = Arc::new(waits);
        }
        is_changed
    }

    /// Adds the state after a sample, unless the last reading is too recent (in an agent: less than 1 s ago). Returns whether
    /// it was added.
    pub fn read(&mut self, mono_ns: u64, unix_ns: u64, pressures: &[Pressure]) -> bool {
        let is_first = self.began_unix_ns.is_none();
        if !is_first && mono_ns.saturating_sub(self.read_ns) < self.histories.interval_ns() {
            return false;
        }
        self.began_unix_ns.get_or_insert(unix_ns);
        self.read_ns = mono_ns;
        self.histories.read(mono_ns, pressures);
        self.episodes
            .forget_before(unix_ns.saturating_sub(self.histories.length_ns()));
        true
    }
}
