//! Messages for people about the agent's own work. They travel in the samples. Pure.
#![forbid(unsafe_code)]

use std::{collections::BTreeSet, time::Duration};

use super::schedule::StretchableScan;
use crate::{
    sample::Notice,
    target::{LeftOut, MAX_SERVICES, Selector},
    text::duration,
};

/// Shortest time between two notices about the interval of one scan, ns.
const STRETCHED_INTERVAL_NS: u64 = 30_000_000_000;

#[derive(Default)]
pub(super) struct Notices {
    pending: Vec<Notice>,
    /// Selectors that matched nothing when this was last reported.
    unmatched: Option<Vec<Selector>>,
    /// Codes that were reported and are reported only once.
    reported: BTreeSet<&'static str>,
    /// For each scan of [`StretchableScan`]: whether it was last reported as stretched, and when, CLOCK_MONOTONIC ns.
    stretched: [(bool, u64); StretchableScan::COUNT],
}

impl Notices {
    /// The notices since the last call.
    pub(super) fn take(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.pending)
    }

    /// Reports selectors that match nothing, or nothing any more.
    pub(super) fn report_unmatched(&mut self, unmatched: &[Selector]) {
        if self.unmatched.as_deref() == Some(unmatched) {
            return;
        }
        let before = self.unmatched.replace(unmatched.to_vec());
        let before = before.unwrap_or_default();
        for selector in unmatched {
            if before.contains(selector) {
                continue;
            }
            match selector {
                // The agent refuses to start if the process does not exist, so it existed then.
                Selector::Pid(pid) => {
                    self.report("target_ended", format!("process {pid} has ended"));
                }
                _ => self.report(
                    "waiting_for_target",
                    format!("no process matches {selector}; waiting for one to start"),
                ),
            }
        }
    }

    /// Reports, the first time only, that processes are not watched.
    pub(super) fn report_left_out(&mut self, left_out: LeftOut) {
        if left_out.young + left_out.system > 0 {
            self.report_once("processes_left_out", || {
                format!(
                    "not watched: processes of the system and of Kubernetes ({} now), and those that neither \
                     listen nor have lived for 5 s; --every-process includes them",
                    left_out.system
                )
            });
        }
        if left_out.services > 0 {
            self.report_once("too_many_services", || {
                format!(
                    "limit of {MAX_SERVICES} services reached: {} are not watched",
                    left_out.services
                )
            });
        }
    }

    /// Reports that a limit is reached, the first time only.
    pub(super) fn report_once(&mut self, code: &'static str, text: impl Fn() -> String) {
        if self.reported.insert(code) {
            self.report(code, text());
        }
    }

    pub(super) fn report(&mut self, code: &str, text: String) {
        self.pending.push(Notice {
            code: code.to_owned(),
            text,
        });
    }

    /// Reports when the CPU budget begins to stretch the interval of a scan, and when it no longer does.
    pub(super) fn report_stretched_scans(
        &mut self,
        scans: &[StretchableScan; StretchableScan::COUNT],
        now_ns: u64,
    ) {
        for (index, scan) in scans.iter().enumerate() {
            let (was_stretched, reported_ns) = self.stretched[index];
            if scan.is_stretched == was_stretched || now_ns < reported_ns + STRETCHED_INTERVAL_NS {
                continue;
            }
            self.stretched[index] = (scan.is_stretched, now_ns);
            let (name, objects) = (scan.name, scan.objects);
            if scan.is_stretched {
                let cost = duration(scan.cost_ns);
                let interval = Duration::from_nanos(scan.interval_ns);
                let percent = scan.budget * 100.0;
                self.report(
                    &format!("{name}_stretched"),
                    format!(
                        "a scan of all {objects} costs {cost} of CPU time: scanning them every {interval:.1?} to stay \
                         within {percent:.1}% of a core"
                    ),
                );
            } else {
                self.report(
                    &format!("{name}_not_stretched"),
                    format!("{objects} are part of every sample again"),
                );
            }
        }
    }
}
