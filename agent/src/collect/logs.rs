//! What suspicious services write to their logs of full queues.
//!
//! A log is a regular file that a process has open to write to (`open`). How long each is, is looked at all the time, at
//! little cost; read it is only while its writer has a suspicious queue, and a while after, from what it was shortly before
//! (`tail`). What cannot be read without touching it is not read: pipes, sockets (the journal's among them), terminals.
#![forbid(unsafe_code)]

mod lines;
mod open;
mod tail;

use std::collections::{BTreeMap, BTreeSet};

use open::Identity;
use rustc_hash::FxHashMap;
use tail::{Found, Tail};

use super::{clock::cpu_time_ns, notices::Voice, poll_interval::PollInterval};
use crate::{
    messages::Table,
    sample::{Message, Target, TargetId},
    target::ProcessSeen,
    text::{bounded, bytes},
};

const MS: u64 = 1_000_000;
/// How long logs are.
const MARKS: PollInterval = PollInterval::new(1_000 * MS, 10_000 * MS);
/// What is new in the logs of suspicious targets.
const READS: PollInterval = PollInterval::new(250 * MS, 5_000 * MS);
/// They are read on for so long after they were suspicious.
const LINGER_NS: u64 = 30_000 * MS;
/// Descriptors of a process are looked through again after so long, and of a suspicious one.
const RESCAN_NS: [u64; 2] = [30_000 * MS, 5_000 * MS];
/// CPU time for looking through descriptors at one look. One process is always looked through.
const SCAN_NS: u64 = 2 * MS;
/// A file whose writer is gone is kept for so long, for another of the target's processes may have it.
const GONE_NS: u64 = 3_000 * MS;
/// Logs of a target.
const MAX_PER_TARGET: usize = 8;
/// Logs of all targets.
const MAX_LOGS: usize = 1024;
/// Logs that are read at one look; the others have their turn at the next.
const MAX_READS: usize = 16;
/// Longest line that is kept, bytes.
const MAX_KEPT: usize = 240;
/// What was left out is told at most so often.
const TELL_NS: u64 = 30_000 * MS;

/// Reads the logs of suspicious targets.
pub(super) struct Logs {
    /// `None`: they are not read.
    table: Option<Table>,
    marks: PollInterval,
    reads: PollInterval,
    tails: Vec<Tail>,
    scanned: FxHashMap<u32, Scanned>,
    /// Suspicious targets, and when they last were.
    focused: BTreeMap<TargetId, u64>,
    /// Which log is read first.
    turn: usize,
    left_out: LeftOut,
}

/// When a process's descriptors were looked through.
struct Scanned {
    start_ns: u64,
    at_ns: u64,
    /// They are others by now.
    again: bool,
}

/// What was not read, bytes.
#[derive(Default)]
struct LeftOut {
    bytes: u64,
    told: u64,
    tell_ns: u64,
}

/// By target, file and name.
type Messages = BTreeMap<(TargetId, String, String), Message>;

impl Logs {
    /// `None` switches it off.
    pub(super) fn new(table: Option<Table>) -> Self {
        Self {
            table,
            marks: MARKS,
            reads: READS,
            tails: Vec::new(),
            scanned: FxHashMap::default(),
            focused: BTreeMap::new(),
            turn: 0,
            left_out: LeftOut::default(),
        }
    }

    /// Whose queues are suspicious now.
    pub(super) fn set_focused(&mut self, focused: &BTreeSet<TargetId>, now_ns: u64) {
        for target in focused {
            if self.focused.insert(*target, now_ns).is_none() {
                self.reads.hurry(now_ns, 0);
            }
        }
        self.focused
            .retain(|_, last_ns| last_ns.saturating_add(LINGER_NS) >= now_ns);
    }

    pub(super) fn is_due(&self, now_ns: u64) -> bool {
        self.table.is_some() && (self.marks.is_due(now_ns) || self.is_reading(now_ns))
    }

    fn is_reading(&self, now_ns: u64) -> bool {
        !self.focused.is_empty() && self.reads.is_due(now_ns)
    }

    /// One look, as far as it is due; `share` of a core is for each of its two parts. `processes` are those of the
    /// targets, in the order of their tgids.
    pub(super) fn look(
        &mut self,
        now_ns: u64,
        share: f64,
        targets: &[Target],
        processes: &[ProcessSeen],
        voice: &mut Voice,
    ) -> Vec<Message> {
        let mut messages = Messages::new();
        let Some(table) = self.table.take() else {
            return Vec::new();
        };
        let owners: FxHashMap<u32, TargetId> = targets
            .iter()
            .flat_map(|target| target.tgids.iter().map(|tgid| (*tgid, target.id)))
            .collect();
        if self.marks.is_due(now_ns) {
            let before_ns = cpu_time_ns();
            self.forget(now_ns, &owners, processes, &table, &mut messages);
            for at in 0..self.tails.len() {
                self.look_at(at, now_ns, &table, &mut messages);
            }
            self.scan(now_ns, &owners, processes, voice);
            let cost = cpu_time_ns().saturating_sub(before_ns);
            self.marks.looked(now_ns, cost, share);
        }
        if self.is_reading(now_ns) {
            let before_ns = cpu_time_ns();
            self.read(now_ns, &table, &mut messages, voice);
            let focused = |target: &TargetId| self.focused.contains_key(target);
            let theirs = owners.into_iter().filter(|(_, target)| focused(target));
            let theirs = theirs.collect();
            self.scan(now_ns, &theirs, processes, voice);
            let cost = cpu_time_ns().saturating_sub(before_ns);
            self.reads.looked(now_ns, cost, share);
        }
        self.tell_left_out(now_ns, voice);
        self.table = Some(table);
        messages.into_values().collect()
    }

    /// Processes that are gone, and files that nobody writes to any more.
    fn forget(
        &mut self,
        now_ns: u64,
        owners: &FxHashMap<u32, TargetId>,
        processes: &[ProcessSeen],
        table: &Table,
        messages: &mut Messages,
    ) {
        let lives = |tgid: u32, start_ns: u64| {
            let found = process(tgid, processes);
            found.is_some_and(|process| process.start_ns == start_ns)
        };
        self.scanned
            .retain(|tgid, scanned| lives(*tgid, scanned.start_ns));
        let mut changed = BTreeSet::new();
        for tail in &mut self.tails {
            if let Some(owner) = owners.get(&tail.tgid) {
                tail.target = *owner;
            }
            if tail.gone_ns.is_none() && !lives(tail.tgid, tail.start_ns) {
                tail.gone_ns = Some(now_ns);
                changed.insert(tail.target);
            }
            if !self.focused.contains_key(&tail.target) {
                tail.close();
            }
        }
        for target in changed {
            self.rescan(target, owners);
        }
        for tail in &mut self.tails {
            if is_over(tail, now_ns) {
                let mut heard = hear(messages, tail.target, tail.tgid, tail.path.clone());
                tail.finish(now_ns, table, &mut heard);
            }
        }
        self.tails.retain(|tail| !is_over(tail, now_ns));
    }

    fn rescan(&mut self, target: TargetId, owners: &FxHashMap<u32, TargetId>) {
        for (tgid, scanned) in &mut self.scanned {
            scanned.again |= owners.get(tgid) == Some(&target);
        }
    }

    /// What size a log has, and whether it is still the same.
    fn look_at(&mut self, at: usize, now_ns: u64, table: &Table, messages: &mut Messages) {
        let Some(tail) = self.tails.get_mut(at) else {
            return;
        };
        let target = tail.target;
        let mut heard = hear(messages, target, tail.tgid, tail.path.clone());
        let is_focused = self.focused.contains_key(&target);
        let read = is_focused.then_some((table, &mut heard as &mut tail::Heard<'_>));
        let was_gone = tail.gone_ns.is_some();
        if tail.look(now_ns, read) != Found::Same && !was_gone {
            let tgid = tail.tgid;
            if let Some(scanned) = self.scanned.get_mut(&tgid) {
                scanned.again = true;
            }
        }
    }

    /// Looks through the descriptors of processes where that is due, those never looked at first.
    fn scan(
        &mut self,
        now_ns: u64,
        owners: &FxHashMap<u32, TargetId>,
        processes: &[ProcessSeen],
        voice: &mut Voice,
    ) {
        let mut due: Vec<(u64, u32, TargetId)> = owners
            .iter()
            .filter_map(|(tgid, target)| {
                let every_ns = RESCAN_NS[usize::from(self.focused.contains_key(target))];
                match self.scanned.get(tgid) {
                    None => Some((0, *tgid, *target)),
                    Some(scanned) => (scanned.again
                        || scanned.at_ns.saturating_add(every_ns) <= now_ns)
                        .then_some((scanned.at_ns, *tgid, *target)),
                }
            })
            .collect();
        due.sort_unstable();
        let before_ns = cpu_time_ns();
        for (_, tgid, target) in due {
            if let Some(process) = process(tgid, processes) {
                self.scan_process(now_ns, target, process, voice);
            }
            if cpu_time_ns().saturating_sub(before_ns) > SCAN_NS {
                break;
            }
        }
        // A log that was replaced by one that we have already.
        let mut seen = BTreeSet::new();
        self.tails
            .retain(|tail| seen.insert((tail.target, tail.identity)));
    }

    fn scan_process(
        &mut self,
        now_ns: u64,
        target: TargetId,
        process: &ProcessSeen,
        voice: &mut Voice,
    ) {
        let scanned = Scanned {
            start_ns: process.start_ns,
            at_ns: now_ns,
            again: false,
        };
        let before = self.scanned.insert(process.tgid, scanned);
        let since_ns = before
            .filter(|before| before.start_ns == process.start_ns)
            .map(|before| before.at_ns);
        for log in open::logs(process.pid) {
            let identity = Identity::from(&log.metadata);
            let known = self
                .tails
                .iter_mut()
                .find(|tail| tail.target == target && tail.identity == identity);
            if let Some(tail) = known {
                if tail.gone_ns.is_some() {
                    tail.held_by(process, log.fd);
                }
                continue;
            }
            let of_target = self.tails.iter().filter(|tail| tail.target == target);
            if of_target.count() >= MAX_PER_TARGET || self.tails.len() >= MAX_LOGS {
                voice.tell_once("too_many_logs", || {
                    format!(
                        "{} is not read, nor may be others: of a service {MAX_PER_TARGET} logs are, of all {MAX_LOGS}",
                        log.path
                    )
                });
                continue;
            }
            let tail = Tail::new(target, process, log, since_ns, now_ns);
            self.tails.push(tail);
        }
    }

    /// What is new in the logs of suspicious targets, each in its turn.
    fn read(&mut self, now_ns: u64, table: &Table, messages: &mut Messages, voice: &mut Voice) {
        let focused = (0..self.tails.len()).filter(|at| {
            let tail = self.tails.get(*at);
            tail.is_some_and(|tail| self.focused.contains_key(&tail.target))
        });
        let mut focused: Vec<usize> = focused.collect();
        if focused.len() > MAX_READS {
            let turn = self.turn % focused.len();
            focused.rotate_left(turn);
            focused.truncate(MAX_READS);
            self.turn = turn + MAX_READS;
        }
        for at in focused {
            self.look_at(at, now_ns, table, messages);
            let Some(tail) = self.tails.get_mut(at) else {
                continue;
            };
            let mut heard = hear(messages, tail.target, tail.tgid, tail.path.clone());
            match tail.read(table, &mut heard) {
                Ok(left_out) => self.left_out.bytes = self.left_out.bytes.saturating_add(left_out),
                Err(error) => {
                    let path = tail.path.clone();
                    tail.close();
                    voice.tell_once("log_unreadable", || {
                        format!(
                            "cannot read the log {path}: {error}. Messages of full queues in it (and perhaps in others) \
                             are not seen; run the agent as root, or give it CAP_DAC_READ_SEARCH"
                        )
                    });
                }
            }
        }
    }

    fn tell_left_out(&mut self, now_ns: u64, voice: &mut Voice) {
        let total = self.left_out.bytes;
        if total > self.left_out.told && now_ns >= self.left_out.tell_ns {
            self.left_out.told = total;
            self.left_out.tell_ns = now_ns.saturating_add(TELL_NS);
            let each = bytes(tail::MAX_READ);
            voice.tell(
                "log_left_out",
                format!(
                    "{} of logs were not read so far: they grow by more than {each} between two looks. Messages in them \
                     are more than are counted",
                    bytes(total)
                ),
            );
        }
    }
}

fn is_over(tail: &Tail, now_ns: u64) -> bool {
    tail.gone_ns
        .is_some_and(|gone_ns| gone_ns.saturating_add(GONE_NS) <= now_ns)
}

fn process(tgid: u32, processes: &[ProcessSeen]) -> Option<&ProcessSeen> {
    let found = processes.binary_search_by_key(&tgid, |process| process.tgid);
    processes.get(found.ok()?)
}

/// Counts the known lines of one file.
fn hear<'a>(
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
            line: bounded(&String::from_utf8_lossy(line), MAX_KEPT),
            not_before_ns,
            not_after_ns,
        });
        message.count = message.count.saturating_add(1);
    }
}

#[cfg(test)]
mod tests;
