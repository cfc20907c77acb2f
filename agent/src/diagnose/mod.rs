//! Why a queue fills: from what threads wait for to a cause, a culprit, the evidence, and what to do.
//!
//! `world` keeps who holds what; `classify` says what one thread does at one look; `profile` adds that up over time;
//! `follow` walks from a blocked thread to what it waits for, until something works; `rules` makes a verdict of all that,
//! `words` says it. Pure: no clock, no kernel, no I/O. The rules speak of kernel facts, never of a program.
#![forbid(unsafe_code)]

mod activity;
mod cause;
pub mod messages;
pub mod said;
mod verdict;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

pub use activity::Activity;
pub use cause::Cause;
pub use verdict::{CauseStretch, Confidence, Culprit, CulpritKind, Hop, Said, Verdict};

use crate::{
    detect::{Episode, Event, Instant},
    queue::{QueueKey, Readings, Targets},
    sample::{Sample, TargetId},
};

/// All that is remembered between samples in order to say why.
#[derive(Default)]
pub struct Diagnosis {
    open: BTreeMap<Arc<QueueKey>, ()>,
}

impl Diagnosis {
    /// Takes in one sample and what the queues were in it. `hot`: targets with a suspicious queue.
    pub fn read(
        &mut self,
        _at: Instant,
        _sample: &Sample,
        _readings: &Readings,
        _targets: &Targets,
        _hot: &BTreeSet<TargetId>,
    ) {
    }

    /// Targets for which this one waits, or that wait for it: their episodes are one incident.
    pub fn neighbours(&self, _target: TargetId) -> Vec<TargetId> {
        Vec::new()
    }

    /// Why this episode happens, as far as it has come.
    pub fn verdict(&self, _episode: &Episode, _targets: &Targets) -> Option<Arc<Verdict>> {
        None
    }

    /// Completes what the detector says: each episode gets its verdict, and stretches of one cause are told.
    pub fn complete(&mut self, _at: Instant, _targets: &Targets, _events: &mut Vec<Event>) {
        let _ = &self.open;
    }
}
