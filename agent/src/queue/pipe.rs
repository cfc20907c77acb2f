//! Pipes and FIFOs: buffers between two processes, or between threads of one.

use crate::hash::HashMap;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    Kind, QueueId, Reading, Sink, Source, Targets, advance, head::Head, inflow::Inflow, littles_law,
};
use crate::{
    sample::{Holder, Pipe, Sample, TargetId},
    text,
};

/// Longest part of a FIFO's path that is reported, bytes. Paths may be up to 4,096 bytes long.
const MAX_PATH_BYTES: usize = 512;

#[derive(Default)]
pub(super) struct Pipes {
    known: HashMap<PipeKey, Known>,
}

/// Identifies a pipe between samples. Inodes of pipes and of FIFOs come from different file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct PipeKey {
    target: TargetId,
    is_fifo: bool,
    inode: u64,
}

/// State kept per pipe.
struct Known {
    id: QueueId,
    head: u32,
    tail: u32,
    bytes: Option<u32>,
    seen_ns: u64,
    consumer: Head,
    inflow: Inflow,
}

/// One pipe that a target holds one or both ends of.
struct HeldPipe<'a> {
    pipe: &'a Pipe,
    /// The first process and descriptor of the target at each end.
    read_end: Option<(u32, u32)>,
    write_end: Option<(u32, u32)>,
}

impl Source for Pipes {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.scans.files {
            return;
        }
        let held = held(sample, targets);
        let mut names = Names::kept(&self.known, &held);
        let mut known = HashMap::with_capacity_and_hasher(held.len(), Default::default());
        for (key, held) in held {
            let before = self.known.remove(&key);
            let id = match &before {
                Some(before) => before.id.clone(),
                None => names.give(key, held.pipe),
            };
            let (reading, now) = held.reading(key, id, before.as_ref(), sample.mono_ns, targets);
            sink.put(key.target, Kind::Pipe, &now.id, reading);
            known.insert(key, now);
        }
        self.known = known;
        sink.forget_unseen(Kind::Pipe);
    }
}

fn held<'a>(sample: &'a Sample, targets: &Targets) -> BTreeMap<PipeKey, HeldPipe<'a>> {
    let mut held = BTreeMap::new();
    for pipe in &sample.pipes {
        let Some(target) = targets.of(pipe.tgid) else {
            continue;
        };
        let key = PipeKey {
            target,
            is_fifo: pipe.path.is_some(),
            inode: pipe.inode,
        };
        let entry = held.entry(key).or_insert(HeldPipe {
            pipe,
            read_end: None,
            write_end: None,
        });
        let end = Some((pipe.tgid, pipe.fd));
        if pipe.reads {
            entry.read_end = entry.read_end.or(end);
        }
        if pipe.writes {
            entry.write_end = entry.write_end.or(end);
        }
    }
    held
}

/// The paths of FIFOs in use, so that no two of a target have the same name: a FIFO may be removed and recreated while the first
/// is still open.
struct Names(BTreeSet<(TargetId, Arc<str>)>);

impl Names {
    fn kept(known: &HashMap<PipeKey, Known>, held: &BTreeMap<PipeKey, HeldPipe<'_>>) -> Self {
        let kept = known.iter().filter(|(key, _)| held.contains_key(key));
        let paths = kept.filter_map(|(key, known)| match &known.id {
            QueueId::Fifo { path, inode: None } => Some((key.target, Arc::clone(path))),
            _ => None,
        });
        Self(paths.collect())
    }

    fn give(&mut self, key: PipeKey, pipe: &Pipe) -> QueueId {
        let Some(path) = &pipe.path else {
            return QueueId::Pipe(key.inode);
        };
        // Any process may choose a path, so control characters are escaped.
        let path: Arc<str> = text::bounded(path, MAX_PATH_BYTES).into();
        let is_first = self.0.insert((key.target, Arc::clone(&path)));
        QueueId::Fifo {
            path,
            inode: (!is_first).then_some(key.inode),
        }
    }
}

impl HeldPipe<'_> {
    fn reading(
        &self,
        key: PipeKey,
        id: QueueId,
        before: Option<&Known>,
        now_ns: u64,
        targets: &Targets,
    ) -> (Reading, Known) {
        let Pipe { head, tail, .. } = *self.pipe;
        // They are not read at one instant. If the tail has passed the head in between, the pipe is empty.
        let depth = advance(tail, head);
        let depth = if depth < 1 << 31 { depth } else { 0 };
        let limit = u64::from(self.pipe.limit);
        let arrivals = before.map(|before| advance(before.head, head));
        let departures = before.map(|before| advance(before.tail, tail));
        let elapsed_ns = before.map(|before| now_ns.saturating_sub(before.seen_ns));
        let (mut consumer, mut inflow) =
            before.map_or_else(Default::default, |before| (before.consumer, before.inflow));
        let read_of_a_buffer = before.is_some_and(|before| {
            before
                .bytes
                .zip(self.pipe.bytes)
                .is_some_and(|(b, n)| n < b)
        });
        if read_of_a_buffer {
            consumer.moved();
        }
        let oldest_age_ns = consumer.observe(tail, depth > 0, now_ns);
        let inflow_ns = inflow.observe(arrivals.is_some_and(|arrivals| arrivals > 0), now_ns);
        let wait_ns = if depth == 0 {
            Some(0)
        } else {
            littles_law(depth, departures.unwrap_or(0), elapsed_ns)
        };
        // A full pipe that is being read is normal flow control. One that is not read blocks its writer.
        let is_read = departures.is_some_and(|departures| departures > 0) || read_of_a_buffer;
        let full = depth >= limit && !is_read;
        let fill = depth as f64 / limit.max(1) as f64;
        let mut reading = Reading {
            depth,
            limit: Some(limit),
            fill: Some(fill).filter(|_| !is_read),
            full,
            arrivals,
            departures,
            elapsed_ns,
            served: departures,
            servers: if self.read_end.is_some() {
                targets.threads(key.target)
            } else {
                1
            },
            wait_ns,
            oldest_age_ns,
            worst: (depth > 0).then(|| self.ends(key, targets)),
            extra: self.extra(),
            ..Reading::default()
        };
        if self.is_internal(key, targets) && !full && depth > 0 {
            // It is a queue only while data keeps arriving, and its data has waited no longer than that.
            let since_ns = inflow_ns.unwrap_or(0);
            let keeps_coming = inflow_ns.is_some();
            reading.oldest_age_ns = oldest_age_ns
                .map(|age| age.min(since_ns))
                .filter(|_| keeps_coming);
            reading.wait_ns = wait_ns
                .map(|wait| wait.min(since_ns))
                .filter(|_| keeps_coming);
            reading.fill = reading.fill.filter(|_| keeps_coming);
        }
        let now = Known {
            id,
            head,
            tail,
            bytes: self.pipe.bytes,
            seen_ns: now_ns,
            consumer,
            inflow,
        };
        (reading, now)
    }

    /// Whether, as far as is known, no process outside this target holds it.
    fn is_internal(&self, key: PipeKey, targets: &Targets) -> bool {
        self.read_end.is_some()
            && self.write_end.is_some()
            && !targets.is_held_outside(key.target, key.inode)
    }

    fn extra(&self) -> Vec<(&'static str, f64)> {
        let mut extra = vec![
            ("readers", f64::from(self.pipe.readers)),
            ("writers", f64::from(self.pipe.writers)),
        ];
        if let Some(bytes) = self.pipe.bytes {
            extra.push(("bytes", f64::from(bytes)));
        }
        extra
    }

    /// The holders of both ends, for display.
    fn ends(&self, key: PipeKey, targets: &Targets) -> String {
        let describe =
            |end: &str, (tgid, fd): (u32, u32)| format!("{end} end at process {tgid} fd {fd}");
        let other = |holds: fn(&Holder) -> bool| targets.held_by(key.target, key.inode, holds);
        let mut parts = Vec::new();
        parts.extend(self.write_end.map(|end| describe("write", end)));
        parts.extend(self.read_end.map(|end| describe("read", end)));
        if self.pipe.readers == 0 {
            parts.push("nobody reads".to_owned());
        } else if let Some(names) = other(|holder| holder.reads) {
            parts.push(format!("read end held by {names}"));
        }
        if self.pipe.writers == 0 {
            parts.push("nobody holds the write end".to_owned());
        } else if let Some(names) = other(|holder| holder.writes) {
            parts.push(format!("write end held by {names}"));
        }
        parts.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Kind, Reading,
        watched::{PID, TICK, Watched},
    };
    use crate::sample::{Holder, Pipe, Sample};

    fn end(reads: bool, head: u32, bytes: u32) -> Pipe {
        Pipe {
            inode: 4_711,
            tgid: PID,
            fd: if reads { 0 } else { 1 },
            reads,
            writes: !reads,
            head,
            tail: 0,
            limit: 16,
            bytes: Some(bytes),
            readers: 1,
            writers: 1,
            path: None,
        }
    }

    fn sample(pipes: Vec<Pipe>) -> Sample {
        Sample {
            pipes,
            ..Sample::default()
        }
    }

    fn holder(tgid: u32, reads: bool) -> Holder {
        Holder {
            inode: 4_711,
            tgid,
            name: "rsyslogd".to_owned(),
            fd: 0,
            reads,
            writes: !reads,
        }
    }

    /// The readings of a pipe that has both ends in the service, by its head and bytes at each sample.
    fn internal(samples: impl IntoIterator<Item = (u32, u32)>) -> Vec<Reading> {
        let mut watched = Watched::default();
        samples
            .into_iter()
            .map(|(head, bytes)| {
                let both = vec![end(true, head, bytes), end(false, head, bytes)];
                watched.scan_one(Kind::Pipe, sample(both))
            })
            .collect()
    }

    #[test]
    fn a_pipe_that_nobody_reads_ages() {
        let mut watched = Watched::default();
        let one = |readers| {
            let pipe = Pipe {
                readers,
                ..end(false, 3, 300)
            };
            sample(vec![pipe])
        };
        assert_eq!(watched.scan_one(Kind::Pipe, one(1)).oldest_age_ns, Some(0));
        let reading = watched.scan_one(Kind::Pipe, one(0));
        assert_eq!((reading.depth, reading.oldest_age_ns), (3, Some(TICK)));
        let worst = "write end at process 12 fd 1; nobody reads";
        assert_eq!(reading.worst.as_deref(), Some(worst));
    }

    #[test]
    fn a_tail_read_after_it_passed_the_head_is_an_empty_pipe() {
        let passed = Pipe {
            tail: 4,
            ..end(false, 3, 0)
        };
        let reading = Watched::default().scan_one(Kind::Pipe, sample(vec![passed]));
        assert_eq!(reading.depth, 0);
    }

    #[test]
    fn holders_of_the_other_end_are_named_and_remembered() {
        let mut watched = Watched::default();
        let sampled = Sample {
            holders: Some(vec![
                holder(77, true),
                holder(PID, false),
                holder(78, false),
            ]),
            ..sample(vec![end(false, 1, 10)])
        };
        let worst = "write end at process 12 fd 1; read end held by rsyslogd (77); \
                     write end held by rsyslogd (78)";
        let reading = watched.scan_one(Kind::Pipe, sampled);
        assert_eq!(reading.worst.as_deref(), Some(worst));
        let reading = watched.scan_one(Kind::Pipe, sample(vec![end(false, 1, 10)]));
        assert_eq!(reading.worst.as_deref(), Some(worst));
    }

    #[test]
    fn a_read_end_without_a_writer_is_reported_as_such() {
        let orphan = Pipe {
            writers: 0,
            ..end(true, 1, 10)
        };
        let reading = Watched::default().scan_one(Kind::Pipe, sample(vec![orphan]));
        let worst = "read end at process 12 fd 0; nobody holds the write end";
        assert_eq!(reading.worst.as_deref(), Some(worst));
    }

    #[test]
    fn reading_part_of_a_buffer_resets_the_age() {
        let mut watched = Watched::default();
        let mut age = |bytes| {
            let queue = sample(vec![end(true, 2, bytes)]);
            watched.scan_one(Kind::Pipe, queue).oldest_age_ns
        };
        assert_eq!((age(900), age(900)), (Some(0), Some(TICK)));
        assert_eq!((age(400), age(400)), (Some(0), Some(TICK)));
    }

    #[test]
    fn data_at_rest_in_an_internal_pipe_is_not_a_queue() {
        // A jobserver: four tokens, taken and returned.
        let tokens = (0..50).map(|sample| (1, 4 - sample % 3));
        for reading in internal(tokens) {
            assert_eq!(reading.depth, 1);
            assert_eq!((reading.wait_ns, reading.oldest_age_ns), (None, None));
            assert_eq!(reading.fill, None);
        }
    }

    #[test]
    fn occasional_buffers_make_no_standing_queue() {
        let tokens = (0..200).map(|sample| (1 + sample / 40, 4));
        for reading in internal(tokens) {
            assert!(
                reading.oldest_age_ns.unwrap_or(0) <= 10 * TICK,
                "{reading:?}"
            );
        }
    }

    #[test]
    fn an_internal_pipe_is_a_queue_while_data_arrives_or_when_full() {
        let filling = internal((0..16).map(|sample| (sample + 1, 100 * sample)));
        assert_eq!(filling[14].oldest_age_ns, Some(13 * TICK));
        assert_eq!(filling[14].fill, Some(15.0 / 16.0));
        let full = &filling[15];
        assert!(full.full);
        assert_eq!(full.oldest_age_ns, Some(15 * TICK));
        let stuck = internal((0..50).map(|_| (16, 64)));
        assert_eq!(stuck[49].oldest_age_ns, Some(49 * TICK));
        assert_eq!(stuck[49].fill, Some(1.0));
    }

    #[test]
    fn an_internal_pipe_is_judged_if_another_process_also_holds_an_end() {
        let mut watched = Watched::default();
        let both = vec![end(true, 1, 10), end(false, 1, 10)];
        let sampled = Sample {
            holders: Some(vec![holder(77, false)]),
            ..sample(both.clone())
        };
        watched.scan_one(Kind::Pipe, sampled);
        let reading = watched.scan_one(Kind::Pipe, sample(both));
        assert_eq!(reading.oldest_age_ns, Some(TICK));
    }

    #[test]
    fn a_fifo_is_named_by_its_path_and_no_two_have_the_same_name() {
        let fifo = |inode| Pipe {
            inode,
            path: Some("/run/log".to_owned()),
            ..end(false, 0, 0)
        };
        let mut watched = Watched::default();
        let mut names = |pipes| {
            let queues = watched.scan(Kind::Pipe, sample(pipes));
            queues.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(names(vec![fifo(9)]), ["/run/log"]);
        assert_eq!(names(vec![fifo(9), fifo(5)]), ["/run/log [5]", "/run/log"]);
        assert_eq!(names(vec![end(true, 0, 0)]), ["pipe:[4711]"]);
    }
}
