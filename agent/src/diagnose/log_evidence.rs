//! Log messages of services that report a full queue, kept for as long as an episode may refer to them.
//!
//! They are shown with a verdict as evidence. No rule depends on them.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use crate::{
    event::{Instant, LoggedMessage},
    queue::Targets,
    sample::{Message, Sample, TargetId},
};

/// Messages are kept for this time, ns. For a longer episode, only the messages of its last part are reported.
const KEPT_NS: u64 = 15 * 60 * 1_000_000_000;
/// A message that is repeated within this time is counted in the same entry, ns.
const MERGE_NS: u64 = 1_000_000_000;
/// Maximum number of entries kept, over all services. The oldest are dropped first.
const MAX_ENTRIES: usize = 8192;
/// Maximum number of different messages reported with one episode.
const MAX_REPORTED: usize = 16;

/// The log messages of all services.
#[derive(Default)]
pub struct LogEvidence {
    /// Oldest first.
    entries: VecDeque<Entry>,
    /// The newest entry of each message, by its number: entries are numbered from the first ever.
    newest: BTreeMap<Key, u64>,
    /// Number of entries dropped so far, which is also the number of the oldest entry kept.
    dropped: u64,
    /// When the last sample was taken. A message is never later.
    now: Instant,
}

/// Identifies a message.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    target: TargetId,
    /// Its name in the table of messages.
    name: Arc<str>,
    /// The log file.
    path: Arc<str>,
}

struct Entry {
    key: Key,
    count: u64,
    /// The first line.
    line: Arc<str>,
    /// When the first line was read, CLOCK_MONOTONIC, ns, as all times here.
    read_ns: u64,
    /// The first line was written between these times.
    not_before_ns: u64,
    not_after_ns: u64,
    /// The last line was written no later than this.
    until_ns: u64,
}

impl LogEvidence {
    /// Adds the messages of one sample.
    pub fn read(&mut self, sample: &Sample, targets: &Targets) {
        self.now = Instant {
            mono_ns: sample.mono_ns,
            unix_ns: sample.unix_ns,
        };
        for message in &sample.messages {
            // Ignore messages of processes that are no longer watched.
            if let Some(target) = targets.of(message.tgid) {
                self.add(target, message);
            }
        }
        let is_old = |entry: &Entry| entry.read_ns.saturating_add(KEPT_NS) < self.now.mono_ns;
        while self.entries.len() > MAX_ENTRIES || self.entries.front().is_some_and(is_old) {
            if let Some(entry) = self.entries.pop_front()
                && self.newest.get(&entry.key) == Some(&self.dropped)
            {
                self.newest.remove(&entry.key);
            }
            self.dropped += 1;
        }
    }

    fn add(&mut self, target: TargetId, message: &Message) {
        let now_ns = self.now.mono_ns;
        let mut key = Key {
            target,
            name: message.name.as_str().into(),
            path: message.path.as_str().into(),
        };
        let count = u64::from(message.count);
        if let Some((known, newest)) = self.newest.get_key_value(&key) {
            let index = newest.saturating_sub(self.dropped) as usize;
            let entry = self.entries.get_mut(index);
            if let Some(entry) = entry
                && entry.read_ns.saturating_add(MERGE_NS) > now_ns
            {
                entry.count = entry.count.saturating_add(count);
                entry.until_ns = entry.until_ns.max(message.not_after_ns.min(now_ns));
                return;
            }
            // Share the strings.
            key = known.clone();
        }
        let number = self.dropped + self.entries.len() as u64;
        self.newest.insert(key.clone(), number);
        self.entries.push_back(Entry {
            key,
            count,
            line: message.line.as_str().into(),
            read_ns: now_ns,
            not_before_ns: message.not_before_ns.min(now_ns),
            not_after_ns: message.not_after_ns.min(now_ns),
            until_ns: message.not_after_ns.min(now_ns),
        });
    }

    /// The messages of a service since the first sign of an episode, the most frequent first. `warned` is when the episode's
    /// warning was given.
    pub fn over(&self, target: TargetId, since: Instant, warned: Instant) -> Vec<LoggedMessage> {
        let mut found: BTreeMap<&Key, (u64, &Entry)> = BTreeMap::new();
        let entries = self
            .entries
            .iter()
            .filter(|entry| entry.key.target == target && entry.until_ns >= since.mono_ns);
        for entry in entries {
            let (count, first) = found.entry(&entry.key).or_insert((0, entry));
            *count = count.saturating_add(entry.count);
            if entry.not_after_ns < first.not_after_ns {
                *first = entry;
            }
        }
        let mut messages: Vec<LoggedMessage> = found
            .into_iter()
            .map(|(key, (count, first))| LoggedMessage {
                name: key.name.as_ref().to_owned(),
                path: key.path.as_ref().to_owned(),
                count,
                line: first.line.as_ref().to_owned(),
                first_unix_ns: self.unix_ns(first.not_after_ns),
                lead_ns: lead(first, warned.mono_ns),
            })
            .collect();
        messages.sort_by(|a, b| {
            let key = |one: &LoggedMessage| (one.first_unix_ns, one.name.clone(), one.path.clone());
            b.count.cmp(&a.count).then_with(|| key(a).cmp(&key(b)))
        });
        messages.truncate(MAX_REPORTED);
        messages
    }

    fn unix_ns(&self, mono_ns: u64) -> u64 {
        let ago_ns = self.now.mono_ns.saturating_sub(mono_ns);
        self.now.unix_ns.saturating_sub(ago_ns)
    }
}

/// How long before the message the warning was given, at least; negative if it was given after it. A line was written
/// between two reads of the file. If the warning was given in between, the order is not known.
fn lead(first: &Entry, warned_ns: u64) -> Option<i64> {
    let signed = |ns: u64| i64::try_from(ns).unwrap_or(i64::MAX);
    if warned_ns <= first.not_before_ns {
        Some(signed(first.not_before_ns - warned_ns))
    } else if first.not_after_ns <= warned_ns {
        Some(-signed(warned_ns - first.not_after_ns))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{queue::Model, sample::Target};

    const S: u64 = 1_000_000_000;
    const MS: u64 = 1_000_000;
    /// The wall clock less the monotonic clock, ns.
    const AHEAD: u64 = 1_000_000 * S;

    fn at(mono_ns: u64) -> Instant {
        Instant {
            mono_ns,
            unix_ns: AHEAD + mono_ns,
        }
    }

    /// Target 1 is process 10, target 2 process 20.
    fn model() -> Model {
        let target = |id, tgid| Target {
            id,
            tgids: vec![tgid],
            ..Target::default()
        };
        let mut model = Model::default();
        model.read(&Sample {
            targets: Some(vec![target(1, 10), target(2, 20)]),
            ..Sample::default()
        });
        model
    }

    /// Written within the last 250 ms.
    fn message(tgid: u32, name: &str, count: u32, now_ns: u64) -> Message {
        Message {
            tgid,
            path: format!("/var/log/{tgid}"),
            name: name.to_owned(),
            count,
            line: format!("{name} at {}", now_ns / S),
            not_before_ns: now_ns.saturating_sub(250 * MS),
            not_after_ns: now_ns,
        }
    }

    fn read(evidence: &mut LogEvidence, now_ns: u64, messages: Vec<Message>) {
        let sample = Sample {
            mono_ns: now_ns,
            unix_ns: AHEAD + now_ns,
            messages,
            ..Sample::default()
        };
        evidence.read(&sample, model().targets());
    }

    #[test]
    fn messages_since_the_first_sign_are_counted_with_their_lead() {
        let mut evidence = LogEvidence::default();
        read(
            &mut evidence,
            5 * S,
            vec![message(10, "queue_full", 9, 5 * S)],
        );
        for s in 12..20 {
            let fd = (s == 15).then(|| message(10, "fd_exhausted", 1, s * S));
            let full = [message(10, "queue_full", 2, s * S)];
            read(&mut evidence, s * S, full.into_iter().chain(fd).collect());
        }
        read(
            &mut evidence,
            20 * S,
            vec![message(20, "queue_full", 50, 20 * S)],
        );
        read(
            &mut evidence,
            20 * S,
            vec![message(99, "queue_full", 70, 20 * S)],
        );
        let found = evidence.over(1, at(10 * S), at(11 * S));
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].name.as_str(), found[0].count), ("queue_full", 16));
        assert_eq!(found[0].path, "/var/log/10");
        assert_eq!(found[0].line, "queue_full at 12");
        assert_eq!(found[0].first_unix_ns, AHEAD + 12 * S);
        assert_eq!(found[0].lead_ns, Some(750 * MS as i64));
        assert_eq!(found[1].lead_ns, Some(3_750 * MS as i64));
        // The service reported first. By how much is known only to 250 ms, the time between two reads.
        let found = evidence.over(1, at(10 * S), at(14 * S));
        assert_eq!(found[0].lead_ns, Some(-2_000 * MS as i64));
        assert_eq!(
            evidence.over(1, at(10 * S), at(11_900 * MS))[0].lead_ns,
            None
        );
        assert_eq!(evidence.over(2, at(10 * S), at(11 * S))[0].count, 50);
        assert_eq!(evidence.over(3, at(10 * S), at(11 * S)), []);
        assert_eq!(evidence.over(1, at(30 * S), at(31 * S)), []);
    }

    #[test]
    fn a_message_written_before_the_first_sign_and_read_after_it_does_not_count() {
        let mut evidence = LogEvidence::default();
        let mut late = message(10, "queue_full", 3, 8 * S);
        late.not_before_ns = 7 * S;
        read(&mut evidence, 12 * S, vec![late]);
        assert_eq!(evidence.over(1, at(10 * S), at(11 * S)), []);
        let found = evidence.over(1, at(8 * S), at(11 * S));
        assert_eq!((found[0].count, found[0].lead_ns), (3, Some(-3 * S as i64)));
        assert_eq!(found[0].first_unix_ns, AHEAD + 8 * S);
    }

    #[test]
    fn messages_within_one_second_are_merged() {
        let mut evidence = LogEvidence::default();
        for sample in 0..40 {
            let now_ns = 10 * S + sample * 250 * MS;
            read(
                &mut evidence,
                now_ns,
                vec![message(10, "queue_full", 5, now_ns)],
            );
        }
        assert_eq!(evidence.entries.len(), 10);
        assert_eq!(evidence.over(1, at(0), at(0))[0].count, 200);
    }

    #[test]
    fn old_entries_are_dropped_and_their_number_is_bounded() {
        let mut evidence = LogEvidence::default();
        read(&mut evidence, S, vec![message(10, "queue_full", 5, S)]);
        read(&mut evidence, 2 * KEPT_NS, Vec::new());
        assert!(evidence.entries.is_empty() && evidence.newest.is_empty());
        let now_ns = 2 * KEPT_NS;
        for index in 0..20_000 {
            let many = message(10, &format!("own_{}", index % 12_000), 1, now_ns);
            read(&mut evidence, now_ns, vec![many]);
        }
        assert_eq!(evidence.entries.len(), MAX_ENTRIES);
        assert!(evidence.newest.len() <= MAX_ENTRIES);
        assert_eq!(evidence.over(1, at(0), at(0)).len(), MAX_REPORTED);
    }

    #[test]
    fn invalid_times_and_counts_do_not_panic() {
        let mut evidence = LogEvidence::default();
        for (mono_ns, from, to, count) in [
            (u64::MAX, 0, u64::MAX, u32::MAX),
            (0, u64::MAX, 0, u32::MAX),
            (5, u64::MAX, u64::MAX, 0),
        ] {
            let mut message = message(10, "queue_full", count, 1);
            (message.not_before_ns, message.not_after_ns) = (from, to);
            let sample = Sample {
                mono_ns,
                messages: vec![message],
                ..Sample::default()
            };
            evidence.read(&sample, model().targets());
            let found = evidence.over(1, at(0), at(u64::MAX / 2));
            assert!(found.len() <= 1);
        }
    }
}
