//! io_uring instances: submissions that the kernel has not consumed, and completions that the process has not consumed.

use super::{
    Kind, QueueId, Reading, RingHalf, Sink, Source, Targets, advance, head::Head, littles_law,
};
use crate::hash::HashMap;
use crate::sample::{Ring, Sample, TargetId};

#[derive(Default)]
pub(super) struct Uring {
    rings: HashMap<(TargetId, u64), Known>,
}

/// State kept per instance.
struct Known {
    /// The target had several processes when the ring was first seen, so that the descriptor alone does not identify it.
    named_by_process: bool,
    submissions: Side,
    completions: Side,
    seen_ns: u64,
}

/// One of the two rings of an instance.
#[derive(Clone, Copy, Default)]
struct Side {
    tail: u32,
    head: u32,
    entries: u32,
    lost: u32,
    consumer: Head,
}

impl Source for Uring {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.scans.files {
            return;
        }
        let now_ns = sample.mono_ns;
        let mut rings = HashMap::with_capacity_and_hasher(sample.rings.len(), Default::default());
        for ring in &sample.rings {
            let Some(target) = targets.of(ring.tgid) else {
                continue;
            };
            let mut now = Known::of(ring, target, targets, now_ns);
            let before = self.rings.get(&(target, ring.id));
            let before = before.filter(|before| now.continues(before));
            now.named_by_process =
                before.map_or(now.named_by_process, |before| before.named_by_process);
            let elapsed_ns = before.map(|before| now_ns.saturating_sub(before.seen_ns));
            let tgid = now.named_by_process.then_some(ring.tgid);
            let worst = format!("process {} fd {}", ring.tgid, ring.fd);
            let mut put = |side: &mut Side, before: Option<&Side>, half: RingHalf, servers: u32| {
                let fd = ring.fd;
                let id = QueueId::Ring { fd, tgid, half };
                let reading = Reading {
                    servers,
                    elapsed_ns,
                    worst: Some(worst.clone()).filter(|_| side.depth() > 0),
                    ..side.reading(before, now_ns, elapsed_ns)
                };
                sink.put(target, Kind::Uring, &id, reading);
            };
            let submissions = before.map(|before| &before.submissions);
            put(&mut now.submissions, submissions, RingHalf::Submission, 1);
            let completions = before.map(|before| &before.completions);
            let servers = targets.threads(target);
            put(
                &mut now.completions,
                completions,
                RingHalf::Completion,
                servers,
            );
            rings.insert((target, ring.id), now);
        }
        self.rings = rings;
        sink.forget_unseen(Kind::Uring);
    }
}

impl Known {
    fn of(ring: &Ring, target: TargetId, targets: &Targets, now_ns: u64) -> Self {
        let processes = targets.get(target).map_or(1, |target| target.tgids.len());
        Self {
            named_by_process: processes > 1,
            submissions: Side {
                tail: ring.sq_tail,
                head: ring.sq_head,
                entries: ring.sq_entries,
                lost: ring.sq_dropped,
                consumer: Head::default(),
            },
            completions: Side {
                tail: ring.cq_tail,
                head: ring.cq_head,
                entries: ring.cq_entries,
                lost: ring.cq_overflow,
                consumer: Head::default(),
            },
            seen_ns: now_ns,
        }
    }

    /// Whether this can be a later state of the same instance. The id of a closed instance may be reused; positions of one
    /// instance never go back.
    fn continues(&self, before: &Self) -> bool {
        let progressed = |before: &Side, now: &Side| {
            advance(before.tail, now.tail) < 1 << 31 && advance(before.head, now.head) < 1 << 31
        };
        progressed(&before.submissions, &self.submissions)
            && progressed(&before.completions, &self.completions)
    }
}

impl Side {
    /// Head and tail are not read at one instant. If they have crossed in between, nothing waits.
    fn depth(&self) -> u64 {
        let span = advance(self.head, self.tail);
        if span < 1 << 31 { span } else { 0 }
    }

    /// The reading of this ring. Continues the state of `before`.
    fn reading(&mut self, before: Option<&Self>, now_ns: u64, elapsed_ns: Option<u64>) -> Reading {
        let depth = self.depth();
        let arrivals = before.map(|before| advance(before.tail, self.tail));
        let departures = before.map(|before| advance(before.head, self.head));
        self.consumer = before.map_or_else(Head::default, |before| before.consumer);
        let oldest_age_ns = self.consumer.observe(self.head, depth > 0, now_ns);
        Reading {
            depth,
            limit: Some(u64::from(self.entries)),
            fill: Some(depth as f64 / f64::from(self.entries.max(1))),
            full: depth > 0 && depth >= u64::from(self.entries),
            arrivals,
            departures,
            served: departures,
            wait_ns: if depth == 0 {
                Some(0)
            } else {
                littles_law(depth, departures.unwrap_or(0), elapsed_ns)
            },
            oldest_age_ns,
            losses: before.map_or(0, |before| advance(before.lost, self.lost)),
            ..Reading::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Kind, Reading,
        watched::{PID, TICK, Watched},
    };
    use crate::sample::{Ring, Sample};

    fn ring(head: u32, tail: u32) -> Ring {
        Ring {
            id: 1,
            tgid: PID,
            fd: 9,
            sq_tail: 5,
            sq_head: 5,
            sq_entries: 8,
            cq_tail: tail,
            cq_head: head,
            cq_entries: 16,
            sq_dropped: 0,
            cq_overflow: 0,
        }
    }

    fn scan(watched: &mut Watched, ring: Ring) -> Vec<(String, Reading)> {
        let sample = Sample {
            rings: vec![ring],
            ..Sample::default()
        };
        watched.scan(Kind::Uring, sample)
    }

    #[test]
    fn unconsumed_completions_age() {
        let mut watched = Watched::default();
        scan(&mut watched, ring(u32::MAX, u32::MAX));
        let queues = scan(&mut watched, ring(u32::MAX, 3));
        assert_eq!(
            (queues[0].0.as_str(), queues[0].1.depth),
            ("ring fd 9 sq", 0)
        );
        assert_eq!(
            (queues[0].1.wait_ns, queues[0].1.oldest_age_ns),
            (Some(0), None)
        );
        let (name, reading) = &queues[1];
        assert_eq!((name.as_str(), reading.depth), ("ring fd 9 cq", 4));
        assert_eq!((reading.arrivals, reading.departures), (Some(4), Some(0)));
        assert_eq!(reading.worst.as_deref(), Some("process 12 fd 9"));
        let reading = &scan(&mut watched, ring(u32::MAX, 3))[1].1;
        assert_eq!(reading.oldest_age_ns, Some(TICK));
        let reading = &scan(&mut watched, ring(2, 3))[1].1;
        assert_eq!(
            (reading.oldest_age_ns, reading.departures),
            (Some(0), Some(3))
        );
    }

    #[test]
    fn an_overflowed_completion_is_lost() {
        let mut watched = Watched::default();
        let full = |cq_overflow| Ring {
            cq_overflow,
            ..ring(0, 16)
        };
        let queues = scan(&mut watched, full(3));
        assert_eq!(queues[1].1.losses, 0);
        assert!(queues[1].1.full);
        let queues = scan(&mut watched, full(5));
        assert_eq!((queues[0].1.losses, queues[1].1.losses), (0, 2));
    }

    #[test]
    fn a_head_read_after_it_passed_the_tail_is_an_empty_ring() {
        let queues = scan(&mut Watched::default(), ring(7, 6));
        assert_eq!(queues[1].1.depth, 0);
    }

    #[test]
    fn a_new_ring_with_the_id_of_a_closed_one_starts_from_zero() {
        let mut watched = Watched::default();
        scan(&mut watched, ring(500, 500));
        let reading = &scan(&mut watched, ring(0, 2))[1].1;
        assert_eq!((reading.arrivals, reading.elapsed_ns), (None, None));
        assert_eq!(reading.depth, 2);
    }

    #[test]
    fn rings_of_several_processes_have_different_names() {
        let queues = scan(&mut Watched::of(&[PID, 13]), ring(0, 0));
        assert_eq!(queues[0].0, "ring fd 9 of 12 sq");
    }
}
