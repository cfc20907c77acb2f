//! Queues inside services, from the answers of the services themselves.
//!
//! A service is asked every few seconds, so a reading covers the time since its previous answer. Counters give rates and the mean
//! wait; without them, Little's law gives the wait where departures are known.

use std::{collections::BTreeMap, sync::Arc};

use super::{Kind, QueueId, Reading, Sink, Source, Targets, littles_law};
use crate::{
    hash::{HashMap, HashSet},
    sample::{AppAnswer, AppQueue, Sample, TargetId},
    text,
};

/// Longest text of the values beside a queue, bytes: it is one column of a table.
const MAX_CONTEXT_BYTES: usize = 200;

#[derive(Default)]
pub(super) struct Apps {
    /// By process and preset.
    processes: BTreeMap<(u32, Arc<str>), Process>,
    /// Queues of the last answers: what is no longer in it has ended.
    current: HashSet<(TargetId, QueueId)>,
}

/// The last answer of one process to one preset.
struct Process {
    target: TargetId,
    queues: HashMap<Arc<str>, Known>,
}

/// The last answer about one queue.
struct Known {
    id: QueueId,
    at_ns: u64,
    queue: AppQueue,
    reading: Reading,
    /// It was seen that others take items from it.
    is_drained: bool,
    /// Since when nothing has left it although items wait, ns.
    stuck_since_ns: Option<u64>,
    /// Time of the first of the consecutive answers that report no consumers, ns.
    no_consumers_since_ns: Option<u64>,
}

impl Source for Apps {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        let before = self.processes.len();
        // A process that has ended, or that another service has taken over, reports nothing any more.
        self.processes
            .retain(|(tgid, _), process| targets.of(*tgid) == Some(process.target));
        let mut has_changed = self.processes.len() != before;
        for answer in &sample.app {
            let Some(target) = targets.of(answer.tgid) else {
                continue;
            };
            let Some(queues) = &answer.queues else {
                continue;
            };
            has_changed = true;
            self.read_answer(target, answer, queues, sink);
        }
        if has_changed {
            let all = self.processes.values().flat_map(|process| {
                let queues = process.queues.values();
                queues.map(|known| (process.target, known.id.clone()))
            });
            self.current = all.collect();
            let current = &self.current;
            let gone = sink.keys.remove(
                |_, kind| kind == Kind::App,
                |key| !current.contains(&(key.target, key.id.clone())),
            );
            sink.out.gone.extend(gone);
        }
    }
}

impl Apps {
    fn read_answer(
        &mut self,
        target: TargetId,
        answer: &AppAnswer,
        queues: &[AppQueue],
        sink: &mut Sink<'_>,
    ) {
        let preset: Arc<str> = answer.preset.as_str().into();
        let process = self
            .processes
            .entry((answer.tgid, Arc::clone(&preset)))
            .or_insert_with(|| Process {
                target,
                queues: HashMap::default(),
            });
        let mut known = HashMap::default();
        for queue in queues {
            let name: Arc<str> = queue.name.as_str().into();
            let id = QueueId::App {
                preset: Arc::clone(&preset),
                name: Arc::clone(&name),
            };
            let before = process.queues.get(&name);
            let is_new = before.is_none_or(|before| before.at_ns != answer.at_ns);
            let reading = match before {
                Some(before) if !is_new => again(&before.reading),
                before => reading(before, queue, answer.at_ns),
            };
            let is_drained =
                before.is_some_and(|before| before.is_drained) || is_drained(queue, &reading);
            let has_none = is_drained && queue.consumers == Some(0);
            let no_consumers_since_ns = has_none.then(|| {
                let since_ns = before.and_then(|before| before.no_consumers_since_ns);
                since_ns.unwrap_or(answer.at_ns)
            });
            let stuck_since_ns = match is_new {
                true => stuck_since_ns(before, &reading),
                false => before.and_then(|before| before.stuck_since_ns),
            };
            // The oldest item has waited for at least this time.
            let stuck_ns = stuck_since_ns.map(|since_ns| answer.at_ns.saturating_sub(since_ns));
            let reading = Reading {
                oldest_age_ns: reading.oldest_age_ns.or(stuck_ns),
                no_consumers_ns: no_consumers_since_ns
                    .map(|since_ns| answer.at_ns.saturating_sub(since_ns)),
                ..reading
            };
            sink.put(target, Kind::App, &id, reading.clone());
            let now = Known {
                id,
                at_ns: answer.at_ns,
                queue: queue.clone(),
                reading,
                is_drained,
                stuck_since_ns,
                no_consumers_since_ns,
            };
            known.insert(name, now);
        }
        process.queues = known;
    }
}

fn reading(before: Option<&Known>, now: &AppQueue, at_ns: u64) -> Reading {
    let elapsed_ns = before.and_then(|before| at_ns.checked_sub(before.at_ns));
    let elapsed_ns = elapsed_ns.filter(|elapsed_ns| *elapsed_ns > 0);
    let before = before.filter(|_| elapsed_ns.is_some());
    let before = before.map(|before| &before.queue);
    let grown = |field: fn(&AppQueue) -> Option<u64>| grown(field(before?), field(now));
    let (entered, left) = (grown(|queue| queue.entered), grown(|queue| queue.left));
    let (entered, left) = balanced(before, now, entered, left);
    let (waited_ns, waits) = (grown(|queue| queue.waited_ns), grown(|queue| queue.waits));
    let mean_wait_ns = waited_ns.zip(waits).and_then(|(waited_ns, waits)| {
        // Nothing has left: it says nothing about the wait.
        waited_ns.checked_div(waits)
    });
    let fill = now
        .limit
        .filter(|limit| now.limit_rejects && *limit > 0)
        .map(|limit| now.depth as f64 / limit as f64);
    let extra = [
        ("serving", now.serving),
        ("slots", now.slots),
        ("consumers", now.consumers),
    ];
    let extra = extra
        .into_iter()
        .filter_map(|(name, value)| Some((name, value? as f64)));
    Reading {
        depth: now.depth,
        limit: now.limit,
        unit: Some(now.unit.name()),
        fill,
        full: fill.is_some_and(|fill| fill >= 1.0),
        arrivals: entered,
        departures: left,
        elapsed_ns,
        served: left,
        servers: servers(now),
        wait_ns: mean_wait_ns
            .or_else(|| left.and_then(|left| littles_law(now.depth, left, elapsed_ns))),
        oldest_age_ns: now.oldest_ns.filter(|_| now.depth > 0),
        losses: grown(|queue| queue.lost).unwrap_or(0),
        worst: context(now),
        extra: extra.collect(),
        ..Reading::default()
    }
}

/// Whether others take items from a queue. Queues of failed or delayed messages, and abandoned groups of a stream, only keep what is in
/// them: that nothing leaves them is not a fault. Where departures are counted, only these are proof: the consumers of a stream stay
/// registered after they have ended.
fn is_drained(queue: &AppQueue, reading: &Reading) -> bool {
    let has_consumers = queue.consumers.is_some_and(|consumers| consumers > 0);
    reading.departures.is_some_and(|left| left > 0) || has_consumers && queue.left.is_none()
}

/// Since when nothing has left a queue that others take items from: since the last answer before, if items were waiting then.
fn stuck_since_ns(before: Option<&Known>, now: &Reading) -> Option<u64> {
    let before = before.filter(|before| {
        before.is_drained && before.queue.depth > 0 && now.departures == Some(0)
    })?;
    before.stuck_since_ns.or(Some(before.at_ns))
}

/// The reading of an answer that is reported once more: what it counted is not counted again.
fn again(reading: &Reading) -> Reading {
    Reading {
        arrivals: None,
        departures: None,
        served: None,
        elapsed_ns: None,
        losses: 0,
        ..reading.clone()
    }
}

/// Growth of a counter. `None` if it went back: the service has restarted, or counts anew.
fn grown(before: Option<u64>, now: Option<u64>) -> Option<u64> {
    now?.checked_sub(before?)
}

/// Computes arrivals from departures, or the reverse: items that entered and have not left are in the queue.
fn balanced(
    before: Option<&AppQueue>,
    now: &AppQueue,
    entered: Option<u64>,
    left: Option<u64>,
) -> (Option<u64>, Option<u64>) {
    let Some(before) = before else {
        return (None, None);
    };
    let sum = |first: u64, second: u64| {
        let sum = i128::from(first) + i128::from(second);
        u64::try_from(sum).ok()
    };
    match (entered, left) {
        // entered = left + depth now - depth before
        (None, Some(left)) => {
            let arrivals = sum(left, now.depth).and_then(|sum| sum.checked_sub(before.depth));
            (arrivals, Some(left))
        }
        (Some(entered), None) => {
            let departures = sum(entered, before.depth).and_then(|sum| sum.checked_sub(now.depth));
            (Some(entered), departures)
        }
        both => both,
    }
}

/// How many items may be in service at once, as far as the service reports it; at least 1.
fn servers(queue: &AppQueue) -> u32 {
    let servers = queue.slots.or(queue.consumers).unwrap_or(1);
    u32::try_from(servers).unwrap_or(u32::MAX).max(1)
}

/// The values beside the queue, for display: `kv_cache_usage_perc 0.97`.
fn context(queue: &AppQueue) -> Option<String> {
    let idle = (queue.depth > 0 && queue.consumers == Some(0)).then(|| "no consumers".to_owned());
    let values = queue.context.iter();
    let values = values.map(|(name, value)| {
        let rounded = (value * 1_000.0).round() / 1_000.0;
        format!("{name} {rounded}")
    });
    let words: Vec<String> = idle.into_iter().chain(values).collect();
    (!words.is_empty()).then(|| text::bounded(&words.join(", "), MAX_CONTEXT_BYTES))
}

#[cfg(test)]
mod tests {
    use super::super::{Kind, Reading, watched::Watched};
    use crate::sample::{AppAnswer, AppQueue, AppUnit, Sample};

    const SECOND: u64 = 1_000_000_000;

    fn orders(depth: u64) -> AppQueue {
        AppQueue {
            name: "orders".to_owned(),
            unit: AppUnit::Messages,
            depth,
            ..AppQueue::default()
        }
    }

    fn answer(at_s: u64, queues: Option<Vec<AppQueue>>) -> Sample {
        let answer = AppAnswer {
            tgid: 12,
            preset: "rabbitmq".to_owned(),
            at_ns: at_s * SECOND,
            took_ns: 1,
            queues,
        };
        Sample {
            app: vec![answer],
            ..Sample::default()
        }
    }

    fn two(first: AppQueue, second: AppQueue) -> Reading {
        let mut watched = Watched::default();
        watched.read(Kind::App, answer(1, Some(vec![first])));
        let mut queues = watched.read(Kind::App, answer(3, Some(vec![second])));
        assert_eq!(queues.len(), 1, "{queues:?}");
        queues.remove(0).1
    }

    #[test]
    fn counters_give_rates_and_the_mean_wait() {
        let queue = |entered, left, waited_ns, waits| AppQueue {
            entered: Some(entered),
            left: Some(left),
            waited_ns: Some(waited_ns),
            waits: Some(waits),
            ..orders(20)
        };
        let reading = two(queue(100, 90, SECOND, 90), queue(140, 120, 4 * SECOND, 120));
        assert_eq!((reading.arrivals, reading.departures), (Some(40), Some(30)));
        assert_eq!(reading.wait_ns, Some(SECOND / 10));
        assert_eq!(reading.elapsed_ns, Some(2 * SECOND));
        assert_eq!(reading.unit, Some("messages"));
    }

    #[test]
    fn a_missing_counter_follows_from_the_other_one_and_the_depth() {
        let left = |depth, left| AppQueue {
            left: Some(left),
            ..orders(depth)
        };
        let reading = two(left(5, 10), left(9, 12));
        assert_eq!((reading.arrivals, reading.departures), (Some(6), Some(2)));
        // Little's law: 9 waiting, 1 a second.
        assert_eq!(reading.wait_ns, Some(9 * SECOND));
        let entered = |depth, entered| AppQueue {
            entered: Some(entered),
            ..orders(depth)
        };
        let reading = two(entered(9, 10), entered(5, 12));
        assert_eq!((reading.arrivals, reading.departures), (Some(2), Some(6)));
        let reading = two(entered(9, u64::MAX - 1), entered(u64::MAX, u64::MAX));
        assert_eq!((reading.arrivals, reading.departures), (Some(1), None));
    }

    #[test]
    fn what_the_service_does_not_report_is_absent() {
        let reading = two(orders(5), orders(7));
        assert_eq!((reading.arrivals, reading.departures), (None, None));
        assert_eq!((reading.wait_ns, reading.oldest_age_ns), (None, None));
        assert_eq!((reading.limit, reading.fill), (None, None));
        assert!(reading.extra.is_empty() && reading.worst.is_none());
    }

    #[test]
    fn an_item_has_waited_at_least_since_anything_left() {
        let queue = |depth, left| AppQueue {
            left: Some(left),
            ..orders(depth)
        };
        let mut watched = Watched::default();
        let mut oldest = |at_s, depth, left| {
            let queues = watched.read(Kind::App, answer(at_s, Some(vec![queue(depth, left)])));
            queues[0].1.oldest_age_ns
        };
        assert_eq!(oldest(1, 0, 4), None);
        assert_eq!(oldest(3, 4, 5), None);
        assert_eq!(oldest(5, 4, 5), Some(2 * SECOND));
        assert_eq!(oldest(7, 6, 5), Some(4 * SECOND));
        assert_eq!(oldest(7, 6, 5), Some(4 * SECOND));
        assert_eq!(oldest(9, 5, 6), None);
        assert_eq!(oldest(11, 5, 6), Some(2 * SECOND));
    }

    #[test]
    fn a_queue_that_nobody_was_seen_to_drain_is_not_stuck() {
        let abandoned_group = |depth| AppQueue {
            left: Some(5),
            consumers: Some(2),
            ..orders(depth)
        };
        let failed_messages = |depth| AppQueue {
            entered: Some(depth),
            consumers: Some(0),
            ..orders(depth)
        };
        let unused_durable = |depth| AppQueue {
            left: Some(0),
            ..orders(depth)
        };
        for queue in [abandoned_group, failed_messages, unused_durable] {
            let mut watched = Watched::default();
            for at_s in 1..9 {
                let sample = answer(at_s, Some(vec![queue(at_s)]));
                let reading = watched.read(Kind::App, sample).remove(0).1;
                let proof = (reading.oldest_age_ns, reading.no_consumers_ns);
                assert_eq!(proof, (None, None));
            }
        }
    }

    #[test]
    fn a_queue_whose_consumers_have_ended_says_for_how_long() {
        let mut watched = Watched::default();
        let mut since = |at_s, consumers| {
            let queue = AppQueue {
                consumers: Some(consumers),
                ..orders(5)
            };
            let queues = watched.read(Kind::App, answer(at_s, Some(vec![queue])));
            queues[0].1.no_consumers_ns
        };
        assert_eq!(since(1, 0), None);
        assert_eq!(since(2, 4), None);
        assert_eq!(since(3, 0), Some(0));
        assert_eq!(since(3, 0), Some(0));
        assert_eq!(since(5, 0), Some(2 * SECOND));
        assert_eq!(since(6, 1), None);
        assert_eq!(since(7, 0), Some(0));
    }

    #[test]
    fn a_counter_that_went_back_gives_no_rate() {
        let queue = |left| AppQueue {
            left: Some(left),
            lost: Some(left),
            ..orders(5)
        };
        let reading = two(queue(100), queue(3));
        assert_eq!((reading.departures, reading.losses), (None, 0));
    }

    #[test]
    fn only_a_limit_that_rejects_counts_as_fill() {
        let queue = |limit_rejects| AppQueue {
            limit: Some(10),
            limit_rejects,
            ..orders(10)
        };
        let reading = two(queue(false), queue(false));
        assert_eq!((reading.fill, reading.full), (None, false));
        let reading = two(queue(true), queue(true));
        assert_eq!((reading.fill, reading.full), (Some(1.0), true));
    }

    #[test]
    fn a_queue_without_consumers_says_so() {
        let queue = |depth| AppQueue {
            consumers: Some(0),
            context: vec![("alarms".to_owned(), 1.0)],
            ..orders(depth)
        };
        let reading = two(queue(1), queue(2));
        assert_eq!(reading.worst.as_deref(), Some("no consumers, alarms 1"));
        assert_eq!(two(queue(1), queue(0)).worst.as_deref(), Some("alarms 1"));
    }

    #[test]
    fn a_queue_ends_when_an_answer_lacks_it_and_not_when_there_is_no_answer() {
        let mut watched = Watched::default();
        watched.read(Kind::App, answer(1, Some(vec![orders(3)])));
        assert!(watched.read(Kind::App, answer(2, None)).is_empty());
        assert!(watched.gone().is_empty());
        watched.read(Kind::App, Sample::default());
        assert!(watched.gone().is_empty());
        watched.read(Kind::App, answer(3, Some(Vec::new())));
        assert_eq!(watched.gone(), ["rabbitmq: orders"]);
    }

    #[test]
    fn an_answer_that_is_reported_again_is_not_counted_again() {
        let queue = |left| AppQueue {
            left: Some(left),
            lost: Some(left),
            ..orders(5)
        };
        let mut watched = Watched::default();
        watched.read(Kind::App, answer(1, Some(vec![queue(10)])));
        let counted = watched.read(Kind::App, answer(2, Some(vec![queue(12)])));
        assert_eq!((counted[0].1.departures, counted[0].1.losses), (Some(2), 2));
        let again = watched.read(Kind::App, answer(2, Some(vec![queue(12)])));
        assert_eq!((again[0].1.departures, again[0].1.losses), (None, 0));
        assert_eq!(again[0].1.wait_ns, counted[0].1.wait_ns);
    }

    #[test]
    fn queues_of_other_processes_are_left_out() {
        let mut watched = Watched::of(&[99]);
        assert!(
            watched
                .read(Kind::App, answer(1, Some(vec![orders(3)])))
                .is_empty()
        );
    }
}
