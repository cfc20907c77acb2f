//! Finds threads in the focus scope that compute in an accelerator's library, or wait for an accelerator's device.
//!
//! A thread that waits for a GPU usually spins in the driver's library, and so looks busy. What distinguishes the two is where
//! its instruction pointer is: in the code of such a library, as /proc/PID/maps shows it.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeSet, HashMap},
    fs,
};

use super::{
    MS,
    paths::{link, maps},
    processes::Processes,
};
use crate::{
    sample::{Accelerator, Detail, OnAccelerator, State, Wait},
    target::ProcessInfo,
};

/// A process is examined again after this time, ns: libraries are loaded and devices opened when it starts.
const EXAMINE_INTERVAL_NS: u64 = 10_000 * MS;
/// Maximum number of processes examined per profile: there may be a hundred profiles a second.
const MAX_EXAMINED: usize = 1;
/// Longest text read from /proc/PID/maps, bytes: 50,000 lines of usual length.
const MAX_MAPS_BYTES: u64 = 8 << 20;
/// Maximum number of ranges of code kept per process.
const MAX_RANGES: usize = 32;
/// Maximum number of descriptors examined per process.
const MAX_FILES: usize = 256;

/// A thread that runs, and its instruction pointer when it last left user mode: at a timer tick at the latest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RunningThread {
    pub(super) tgid: u32,
    pub(super) tid: u32,
    pub(super) address: u64,
}

#[derive(Default)]
pub(super) struct Accelerators {
    /// By tgid.
    processes: HashMap<u32, Examined>,
}

/// What a process uses.
#[derive(Default)]
struct Examined {
    at_ns: u64,
    /// Code of libraries: from, to.
    code: Vec<(u64, u64, Accelerator)>,
    /// Descriptors of devices.
    devices: Vec<(u32, Accelerator)>,
}

impl Accelerators {
    /// The threads of this profile that are on an accelerator.
    pub(super) fn find<'a>(
        &mut self,
        now_ns: u64,
        waits: impl Iterator<Item = &'a Wait> + Clone,
        running: &[RunningThread],
        processes: &Processes,
    ) -> Vec<OnAccelerator> {
        let tgids: BTreeSet<u32> = waits.clone().map(|wait| wait.tgid).collect();
        self.processes.retain(|tgid, _| tgids.contains(tgid));
        let is_due = |tgid: &&u32| {
            let known = self.processes.get(tgid);
            known.is_none_or(|known| now_ns.saturating_sub(known.at_ns) >= EXAMINE_INTERVAL_NS)
        };
        let due: Vec<u32> = tgids
            .iter()
            .filter(is_due)
            .take(MAX_EXAMINED)
            .copied()
            .collect();
        for tgid in due {
            let pid = processes.get(tgid).map(|process: &ProcessInfo| process.pid);
            let examined = pid.map(examine).unwrap_or_default();
            let examined = Examined {
                at_ns: now_ns,
                ..examined
            };
            self.processes.insert(tgid, examined);
        }
        let running = running.iter().filter_map(|thread| {
            let process = self.processes.get(&thread.tgid)?;
            Some(OnAccelerator {
                tgid: thread.tgid,
                tid: thread.tid,
                through: process.code_at(thread.address)?,
            })
        });
        let has_device = |process: &Examined| !process.devices.is_empty();
        let has_devices = self.processes.values().any(has_device);
        let waits = waits.filter(|_| has_devices);
        let waiting = waits.filter_map(|wait| {
            let process = self.processes.get(&wait.tgid)?;
            Some(OnAccelerator {
                tgid: wait.tgid,
                tid: wait.tid,
                through: process.waited_for(wait)?,
            })
        });
        running.chain(waiting).collect()
    }

    /// Forgets all processes: nothing is focused any more.
    pub(super) fn clear(&mut self) {
        self.processes.clear();
    }
}

impl Examined {
    fn code_at(&self, address: u64) -> Option<Accelerator> {
        let found = self.code.iter();
        let mut found = found.filter(|(from, to, _)| (*from..*to).contains(&address));
        found.next().map(|(.., library)| *library)
    }

    /// The device that a sleeping thread waits for.
    fn waited_for(&self, wait: &Wait) -> Option<Accelerator> {
        if self.devices.is_empty()
            || !matches!(wait.state, State::Sleeping | State::Uninterruptible)
        {
            return None;
        }
        let call = wait.syscall.as_ref()?;
        let device = |fd: u32| {
            let mut devices = self.devices.iter();
            devices.find(|(known, _)| *known == fd).map(|(_, it)| *it)
        };
        match i64::from(call.number) {
            // The kernel takes an int and ignores the upper half.
            libc::SYS_ioctl | libc::SYS_read => device(call.args[0] as u32),
            _ => match &call.detail {
                Detail::Poll(entries) => entries
                    .iter()
                    .find_map(|(fd, _)| device(u32::try_from(*fd).ok()?)),
                _ => None,
            },
        }
    }
}

fn examine(pid: u32) -> Examined {
    let maps = maps(pid, MAX_MAPS_BYTES);
    let code = maps.lines().filter_map(code).take(MAX_RANGES).collect();
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    let descriptors = descriptors
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .take(MAX_FILES);
    let devices = descriptors
        .filter_map(|fd: u32| Some((fd, Accelerator::of_device(&link(pid, fd)?)?)))
        .collect();
    Examined {
        at_ns: 0,
        code,
        devices,
    }
}

/// A line of /proc/PID/maps, if it is code of an accelerator's library.
fn code(line: &str) -> Option<(u64, u64, Accelerator)> {
    let mut words = line.split_ascii_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let is_code = words.next()?.as_bytes().get(2) == Some(&b'x');
    let library = Accelerator::of_library(words.nth(3)?).filter(|_| is_code)?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    Some((hex(from)?, hex(to)?, library))
}

#[cfg(test)]
mod tests {
    use super::{super::paths::tests::wait, *};

    #[test]
    fn only_code_of_known_libraries_counts() {
        let line = "7f10-7f20 r-xp 00001000 08:01 42 /usr/lib/libcuda.so.1";
        assert_eq!(code(line), Some((0x7f10, 0x7f20, Accelerator::Cuda)));
        for line in [
            "7f10-7f20 r--p 00001000 08:01 42 /usr/lib/libcuda.so.1",
            "7f10-7f20 r-xp 00001000 08:01 42 /usr/lib/libc.so.6",
            "7f10-7f20 r-xp 00001000 08:01 0",
            "7f10 r-xp 00001000 08:01 42 /usr/lib/libcuda.so.1",
            "",
        ] {
            assert_eq!(code(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_thread_is_on_an_accelerator_in_its_library_and_in_calls_on_its_device() {
        let process = Examined {
            at_ns: 0,
            code: vec![(0x1000, 0x2000, Accelerator::Cuda)],
            devices: vec![(7, Accelerator::NvidiaDevice)],
        };
        assert_eq!(process.code_at(0x1fff), Some(Accelerator::Cuda));
        assert_eq!(process.code_at(0x2000), None);
        let on_device = |wait: Wait| process.waited_for(&wait).is_some();
        assert!(on_device(wait(State::Sleeping, libc::SYS_ioctl, 7)));
        let mut poll = wait(State::Sleeping, libc::SYS_ppoll, 0);
        if let Some(syscall) = &mut poll.syscall {
            syscall.detail = Detail::Poll(vec![(3, 1), (7, 1)]);
        }
        assert!(on_device(poll));
        assert!(!on_device(wait(State::Sleeping, libc::SYS_ioctl, 8)));
        assert!(!on_device(wait(State::Sleeping, libc::SYS_write, 7)));
        assert!(!on_device(wait(State::Running, libc::SYS_ioctl, 7)));
    }
}
