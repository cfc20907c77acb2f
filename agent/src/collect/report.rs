//! The agent's counters about itself, reported every [`REPORT_INTERVAL_NS`].

use super::{Schedule, process_cpu_ns, resident_bytes};
use crate::sample::{AgentReport, Notice};

/// Time between two reports, ns.
const REPORT_INTERVAL_NS: u64 = 10_000_000_000;

/// Counters and notices of the agent's outputs. They travel in the sample, so that a replay shows them too.
#[derive(Clone, Debug, Default)]
pub struct OutputStats {
    /// Samples that the recording could not keep.
    pub samples_not_recorded: u64,
    /// Spans made, delivered to the collector, and dropped.
    pub spans: u64,
    pub spans_delivered: u64,
    pub spans_dropped: u64,
    pub notices: Vec<Notice>,
}

/// The agent's counters about itself.
pub(super) struct Report {
    due_ns: u64,
    /// When the previous report was made, and the agent's CPU time then.
    previous_ns: u64,
    previous_cpu_ns: u64,
    totals: AgentReport,
}

impl Report {
    pub(super) fn new(now_ns: u64) -> Self {
        Self {
            due_ns: now_ns + REPORT_INTERVAL_NS,
            previous_cpu_ns: process_cpu_ns(),
            previous_ns: now_ns,
            totals: AgentReport::default(),
        }
    }

    pub(super) fn count_sample(&mut self) {
        self.totals.samples += 1;
    }

    pub(super) fn count_records(&mut self, records: u64) {
        self.totals.records += records;
    }

    pub(super) fn is_due(&self, now_ns: u64) -> bool {
        now_ns >= self.due_ns
    }

    /// Makes a report. `watched`: how many targets and processes are watched.
    pub(super) fn make(
        &mut self,
        now_ns: u64,
        watched: (u32, u32),
        schedule: &Schedule,
        outputs: &OutputStats,
    ) -> AgentReport {
        let cpu_ns = process_cpu_ns();
        let elapsed = now_ns.saturating_sub(self.previous_ns).max(1);
        let report = AgentReport {
            cpu_ns,
            cpu_share: cpu_ns.saturating_sub(self.previous_cpu_ns) as f64 / elapsed as f64,
            rss_bytes: resident_bytes(),
            files_scan_ns: schedule.files_cost_ns(),
            files_interval_ns: schedule.files_interval_ns(),
            targets: watched.0,
            processes: watched.1,
            late_samples: schedule.late_samples(),
            samples_not_recorded: outputs.samples_not_recorded,
            spans: outputs.spans,
            spans_delivered: outputs.spans_delivered,
            spans_dropped: outputs.spans_dropped,
            ..self.totals.clone()
        };
        self.previous_cpu_ns = cpu_ns;
        self.previous_ns = now_ns;
        self.due_ns = now_ns + REPORT_INTERVAL_NS;
        report
    }
}
