//! Threads that wait for a disk: in an uninterruptible wait for I/O, in fsync and similar calls, or in a call on a file.
//!
//! A thread is in the same wait as long as its voluntary context switches do not change. A call such as fsync consists of
//! many waits; if a thread was waiting at every sample, their mean duration is known.

use crate::hash::HashMap;
use std::collections::BTreeMap;

use super::{
    Kind, QueueId, Reading, Sink, Source, Targets,
    syscalls::{CallClass, call_of, doing},
};
use crate::{
    sample::{Detail, Sample, State, TargetId, Wait},
    text::harmless,
};

/// Time of one access to a healthy rotating disk, including seek and rotation, ns. A shorter wait is not queueing.
const DISK_ACCESS_NS: u64 = 20_000_000;
/// How long a device is still reported after its last waiter, ns: even a busy device has no waiters in many samples.
const IDLE_RETENTION_NS: u64 = 5_000_000_000;
/// Devices tracked, of all targets. It bounds the memory, since anyone can create files.
const MAX_DEVICES: usize = 4096;

#[derive(Default)]
pub(super) struct Disk {
    threads: HashMap<(u32, u32), Known>,
    devices: BTreeMap<(TargetId, QueueId), Device>,
    seen_ns: Option<u64>,
}

/// State kept per waiting thread.
struct Known {
    voluntary: u64,
    since_ns: u64,
    /// Time of the first of the consecutive samples at which it was waiting, and its voluntary switches then.
    streak_ns: u64,
    streak_voluntary: u64,
}

/// State kept per device.
struct Device {
    /// When it last had a waiter.
    used_ns: u64,
    /// Waiters at the previous sample.
    waiting: u64,
}

/// One device at one sample.
#[derive(Default)]
struct DeviceSample<'a> {
    threads: u64,
    /// Threads that are in the same wait as at the previous sample.
    stayed: u64,
    /// The longest mean wait of a thread that was waiting at every sample.
    mean_ns: u64,
    oldest_age_ns: u64,
    worst: Option<&'a Wait>,
}

impl Source for Disk {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.scans.waits {
            return;
        }
        let now_ns = sample.mono_ns;
        let elapsed_ns = self.seen_ns.map(|before| now_ns.saturating_sub(before));
        self.seen_ns = Some(now_ns);
        let devices = self.sample_devices(sample, targets);
        self.devices
            .retain(|_, device| now_ns.saturating_sub(device.used_ns) < IDLE_RETENTION_NS);
        for (key, sampled) in &devices {
            let (target, id) = key;
            let before = self.devices.get(key).map(|device| device.waiting);
            if before.is_none() && self.devices.len() >= MAX_DEVICES {
                sink.out.queues_over_limit += 1;
                continue;
            }
            let device = Device {
                used_ns: now_ns,
                waiting: sampled.threads,
            };
            self.devices.insert(key.clone(), device);
            let reading = sampled.reading(before, elapsed_ns, targets.threads(*target));
            sink.put(*target, Kind::Disk, id, reading);
        }
        for (key, device) in &mut self.devices {
            if !devices.contains_key(key) && targets.get(key.0).is_some() {
                let before = std::mem::take(&mut device.waiting);
                let none = DeviceSample::default();
                let reading = none.reading(Some(before), elapsed_ns, targets.threads(key.0));
                sink.put(key.0, Kind::Disk, &key.1, reading);
            }
        }
        sink.forget_unseen(Kind::Disk);
    }
}

impl Disk {
    fn sample_devices<'a>(
        &mut self,
        sample: &'a Sample,
        targets: &Targets,
    ) -> BTreeMap<(TargetId, QueueId), DeviceSample<'a>> {
        let now_ns = sample.mono_ns;
        let mut devices: BTreeMap<(TargetId, QueueId), DeviceSample<'_>> = BTreeMap::new();
        let mut threads = HashMap::default();
        for wait in &sample.waits {
            let Some(target) = targets.of(wait.tgid).filter(|_| waits_for_disk(wait)) else {
                continue;
            };
            let before = self.threads.get(&(wait.tgid, wait.tid));
            let stayed = before.filter(|before| before.voluntary == wait.voluntary);
            let known = Known {
                voluntary: wait.voluntary,
                since_ns: stayed.map_or(now_ns, |before| before.since_ns),
                streak_ns: before.map_or(now_ns, |before| before.streak_ns),
                streak_voluntary: before.map_or(wait.voluntary, |before| before.streak_voluntary),
            };
            let device = devices.entry((target, device_of(wait))).or_default();
            device.threads += 1;
            device.stayed += u64::from(stayed.is_some());
            device.mean_ns = device.mean_ns.max(known.mean_ns(now_ns));
            let age_ns = now_ns.saturating_sub(known.since_ns);
            if device.worst.is_none() || age_ns > device.oldest_age_ns {
                device.worst = Some(wait);
                device.oldest_age_ns = age_ns;
            }
            threads.insert((wait.tgid, wait.tid), known);
        }
        self.threads = threads;
        devices
    }
}

/// Whether a thread waits for a disk. Not every uninterruptible wait is one: the parent in vfork waits for its child that
/// way, and so do waiters of locks inside the kernel.
fn waits_for_disk(wait: &Wait) -> bool {
    wait.state == State::Uninterruptible
        && (wait.io
            || matches!(
                call_of(wait),
                Some((
                    _,
                    CallClass::Sync | CallClass::Read | CallClass::Write | CallClass::Path
                ))
            ))
}

/// The device, or the file if the device is unknown.
fn device_of(wait: &Wait) -> QueueId {
    match wait.syscall.as_ref().map(|syscall| &syscall.detail) {
        Some(Detail::File { path, device }) => {
            QueueId::Device(device.as_ref().unwrap_or(path).as_str().into())
        }
        _ => QueueId::AnyDisk,
    }
}

impl Known {
    /// Mean wait over the consecutive samples at which it was waiting, ns. Each voluntary switch begins a wait.
    fn mean_ns(&self, now_ns: u64) -> u64 {
        let waits = self.voluntary.saturating_sub(self.streak_voluntary);
        now_ns.saturating_sub(self.streak_ns) / waits.saturating_add(1)
    }
}

impl DeviceSample<'_> {
    fn reading(&self, before: Option<u64>, elapsed_ns: Option<u64>, servers: u32) -> Reading {
        let elapsed_ns = elapsed_ns.filter(|_| before.is_some());
        let left = before.unwrap_or(0).saturating_sub(self.stayed);
        let waits = self.threads > 0;
        Reading {
            depth: self.threads,
            limit: None,
            arrivals: elapsed_ns.map(|_| self.threads.saturating_sub(self.stayed)),
            departures: elapsed_ns.map(|_| left),
            elapsed_ns,
            // Not set: the service time of a slow disk would raise its own target delay.
            served: None,
            servers,
            wait_ns: Some(self.mean_ns.saturating_sub(DISK_ACCESS_NS)),
            oldest_age_ns: waits.then_some(self.oldest_age_ns),
            worst: self.worst.map(|wait| {
                format!(
                    "process {} thread {} ({}) {}",
                    wait.tgid,
                    wait.tid,
                    harmless(&wait.comm),
                    doing(wait)
                )
            }),
            extra: if waits {
                vec![("mean_wait_ns", self.mean_ns as f64)]
            } else {
                Vec::new()
            },
            ..Reading::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Kind, Model, Reading,
        syscalls::tests::{asleep, sample_waits},
        watched::TICK,
    };
    use crate::sample::{Detail, State, Wait};

    fn read(model: &mut Model, tick: u64, waits: Vec<Wait>) -> Vec<(String, Reading)> {
        sample_waits(Kind::Disk, model, tick, waits)
    }

    fn syncing(tid: u32, voluntary: u64) -> Wait {
        let mut wait = asleep(tid, libc::SYS_fsync, [3, 0, 0, 0]);
        wait.state = State::Uninterruptible;
        wait.voluntary = voluntary;
        if let Some(syscall) = &mut wait.syscall {
            syscall.detail = Detail::File {
                path: "/db/wal".to_owned(),
                device: Some("8:0".to_owned()),
            };
        }
        wait
    }

    #[test]
    fn a_slow_fsync_is_detected_and_named() {
        let mut model = Model::default();
        let mut last = Vec::new();
        for tick in 0..12 {
            last = read(&mut model, tick, vec![syncing(11, 7), syncing(12, tick)]);
        }
        let [(name, disk)] = last.as_slice() else {
            panic!("{last:?}")
        };
        assert_eq!((name.as_str(), disk.depth, disk.limit), ("8:0", 2, None));
        assert_eq!(disk.oldest_age_ns, Some(11 * TICK));
        assert_eq!(
            disk.worst.as_deref(),
            Some("process 10 thread 11 (worker) in fsync of /db/wal")
        );
    }

    #[test]
    fn consecutive_short_reads_are_not_a_queueing_delay() {
        let mut model = Model::default();
        for tick in 0..30 {
            // Each read takes 8 ms.
            let readings = read(&mut model, tick, vec![syncing(11, tick * 12)]);
            let disk = &readings[0].1;
            assert_eq!(
                (disk.wait_ns, disk.oldest_age_ns),
                (Some(0), Some(0)),
                "{tick}"
            );
        }
    }

    #[test]
    fn the_delay_of_a_sync_of_many_slow_waits_is_their_mean() {
        let mut model = Model::default();
        let mut last = Vec::new();
        for tick in 0..30 {
            last = read(&mut model, tick, vec![syncing(11, tick * 2)]);
        }
        let wait_ns = last[0].1.wait_ns.unwrap();
        assert!((25_000_000..31_000_000).contains(&wait_ns), "{wait_ns}");
    }

    #[test]
    fn idle_threads_and_other_uninterruptible_waits_are_not_disk_waits() {
        let mut model = Model::default();
        let vfork = Wait {
            state: State::Uninterruptible,
            ..asleep(11, libc::SYS_clone, [0; 4])
        };
        let idle = asleep(12, libc::SYS_read, [0; 4]);
        assert_eq!(read(&mut model, 0, vec![vfork, idle]), []);
    }

    #[test]
    fn an_idle_device_is_reported_for_a_while_and_then_ends() {
        let mut model = Model::default();
        read(&mut model, 0, vec![syncing(11, 1)]);
        let readings = read(&mut model, 1, vec![]);
        assert_eq!(
            (readings[0].1.depth, readings[0].1.departures),
            (0, Some(1))
        );
        assert_eq!(read(&mut model, 60, vec![]), []);
    }
}
