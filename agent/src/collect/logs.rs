//! Finds messages about full queues in the logs of focused targets.
//!
//! A log is a regular file that a process has open for writing (`open`). The size of every log is polled all the time, which
//! is cheap. A log is read only while its writer is focused and for a while after, beginning shortly before (`tail`). Pipes,
//! sockets (the journal's among them) and terminals are not read: that would take data from their readers.
#![forbid(unsafe_code)]

mod lines;
mod open;
mod tail;

use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::FxHashMap;
use tail::{LogState, Tail};

use super::{
    MS, clock::CpuTimer, focus::FocusedTargets, notices::Notices, poll_interval::PollInterval,
    processes::find,
};
use crate::{
    messages::Table,
    sample::{Message, Target, TargetId},
    target::ProcessInfo,
    text::{bounded, bytes},
};

/// Interval of polling the sizes of all logs.
const SIZE_INTERVAL: PollInterval = PollInterval::new(1_000 * MS, 10_000 * MS);
/// Interval of reading the logs of focused targets.
const READ_INTERVAL: PollInterval = PollInterval::new(250 * MS, 5_000 * MS);
/// How long a target's logs are read after it was last focused, ns.
const FOCUS_RETENTION_NS: u64 = 30_000 * MS;
/// Time between two scans of a process's descriptors, ns.
const RESCAN_INTERVAL_NS: u64 = 30_000 * MS;
/// Time between two scans of a process's descriptors while its target is focused, ns.
const FOCUSED_RESCAN_INTERVAL_NS: u64 = 5_000 * MS;
/// CPU time for scanning descriptors in one poll, ns. At least one process is scanned.
const MAX_SCAN_COST_NS: u64 = 2 * MS;
/// How long a log without a writer is kept, ns: another process of the target may have it open.
const ORPHAN_TTL_NS: u64 = 3_000 * MS;
/// Maximum number of logs of one target.
const MAX_PER_TARGET: usize = 8;
/// Maximum number of logs of all targets together.
const MAX_LOGS: usize = 1024;
/// Maximum number of logs read in one poll; the others have their turn in the next.
const MAX_READS: usize = 16;
/// Longest line that a message keeps, bytes.
const MAX_MESSAGE_LINE: usize = 240;
/// Shortest time between two notices about skipped bytes, ns.
const SKIPPED_NOTICE_INTERVAL_NS: u64 = 30_000 * MS;

/// Reads the logs of focused targets.
pub(super) struct Logs {
    /// The known messages; `None`: no logs are read.
    table: Option<Table>,
    sizes: PollInterval,
    reads: PollInterval,
    tails: Vec<Tail>,
    /// By tgid.
    scanned: FxHashMap<u32, Scanned>,
    focused: FocusedTargets,
    /// Index, among the logs to read, of the log that is read first.
    turn: usize,
    skipped: Skipped,
}

/// The last scan of a process's descriptors.
struct Scanned {
    start_ns: u64,
    at_ns: u64,
    /// Descriptors may have changed since.
    is_stale: bool,
}

/// Bytes of logs that were not read because they grew too fast.
#[derive(Default)]
struct Skipped {
    bytes: u64,
    reported_bytes: u64,
    /// When the next notice may be sent, CLOCK_MONOTONIC ns.
    next_notice_ns: u64,
}

/// By target, path and name of the message.
type Messages = BTreeMap<(TargetId, String, String), Message>;

impl Logs {
    /// `None` turns reading off.
    pub(super) fn new(table: Option<Table>) -> Self {
        Self {
            table,
            sizes: SIZE_INTERVAL,
            reads: READ_INTERVAL,
            tails: Vec::new(),
            scanned: FxHashMap::default(),
            focused: FocusedTargets::new(FOCUS_RETENTION_NS),
            turn: 0,
            skipped: Skipped::default(),
        }
    }

    /// `focused`: targets with an unhealthy queue now.
    pub(super) fn set_focused(&mut self, focused: &BTreeSet<TargetId>, now_ns: u64) {
        if self.focused.update(now_ns, focused.iter().copied()) {
            self.reads.poll_within(now_ns, 0);
        }
    }

    pub(super) fn is_due(&self, now_ns: u64) -> bool {
        self.table.is_some() && (self.sizes.is_due(now_ns) || self.is_reading(now_ns))
    }

    fn is_reading(&self, now_ns: u64) -> bool {
        !self.focused.is_empty() && self.reads.is_due(now_ns)
    }

    /// Polls sizes and reads logs, whichever is due. `share`: the share of a core that each of the two may use.
    /// `processes` are those of the targets, in the order of their tgids.
    pub(super) fn poll(
        &mut self,
        now_ns: u64,
        share: f64,
        targets: &[Target],
        processes: &[ProcessInfo],
        notices: &mut Notices,
    ) -> Vec<Message> {
        let mut messages = Messages::new();
        let Some(table) = self.table.take() else {
            return Vec::new();
        };
        let owners: FxHashMap<u32, TargetId> = targets
            .iter()
            .flat_map(|target| target.tgids.iter().map(|tgid| (*tgid, target.id)))
            .collect();
        if self.sizes.is_due(now_ns) {
            let timer = CpuTimer::start();
            self.forget(now_ns, &owners, processes, &table, &mut messages);
            for at in 0..self.tails.len() {
                self.poll_size(at, now_ns, &table, &mut messages);
            }
            self.scan(now_ns, &owners, processes, notices);
            self.sizes.polled(now_ns, timer.elapsed_ns(), share);
        }
        if self.is_reading(now_ns) {
            let timer = CpuTimer::start();
            self.read(now_ns, &table, &mut messages, notices);
            let mut focused = owners;
            focused.retain(|_, target| self.focused.contains(*target));
            self.scan(now_ns, &focused, processes, notices);
            self.reads.polled(now_ns, timer.elapsed_ns(), share);
        }
        self.report_skipped(now_ns, notices);
        self.table = Some(table);
        messages.into_values().collect()
    }

    /// Drops ended processes, and logs without a writer after reading their rest.
    fn forget(
        &mut self,
        now_ns: u64,
        owners: &FxHashMap<u32, TargetId>,
        processes: &[ProcessInfo],
        table: &Table,
        messages: &mut Messages,
    ) {
        let lives = |tgid: u32, start_ns: u64| {
            let found = find(processes, tgid);
            found.is_some_and(|process| process.start_ns == start_ns)
        };
        self.scanned
            .retain(|tgid, scanned| lives(*tgid, scanned.start_ns));
        let mut changed = BTreeSet::new();
        for tail in &mut self.tails {
            if let Some(owner) = owners.get(&tail.tgid) {
                tail.target = *owner;
            }
            if tail.orphaned_ns.is_none() && !lives(tail.tgid, tail.start_ns) {
                tail.orphaned_ns = Some(now_ns);
                changed.insert(tail.target);
            }
            if !self.focused.contains(tail.target) {
                tail.close();
            }
        }
        for target in changed {
            self.rescan(target, owners);
        }
        for tail in &mut self.tails {
            if is_expired(tail, now_ns) {
                let mut count = counter(messages, tail.target, tail.tgid, tail.path.clone());
                tail.finish(now_ns, table, &mut count);
            }
        }
        self.tails.retain(|tail| !is_expired(tail, now_ns));
    }

    /// Makes a rescan of a target's processes due.
    fn rescan(&mut self, target: TargetId, owners: &FxHashMap<u32, TargetId>) {
        for (tgid, scanned) in &mut self.scanned {
            scanned.is_stale |= owners.get(tgid) == Some(&target);
        }
    }

    /// Updates a log's size, or switches to the file that its writer has opened in its place.
    fn poll_size(&mut self, at: usize, now_ns: u64, table: &Table, messages: &mut Messages) {
        let Some(tail) = self.tails.get_mut(at) else {
            return;
        };
        let target = tail.target;
        let mut count = counter(messages, target, tail.tgid, tail.path.clone());
        let is_focused = self.focused.contains(target);
        let read = is_focused.then_some((table, &mut count as &mut tail::Count<'_>));
        let was_orphaned = tail.orphaned_ns.is_some();
        if tail.poll_size(now_ns, read) != LogState::Same && !was_orphaned {
            let tgid = tail.tgid;
            if let Some(scanned) = self.scanned.get_mut(&tgid) {
                scanned.is_stale = true;
            }
        }
    }

    /// Scans the descriptors of processes whose scan is due, those never scanned first.
    fn scan(
        &mut self,
        now_ns: u64,
        owners: &FxHashMap<u32, TargetId>,
        processes: &[ProcessInfo],
        notices: &mut Notices,
    ) {
        let mut due: Vec<(u64, u32, TargetId)> = owners
            .iter()
            .filter_map(|(tgid, target)| {
                let interval_ns = if self.focused.contains(*target) {
                    FOCUSED_RESCAN_INTERVAL_NS
                } else {
                    RESCAN_INTERVAL_NS
                };
                match self.scanned.get(tgid) {
                    None => Some((0, *tgid, *target)),
                    Some(scanned) => (scanned.is_stale
                        || scanned.at_ns.saturating_add(interval_ns) <= now_ns)
                        .then_some((scanned.at_ns, *tgid, *target)),
                }
            })
            .collect();
        due.sort_unstable();
        let timer = CpuTimer::start();
        for (_, tgid, target) in due {
            if let Some(process) = find(processes, tgid) {
                self.scan_process(now_ns, target, process, notices);
            }
            if timer.elapsed_ns() > MAX_SCAN_COST_NS {
                break;
            }
        }
        // A log may have been replaced by one that is known already.
        let mut seen = BTreeSet::new();
        self.tails
            .retain(|tail| seen.insert((tail.target, tail.file)));
    }

    fn scan_process(
        &mut self,
        now_ns: u64,
        target: TargetId,
        process: &ProcessInfo,
        notices: &mut Notices,
    ) {
        let scanned = Scanned {
            start_ns: process.start_ns,
            at_ns: now_ns,
            is_stale: false,
        };
        let before = self.scanned.insert(process.tgid, scanned);
        let since_ns = before
            .filter(|before| before.start_ns == process.start_ns)
            .map(|before| before.at_ns);
        for log in open::logs(process.pid) {
            let file = log.metadata.file;
            let known = self
                .tails
                .iter_mut()
                .find(|tail| tail.target == target && tail.file == file);
            if let Some(tail) = known {
                if tail.orphaned_ns.is_some() {
                    tail.adopt(process, log.fd);
                }
                continue;
            }
            let of_target = self.tails.iter().filter(|tail| tail.target == target);
            if of_target.count() >= MAX_PER_TARGET || self.tails.len() >= MAX_LOGS {
                notices.report_once("too_many_logs", || {
                    format!(
                        "log limit reached ({MAX_PER_TARGET} per service, {MAX_LOGS} in total): skipping {}",
                        log.path
                    )
                });
                continue;
            }
            let tail = Tail::new(target, process, log, since_ns, now_ns);
            self.tails.push(tail);
        }
    }

    /// Reads the new bytes in the logs of focused targets, round-robin.
    fn read(&mut self, now_ns: u64, table: &Table, messages: &mut Messages, notices: &mut Notices) {
        let focused = (0..self.tails.len()).filter(|at| {
            let tail = self.tails.get(*at);
            tail.is_some_and(|tail| self.focused.contains(tail.target))
        });
        let mut focused: Vec<usize> = focused.collect();
        if focused.len() > MAX_READS {
            let turn = self.turn % focused.len();
            focused.rotate_left(turn);
            focused.truncate(MAX_READS);
            self.turn = turn + MAX_READS;
        }
        for at in focused {
            self.poll_size(at, now_ns, table, messages);
            let Some(tail) = self.tails.get_mut(at) else {
                continue;
            };
            let mut count = counter(messages, tail.target, tail.tgid, tail.path.clone());
            match tail.read(table, &mut count) {
                Ok(skipped) => self.skipped.bytes = self.skipped.bytes.saturating_add(skipped),
                Err(error) => {
                    let path = tail.path.clone();
                    tail.close();
                    notices.report_once("log_unreadable", || {
                        format!(
                            "cannot read the log {path}: {error}. Messages about full queues in it, and possibly in other \
                             logs, are missed; run the agent as root or grant it CAP_DAC_READ_SEARCH"
                        )
                    });
                }
            }
        }
    }

    fn report_skipped(&mut self, now_ns: u64, notices: &mut Notices) {
        let total = self.skipped.bytes;
        if total > self.skipped.reported_bytes && now_ns >= self.skipped.next_notice_ns {
            self.skipped.reported_bytes = total;
            self.skipped.next_notice_ns = now_ns.saturating_add(SKIPPED_NOTICE_INTERVAL_NS);
            let max = bytes(tail::MAX_READ);
            notices.report(
                "log_left_out",
                format!(
                    "{} of logs were skipped so far, because they grow by more than {max} between two reads: counts of \
                     messages are too low",
                    bytes(total)
                ),
            );
        }
    }
}

fn is_expired(tail: &Tail, now_ns: u64) -> bool {
    tail.orphaned_ns
        .is_some_and(|orphaned_ns| orphaned_ns.saturating_add(ORPHAN_TTL_NS) <= now_ns)
}

/// Counts the known messages of one log.
fn counter<'a>(
    messages: &'a mut Messages,
    target: TargetId,
    tgid: u32,
    path: String,
) -> impl FnMut(&str, &[u8], [u64; 2]) + 'a {
    move |name, line, [not_before_ns, not_after_ns]| {
        let key = (target, path.clone(), name.to_owned());
        let message = messages.entry(key).or_insert_with(|| Message {
            tgid,
            path: path.clone(),
            name: name.to_owned(),
            count: 0,
            line: bounded(&String::from_utf8_lossy(line), MAX_MESSAGE_LINE),
            not_before_ns,
            not_after_ns,
        });
        message.count = message.count.saturating_add(1);
    }
}

#[cfg(test)]
mod tests;
