//! What the agent counts about itself, told every so often.

use super::{Schedule, process_cpu_ns, resident_bytes};
use crate::sample::{AgentReport, Notice};

/// How often the agent reports about itself.
const REPORT_NS: u64 = 10_000_000_000;

/// What others counted and have to say: it travels in the sample, so that a replay tells it too.
#[derive(Clone, Debug, Default)]
pub struct Others {
    pub samples_not_recorded: u64,
    pub spans: u64,
    pub spans_delivered: u64,
    pub spans_dropped: u64,
    pub notices: Vec<Notice>,
}

/// What the agent counts about itself.
pub(super) struct Report {
    due_ns: u64,
    cpu_before_ns: u64,
    before_ns: u64,
    totals: AgentReport,
}

impl Report {
    pub(super) fn new(now_ns: u64) -> Self {
        Self {
            due_ns: now_ns + REPORT_NS,
            cpu_before_ns: process_cpu_ns(),
            before_ns: now_ns,
            totals: AgentReport::default(),
        }
    }

    pub(super) fn ticked(&mut self) {
        self.totals.ticks += 1;
    }

    pub(super) fn walked(&mut self, records: u64) {
        self.totals.records += records;
    }

    pub(super) fn is_due(&self, now_ns: u64) -> bool {
        now_ns >= self.due_ns
    }

    /// The report; `watched` are the targets and their processes.
    pub(super) fn make(
        &mut self,
        now_ns: u64,
        watched: (u32, u32),
        schedule: &Schedule,
        others: &Others,
    ) -> AgentReport {
        let cpu_ns = process_cpu_ns();
        let elapsed = now_ns.saturating_sub(self.before_ns).max(1);
        let report = AgentReport {
            cpu_ns,
            cpu_share: cpu_ns.saturating_sub(self.cpu_before_ns) as f64 / elapsed as f64,
            rss_bytes: resident_bytes(),
            files_walk_ns: schedule.files_cost_ns(),
            files_interval_ns: schedule.files_interval_ns(),
            targets: watched.0,
            processes: watched.1,
            late_ticks: schedule.late_ticks(),
            samples_not_recorded: others.samples_not_recorded,
            spans: others.spans,
            spans_delivered: others.spans_delivered,
            spans_dropped: others.spans_dropped,
            ..self.totals.clone()
        };
        self.cpu_before_ns = cpu_ns;
        self.before_ns = now_ns;
        self.due_ns = now_ns + REPORT_NS;
        report
    }
}
