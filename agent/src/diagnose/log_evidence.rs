//! What targets said in their own logs, remembered for as long as an episode may ask for it.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use super::LoggedMessage;
use crate::{
    event::Instant,
    queue::Targets,
    sample::{Message, Sample, TargetId},
};

/// So long they are remembered: of a longer episode, what was said in its last part.
const REMEMBERED_NS: u64 = 15 * 60 * 1_000_000_000;
/// What is said again within this time is counted with it.
const TOGETHER_NS: u64 = 1_000_000_000;
/// Entries of all targets; of more, the oldest are forgotten first.
const MAX_ENTRIES: usize = 8192;
/// Different messages that an episode is given.
const MAX_SAID: usize = 16;

/// What targets said.
#[derive(Default)]
pub struct LogEvidence {
    /// In the order of their coming.
    entries: VecDeque<Entry>,
    /// Where the newest entry of each message stands, counted from the first entry ever.
    newest: BTreeMap<Key, u64>,
    /// Entries that were forgotten.
    gone: u64,
    /// The last sample: a message is told within it.
    now: Instant,
}

/// Which message it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    target: TargetId,
    name: Arc<str>,
    path: Arc<str>,
}

struct Entry {
    key: Key,
    count: u64,
    line: Arc<str>,
    /// When it was begun.
    heard_ns: u64,
    /// Between which times its first line was written, and by when its last one was; CLOCK_MONOTONIC, ns.
    not_before_ns: u64,
    not_after_ns: u64,
    until_ns: u64,
}

impl LogEvidence {
    /// Takes in what one sample says.
    pub fn read(&mut self, sample: &Sample, targets: &Targets) {
        self.now = Instant {
            mono_ns: sample.mono_ns,
            unix_ns: sample.unix_ns,
        };
        for message in &sample.messages {
            // A process that has just been given up, or that was never watched.
            if let Some(target) = targets.of(message.tgid) {
                self.add(target, message);
            }
        }
        let is_old =
            |entry: &Entry| entry.heard_ns.saturating_add(REMEMBERED_NS) < self.now.mono_ns;
        while self.entries.len() > MAX_ENTRIES || self.entries.front().is_some_and(is_old) {
            if let Some(entry) = self.entries.pop_front()
                && self.newest.get(&entry.key) == Some(&self.gone)
            {
                self.newest.remove(&entry.key);
            }
            self.gone += 1;
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
            let index = newest.saturating_sub(self.gone) as usize;
            let entry = self.entries.get_mut(index);
            if let Some(entry) = entry
                && entry.heard_ns.saturating_add(TOGETHER_NS) > now_ns
            {
                entry.count = entry.count.saturating_add(count);
                entry.until_ns = entry.until_ns.max(message.not_after_ns.min(now_ns));
                return;
            }
            // The same words are kept once.
            key = known.clone();
        }
        let written = self.gone + self.entries.len() as u64;
        self.newest.insert(key.clone(), written);
        self.entries.push_back(Entry {
            key,
            count,
            line: message.line.as_str().into(),
            heard_ns: now_ns,
            not_before_ns: message.not_before_ns.min(now_ns),
            not_after_ns: message.not_after_ns.min(now_ns),
            until_ns: message.not_after_ns.min(now_ns),
        });
    }

    /// What a target said from the first sign of an episode on, most often said first.
    pub fn over(&self, target: TargetId, since: Instant, warned: Instant) -> Vec<LoggedMessage> {
        let mut said: BTreeMap<&Key, (u64, &Entry)> = BTreeMap::new();
        let entries = self
            .entries
            .iter()
            .filter(|entry| entry.key.target == target && entry.until_ns >= since.mono_ns);
        for entry in entries {
            let (count, first) = said.entry(&entry.key).or_insert((0, entry));
            *count = count.saturating_add(entry.count);
            if entry.not_after_ns < first.not_after_ns {
                *first = entry;
            }
        }
        let mut said: Vec<LoggedMessage> = said
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
        said.sort_by(|a, b| {
            let key =
                |said: &LoggedMessage| (said.first_unix_ns, said.name.clone(), said.path.clone());
            b.count.cmp(&a.count).then_with(|| key(a).cmp(&key(b)))
        });
        said.truncate(MAX_SAID);
        said
    }

    fn unix_ns(&self, mono_ns: u64) -> u64 {
        let ago_ns = self.now.mono_ns.saturating_sub(mono_ns);
        self.now.unix_ns.saturating_sub(ago_ns)
    }
}

/// How long before the message the warning came, or after it, at least. When the line was written is known from two looks: with
/// the warning between them, nobody knows which was first.
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
    /// The wall clock is so far ahead.
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

    fn hear(heard: &mut LogEvidence, now_ns: u64, messages: Vec<Message>) {
        let sample = Sample {
            mono_ns: now_ns,
            unix_ns: AHEAD + now_ns,
            messages,
            ..Sample::default()
        };
        heard.read(&sample, model().targets());
    }

    #[test]
    fn what_was_said_since_the_first_sign_is_counted_with_its_lead() {
        let mut heard = LogEvidence::default();
        hear(&mut heard, 5 * S, vec![message(10, "queue_full", 9, 5 * S)]);
        for s in 12..20 {
            let fd = (s == 15).then(|| message(10, "fd_exhausted", 1, s * S));
            let full = [message(10, "queue_full", 2, s * S)];
            hear(&mut heard, s * S, full.into_iter().chain(fd).collect());
        }
        hear(
            &mut heard,
            20 * S,
            vec![message(20, "queue_full", 50, 20 * S)],
        );
        hear(
            &mut heard,
            20 * S,
            vec![message(99, "queue_full", 70, 20 * S)],
        );
        let said = heard.over(1, at(10 * S), at(11 * S));
        assert_eq!(said.len(), 2);
        assert_eq!((said[0].name.as_str(), said[0].count), ("queue_full", 16));
        assert_eq!(said[0].path, "/var/log/10");
        assert_eq!(said[0].line, "queue_full at 12");
        assert_eq!(said[0].first_unix_ns, AHEAD + 12 * S);
        assert_eq!(said[0].lead_ns, Some(750 * MS as i64));
        assert_eq!(said[1].lead_ns, Some(3_750 * MS as i64));
        // The service was first; by how much is known to a quarter of a second.
        let said = heard.over(1, at(10 * S), at(14 * S));
        assert_eq!(said[0].lead_ns, Some(-2_000 * MS as i64));
        assert_eq!(heard.over(1, at(10 * S), at(11_900 * MS))[0].lead_ns, None);
        assert_eq!(heard.over(2, at(10 * S), at(11 * S))[0].count, 50);
        assert_eq!(heard.over(3, at(10 * S), at(11 * S)), []);
        assert_eq!(heard.over(1, at(30 * S), at(31 * S)), []);
    }

    #[test]
    fn what_was_written_before_the_sign_and_read_after_it_does_not_count() {
        let mut heard = LogEvidence::default();
        let mut late = message(10, "queue_full", 3, 8 * S);
        late.not_before_ns = 7 * S;
        hear(&mut heard, 12 * S, vec![late]);
        assert_eq!(heard.over(1, at(10 * S), at(11 * S)), []);
        let said = heard.over(1, at(8 * S), at(11 * S));
        assert_eq!((said[0].count, said[0].lead_ns), (3, Some(-3 * S as i64)));
        assert_eq!(said[0].first_unix_ns, AHEAD + 8 * S);
    }

    #[test]
    fn messages_of_one_second_are_one_entry() {
        let mut heard = LogEvidence::default();
        for look in 0..40 {
            let now_ns = 10 * S + look * 250 * MS;
            hear(
                &mut heard,
                now_ns,
                vec![message(10, "queue_full", 5, now_ns)],
            );
        }
        assert_eq!(heard.entries.len(), 10);
        assert_eq!(heard.over(1, at(0), at(0))[0].count, 200);
    }

    #[test]
    fn old_ones_are_forgotten_and_so_are_too_many() {
        let mut heard = LogEvidence::default();
        hear(&mut heard, S, vec![message(10, "queue_full", 5, S)]);
        hear(&mut heard, 2 * REMEMBERED_NS, Vec::new());
        assert!(heard.entries.is_empty() && heard.newest.is_empty());
        let now_ns = 2 * REMEMBERED_NS;
        for index in 0..20_000 {
            let many = message(10, &format!("own_{}", index % 12_000), 1, now_ns);
            hear(&mut heard, now_ns, vec![many]);
        }
        assert_eq!(heard.entries.len(), MAX_ENTRIES);
        assert!(heard.newest.len() <= MAX_ENTRIES);
        assert_eq!(heard.over(1, at(0), at(0)).len(), MAX_SAID);
    }

    #[test]
    fn nonsense_times_and_counts_do_no_harm() {
        let mut heard = LogEvidence::default();
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
            heard.read(&sample, model().targets());
            let said = heard.over(1, at(0), at(u64::MAX / 2));
            assert!(said.len() <= 1);
        }
    }
}
