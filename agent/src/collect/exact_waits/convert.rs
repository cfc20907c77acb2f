//! Turns what the hooks have measured into sample types.

use std::collections::{BTreeMap, HashMap};

use tailback_ebpf::{
    ANY_OBJECT, NOT_IN_CALL, WAIT_BLOCKED_IO, WAIT_PREEMPTED, WAIT_WOKEN, WorstWait as WorstRecord,
    bucket_middle_ns, bucket_of,
};

use crate::{
    collect::{paths, processes::Processes},
    kernel::hooks::{Hooks, NewWaits},
    sample::{Distribution, ExactWait, ExactWaitKind, TargetId, WaitParty, WorstWait},
    text::harmless,
};

/// Descriptors whose file is looked up per interval: those with the longest waits.
const MAX_LOOKUPS: usize = 32;

/// The waits that were measured, with what their descriptors refer to.
pub(super) fn waits(
    new: Vec<NewWaits>,
    processes: &Processes,
    owners: &HashMap<u32, TargetId>,
) -> Vec<ExactWait> {
    let mut waits: Vec<ExactWait> = new
        .into_iter()
        .filter_map(|new| {
            let target = *owners.get(&new.key.tgid)?;
            Some(exact_wait(target, &new))
        })
        .collect();
    waits.sort_by_key(|wait| std::cmp::Reverse(wait.distribution.total_ns));
    let mut known: BTreeMap<(u32, u64), Option<String>> = BTreeMap::new();
    let files = waits.iter_mut().filter(|wait| is_of_file(wait));
    for wait in files.take(MAX_LOOKUPS) {
        let (tgid, fd) = (wait.tgid, wait.object.unwrap_or(0));
        let path = known.entry((tgid, fd)).or_insert_with(|| {
            let pid = processes.watched_pid(tgid)?;
            paths::link(pid, fd as u32)
        });
        wait.path.clone_from(path);
    }
    waits
}

fn is_of_file(wait: &ExactWait) -> bool {
    let is_futex = wait.call.map(libc::c_long::from) == Some(libc::SYS_futex);
    wait.object.is_some() && !is_futex
}

fn exact_wait(target: TargetId, new: &NewWaits) -> ExactWait {
    let key = new.key;
    let worst_ns = new.worst.map_or(0, |worst| worst.wait_ns);
    // A wait that ended just as the interval did has no exemplar.
    let longer = new.buckets.last().map(|(bucket, _)| *bucket);
    let longer = longer.filter(|bucket| *bucket > bucket_of(worst_ns));
    let max_ns = longer.map_or(worst_ns, bucket_middle_ns);
    let wait = |(bucket, count): &(u32, u32)| (bucket_middle_ns(*bucket), u64::from(*count));
    let is_futex = libc::c_long::from(key.call) == libc::SYS_futex;
    ExactWait {
        target,
        tgid: key.tgid,
        kind: match key.kind {
            WAIT_WOKEN => ExactWaitKind::Woken,
            WAIT_PREEMPTED => ExactWaitKind::Preempted,
            WAIT_BLOCKED_IO => ExactWaitKind::BlockedIo,
            _ => ExactWaitKind::Blocked,
        },
        call: (key.call != NOT_IN_CALL).then_some(key.call),
        object: (has_object(key.call) && key.object != ANY_OBJECT).then_some(if is_futex {
            key.object
        } else {
            // The kernel takes an int and ignores the upper half.
            key.object & u64::from(u32::MAX)
        }),
        path: None,
        distribution: Distribution {
            count: new.count,
            total_ns: new.total_ns,
            max_ns,
            waits: new.buckets.iter().map(wait).collect(),
        },
        worst: new.worst.as_ref().map(worst_wait),
    }
}

/// Whether the hooks keep the first argument of a call.
fn has_object(call: u16) -> bool {
    call != NOT_IN_CALL && Hooks::keeps_object(call)
}

fn worst_wait(worst: &WorstRecord) -> WorstWait {
    let party = |tgid: u32, tid: u32, comm: &[u8; 16]| {
        // The idle task has no process.
        (tid != 0).then(|| WaitParty {
            tgid,
            tid,
            comm: name_of(comm),
        })
    };
    WorstWait {
        wait_ns: worst.wait_ns,
        mono_ns: worst.at_ns,
        tid: worst.tid,
        cpu: worst.cpu,
        culprit: party(worst.culprit_tgid, worst.culprit_tid, &worst.culprit_comm),
        culprit_ns: worst.culprit_ns,
        waker: party(worst.waker_tgid, worst.waker_tid, &worst.waker_comm),
    }
}

fn name_of(comm: &[u8; 16]) -> String {
    let end = comm.iter().position(|byte| *byte == 0);
    harmless(&String::from_utf8_lossy(&comm[..end.unwrap_or(comm.len())]))
}

#[cfg(test)]
mod tests {
    use tailback_ebpf::WaitKey;

    use super::*;

    #[test]
    fn a_record_becomes_a_wait_with_its_file_and_the_thread_that_ended_it() {
        let worst = WorstRecord {
            wait_ns: 5_000_000,
            tid: 12,
            waker_tgid: 20,
            waker_tid: 21,
            waker_comm: *b"back\x1b[up\0\0\0\0\0\0\0\0",
            ..bytemuck::Zeroable::zeroed()
        };
        let new = NewWaits {
            key: WaitKey {
                object: 0xffff_0000_0000_0007,
                tgid: 10,
                kind: WAIT_BLOCKED_IO,
                call: libc::SYS_read as u16,
            },
            count: 2,
            total_ns: 6_000_000,
            buckets: vec![(bucket_of(1_000_000), 1), (bucket_of(5_000_000), 1)],
            worst: Some(worst),
        };
        let wait = exact_wait(3, &new);
        assert_eq!((wait.target, wait.tgid, wait.object), (3, 10, Some(7)));
        assert_eq!(wait.kind, ExactWaitKind::BlockedIo);
        assert_eq!(wait.distribution.max_ns, 5_000_000);
        assert_eq!(wait.distribution.mean_ns(), Some(3_000_000));
        assert!(is_of_file(&wait));
        let worst = wait.worst.unwrap();
        assert_eq!(worst.culprit, None);
        let waker = worst.waker.unwrap();
        assert_eq!((waker.tgid, waker.tid), (20, 21));
        assert!(!waker.comm.contains('\x1b'), "{}", waker.comm);
        // Without an exemplar, the longest wait is that of the last bucket.
        let wait = exact_wait(3, &NewWaits { worst: None, ..new });
        let off_ns = wait.distribution.max_ns.abs_diff(5_000_000);
        assert!(off_ns < 5_000_000 / 50, "{wait:?}");
    }
}
