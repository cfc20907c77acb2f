//! Reads what HotSpot JVMs in the focus scope count of their garbage collections.
//!
//! The profile shows which threads need a CPU, and their names say what they are for. The JVM's own counters are a second witness.
//! `open` finds and reads the file that holds them, `perf_data` parses it. A JVM that was started with `-XX:-UsePerfData` or
//! `-XX:+PerfDisableSharedMem` has no such file.
#![forbid(unsafe_code)]

mod open;
mod perf_data;

use std::collections::HashMap;

use open::PerfFile;
pub(super) use open::{find, read};
use perf_data::Unusable;
#[doc(hidden)]
pub use perf_data::parse;

use super::{MS, notices::Notices};
use crate::{sample::JvmCounters, target::ProcessInfo};

/// Shortest time between two searches for the file of one process, ns.
const SEARCH_INTERVAL_NS: u64 = 10_000 * MS;
/// Maximum number of processes whose mappings are searched in one poll: they can be long.
const MAX_SEARCHES: usize = 1;
/// Maximum number of files read in one poll; the others have their turn in the next.
const MAX_READS: usize = 16;

/// The counters of one process, found and read as in a poll. `None`: its performance data cannot be read, or it has none.
#[doc(hidden)]
pub fn read_of_process(pid: u32) -> Option<Result<JvmCounters, Unusable>> {
    let file = find(pid)?;
    Some(parse(pid, &read(pid, &file)?))
}

#[derive(Default)]
pub(super) struct JvmCountersScan {
    /// By tgid.
    known: HashMap<u32, Known>,
}

/// One JVM.
struct Known {
    start_ns: u64,
    exec_id: u64,
    /// When its mappings were last searched, CLOCK_MONOTONIC ns.
    searched_ns: Option<u64>,
    file: Option<PerfFile>,
    /// When its file was last read, CLOCK_MONOTONIC ns.
    read_ns: u64,
}

impl JvmCountersScan {
    /// Reads the counters of these JVMs, those first whose last reading is oldest. `find` returns the file of a pid, `read` its
    /// content.
    pub(super) fn poll(
        &mut self,
        jvms: &[&ProcessInfo],
        now_ns: u64,
        find: impl Fn(u32) -> Option<PerfFile>,
        read: impl Fn(u32, &PerfFile) -> Option<Vec<u8>>,
        notices: &mut Notices,
    ) -> Vec<JvmCounters> {
        self.known.retain(|tgid, known| {
            let mut jvms = jvms.iter();
            jvms.any(|jvm| jvm.tgid == *tgid && known.is(jvm))
        });
        for jvm in jvms {
            self.known.entry(jvm.tgid).or_insert_with(|| Known::of(jvm));
        }
        self.search(jvms, now_ns, find);
        let mut readable: Vec<(u64, u32, u32)> = jvms
            .iter()
            .filter_map(|jvm| {
                let known = self.known.get(&jvm.tgid)?;
                known.file.as_ref()?;
                Some((known.read_ns, jvm.tgid, jvm.pid))
            })
            .collect();
        readable.sort_unstable();
        let mut found = Vec::new();
        for (_, tgid, pid) in readable.into_iter().take(MAX_READS) {
            let Some(known) = self.known.get_mut(&tgid) else {
                continue;
            };
            known.read_ns = now_ns;
            let bytes = known.file.as_ref().and_then(|file| read(pid, file));
            match bytes.map(|bytes| parse(tgid, &bytes)) {
                Some(Ok(counters)) => found.push(counters),
                // It has ended, access is denied, or the file is not what a JVM makes: searched again later.
                None => known.file = None,
                Some(Err(Unusable::Starting)) => {}
                Some(Err(reason)) => {
                    known.file = None;
                    notices.report_once("jvm_counters_unusable", || {
                        format!(
                            "the performance data of the JVM {pid} is not used, nor possibly that of others: {reason}. Verdicts \
                             on its garbage collection rest on its threads alone"
                        )
                    });
                }
            }
        }
        found
    }

    /// Searches for the files of JVMs that have none yet, those first that were never searched.
    fn search(
        &mut self,
        jvms: &[&ProcessInfo],
        now_ns: u64,
        find: impl Fn(u32) -> Option<PerfFile>,
    ) {
        let is_due = |known: &&Known| {
            let next_ns = known.searched_ns.map(|at_ns| at_ns + SEARCH_INTERVAL_NS);
            known.file.is_none() && next_ns.is_none_or(|next_ns| now_ns >= next_ns)
        };
        let mut due: Vec<(Option<u64>, u32, u32)> = jvms
            .iter()
            .filter_map(|jvm| {
                let known = self.known.get(&jvm.tgid).filter(is_due)?;
                Some((known.searched_ns, jvm.tgid, jvm.pid))
            })
            .collect();
        due.sort_unstable();
        for (_, tgid, pid) in due.into_iter().take(MAX_SEARCHES) {
            if let Some(known) = self.known.get_mut(&tgid) {
                known.searched_ns = Some(now_ns);
                known.file = find(pid);
            }
        }
    }

    /// Forgets all JVMs: nothing is focused any more.
    pub(super) fn clear(&mut self) {
        self.known.clear();
    }
}

impl Known {
    fn of(jvm: &ProcessInfo) -> Self {
        Self {
            start_ns: jvm.start_ns,
            exec_id: jvm.exec_id,
            searched_ns: None,
            file: None,
            read_ns: 0,
        }
    }

    fn is(&self, jvm: &ProcessInfo) -> bool {
        self.start_ns == jvm.start_ns && self.exec_id == jvm.exec_id
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::{perf_data::tests::valid, *};

    const SECOND: u64 = 1_000 * MS;

    fn jvm(tgid: u32, exec_id: u64) -> ProcessInfo {
        ProcessInfo {
            tgid,
            pid: tgid,
            parent: 1,
            start_ns: 1,
            exec_id,
            kernel: false,
            comm: "java".to_owned(),
        }
    }

    fn file() -> Option<PerfFile> {
        PerfFile::mapped("0-1 rw-s 0 0:0 1 /tmp/hsperfdata_bob/1")
    }

    #[test]
    fn mappings_are_searched_once_and_the_file_is_read_in_each_poll() {
        let mut scan = JvmCountersScan::default();
        let mut notices = Notices::default();
        let searches = Cell::new(0);
        let find = |_| {
            searches.set(searches.get() + 1);
            file()
        };
        let read = |_, _: &PerfFile| Some(valid());
        let mut poll = |second: u64, exec_id| {
            let jvm = jvm(7, exec_id);
            let found = scan.poll(&[&jvm], second * SECOND, find, read, &mut notices);
            let tgids: Vec<u32> = found.iter().map(|counters| counters.tgid).collect();
            assert_eq!(tgids, [7]);
        };
        for second in 1..30 {
            poll(second, 1);
        }
        assert_eq!(searches.get(), 1);
        poll(30, 2);
        assert_eq!(searches.get(), 2, "it executes another program");
    }

    #[test]
    fn a_file_that_cannot_be_used_is_searched_again_later_and_reported_once() {
        let mut scan = JvmCountersScan::default();
        let mut notices = Notices::default();
        let searches = Cell::new(0);
        let mut reported = 0;
        for second in 1..=30 {
            let find = |_| {
                searches.set(searches.get() + 1);
                file()
            };
            // Read in vain first, then hostile.
            let read = |_, _: &PerfFile| (second > 15).then(|| b"\xca\xfe".to_vec());
            let jvm = jvm(7, 1);
            let found = scan.poll(&[&jvm], second * SECOND, find, read, &mut notices);
            assert!(found.is_empty());
            reported += notices.take().len();
        }
        assert_eq!((searches.get(), reported), (3, 1));
    }

    #[test]
    fn many_jvms_take_turns() {
        let mut scan = JvmCountersScan::default();
        let mut notices = Notices::default();
        let jvms: Vec<ProcessInfo> = (1..=40).map(|tgid| jvm(tgid, 1)).collect();
        let jvms: Vec<&ProcessInfo> = jvms.iter().collect();
        let reads = RefCell::new(Vec::new());
        let read = |pid, _: &PerfFile| {
            reads.borrow_mut().push(pid);
            Some(valid())
        };
        for second in 1..=40 {
            scan.poll(&jvms, second * SECOND, |_| file(), read, &mut notices);
            assert!(reads.borrow().len() <= MAX_READS);
            reads.borrow_mut().clear();
        }
        // The file of each has been found by now.
        for second in 41..=43 {
            scan.poll(&jvms, second * SECOND, |_| file(), read, &mut notices);
        }
        let mut read: Vec<u32> = reads.into_inner();
        read.sort_unstable();
        read.dedup();
        assert_eq!(read.len(), 40);
    }
}
