//! Pipes and FIFOs: buffers between two processes, or two threads of one.

use std::collections::{BTreeMap, HashMap};

use super::{Kind, Reading, Sink, Source, Targets, advance, head::Head, little};
use crate::sample::{Pipe, Sample, TargetId};

#[derive(Default)]
pub(super) struct Pipes {
    known: HashMap<(TargetId, u64), Known>,
}

/// What is remembered of one pipe.
struct Known {
    head: u32,
    tail: u32,
    seen_ns: u64,
    consumer: Head,
}

/// One pipe as one target holds it: through one end or both.
struct Held<'a> {
    pipe: &'a Pipe,
    reads: bool,
    writes: bool,
}

impl Source for Pipes {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.walks.files {
            return;
        }
        let mut held: BTreeMap<(TargetId, u64), Held<'_>> = BTreeMap::new();
        for pipe in &sample.pipes {
            let Some(target) = targets.of(pipe.tgid) else {
                continue;
            };
            let entry = held.entry((target, pipe.inode)).or_insert(Held {
                pipe,
                reads: false,
                writes: false,
            });
            entry.reads |= pipe.reads;
            entry.writes |= pipe.writes;
        }
        let mut known = HashMap::with_capacity(held.len());
        for ((target, inode), held) in held {
            let before = self.known.remove(&(target, inode));
            let (reading, now) =
                held.reading(before.as_ref(), sample.mono_ns, targets.threads(target));
            sink.put(target, Kind::Pipe, &format!("pipe:[{inode}]"), reading);
            known.insert((target, inode), now);
        }
        self.known = known;
        sink.forget_unseen(Kind::Pipe);
    }
}

impl Held<'_> {
    fn reading(&self, before: Option<&Known>, now_ns: u64, servers: u32) -> (Reading, Known) {
        let Pipe { head, tail, .. } = *self.pipe;
        let depth = advance(tail, head);
        let limit = u64::from(self.pipe.limit);
        let arrivals = before.map(|before| advance(before.head, head));
        let departures = before.map(|before| advance(before.tail, tail));
        let elapsed_ns = before.map(|before| now_ns.saturating_sub(before.seen_ns));
        let mut consumer = before.map_or_else(Head::default, |before| before.consumer);
        let oldest_ns = consumer.look(tail, depth > 0, now_ns);
        let mut extra = vec![
            ("readers", f64::from(self.pipe.readers)),
            ("writers", f64::from(self.pipe.writers)),
        ];
        if let Some(bytes) = self.pipe.bytes {
            extra.push(("bytes", f64::from(bytes)));
        }
        let ends = match (self.reads, self.writes) {
            (true, true) => "both ends",
            (true, false) => "read end",
            _ => "write end",
        };
        let reading = Reading {
            depth,
            limit: Some(limit),
            unit: None,
            fill: Some(depth as f64 / limit.max(1) as f64),
            full: depth >= limit,
            arrivals,
            departures,
            elapsed_ns,
            served: departures,
            servers: if self.reads { servers } else { 1 },
            wait_ns: if depth == 0 {
                Some(0)
            } else {
                little(depth, departures.unwrap_or(0), elapsed_ns)
            },
            oldest_ns,
            ages_ns: Vec::new(),
            losses: 0,
            worst: (depth > 0)
                .then(|| format!("{ends} at process {} fd {}", self.pipe.tgid, self.pipe.fd)),
            extra,
        };
        let now = Known {
            head,
            tail,
            seen_ns: now_ns,
            consumer,
        };
        (reading, now)
    }
}
