//! Open file descriptors of a process, against its limit. At the limit it can neither accept nor open anything.

use std::collections::BTreeMap;

use super::{Kind, QueueId, Reading, Sink, Source, Targets};
use crate::sample::{self, Sample, TargetId};

#[derive(Default)]
pub(super) struct Files {}

/// The processes of one target.
#[derive(Default)]
struct Group<'a> {
    worst: Option<&'a sample::Files>,
    processes: u32,
}

impl Source for Files {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        // Descriptors may be counted less often than files are scanned.
        if sample.files.is_empty() {
            return;
        }
        let mut groups: BTreeMap<TargetId, Group<'_>> = BTreeMap::new();
        for files in &sample.files {
            if let Some(target) = targets.of(files.tgid) {
                groups.entry(target).or_default().add(files);
            }
        }
        for (target, group) in &groups {
            if let Some(reading) = group.reading() {
                sink.put(*target, Kind::Fd, &QueueId::OpenFiles, reading);
            }
        }
        if sample.scans.files || sample.scans.system {
            sink.forget_unseen(Kind::Fd);
        }
    }
}

impl<'a> Group<'a> {
    fn add(&mut self, files: &'a sample::Files) {
        self.processes += 1;
        if self.worst.is_none_or(|worst| fill(files) > fill(worst)) {
            self.worst = Some(files);
        }
    }

    /// The reading of the process nearest to its limit, which represents the service.
    fn reading(&self) -> Option<Reading> {
        let worst = self.worst?;
        let open = u64::from(worst.open);
        Some(Reading {
            depth: open,
            limit: Some(worst.limit),
            fill: Some(fill(worst)),
            full: open > 0 && open >= worst.limit,
            worst: Some(format!("process {}", worst.tgid)),
            extra: vec![("processes", f64::from(self.processes))],
            ..Reading::default()
        })
    }
}

fn fill(files: &sample::Files) -> f64 {
    f64::from(files.open) / files.limit.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::super::{Kind, Reading, watched::Watched};
    use crate::sample::{Files, Sample};

    fn reading(files: &[(u32, u32, u64)]) -> Reading {
        let of = |(tgid, open, limit): &(u32, u32, u64)| Files {
            tgid: *tgid,
            open: *open,
            limit: *limit,
        };
        let sample = Sample {
            files: files.iter().map(of).collect(),
            ..Sample::default()
        };
        Watched::of(&[12, 13]).scan_one(Kind::Fd, sample)
    }

    #[test]
    fn the_process_nearest_to_its_limit_is_reported() {
        let reading = reading(&[(12, 500, 100_000), (13, 90, 100), (99, 100, 100)]);
        assert_eq!((reading.depth, reading.limit), (90, Some(100)));
        assert_eq!(reading.worst.as_deref(), Some("process 13"));
        assert!(!reading.full);
        assert_eq!((reading.wait_ns, reading.oldest_age_ns), (None, None));
    }

    #[test]
    fn at_the_limit_it_is_full() {
        assert!(reading(&[(12, 100, 100)]).full);
        assert!(!reading(&[(12, 4_000, u64::MAX)]).full);
    }

    #[test]
    fn a_scan_that_did_not_count_descriptors_yields_no_queue() {
        let queues = Watched::default().scan(Kind::Fd, Sample::default());
        assert!(queues.is_empty());
    }
}
