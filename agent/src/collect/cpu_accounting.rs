//! CPU time of all processes of the machine, watched or not: who competes for the CPUs.

use std::collections::HashMap;

use anyhow::Result;
use rustc_hash::FxHashMap;
use tailback_ebpf::CpuRecord;

use super::{paths, processes::Processes};
use crate::{
    kernel::scanner::{Record, Scanner},
    sample::{CpuUser, Sample},
    text::harmless,
};

/// Maximum number of processes in a sample: those that used the most CPU time since the previous scan.
const MAX_REPORTED: usize = 32;

#[derive(Default)]
pub(super) struct CpuAccounting {
    /// CPU time of each thread (tgid, tid) at the previous scan, ns.
    previous: FxHashMap<(u32, u32), u64>,
    /// The same in the current scan.
    current: FxHashMap<(u32, u32), u64>,
    /// There was a previous scan, so a thread that is new has used all of its CPU time since then.
    has_previous: bool,
}

impl CpuAccounting {
    /// Scans all threads of the machine, and reports the processes that used CPU time since the previous scan.
    pub(super) fn scan(
        &mut self,
        scanner: &mut Scanner,
        processes: &Processes,
        sample: &mut Sample,
    ) -> Result<()> {
        scanner.scan_cpu_times(&mut |record| {
            if let Record::Cpu(cpu) = record {
                self.add(cpu);
            }
        })?;
        sample.cpu_users = self.finish(|tgid| {
            let process = processes.get(tgid)?;
            Some((harmless(&process.comm), paths::cgroup(process.pid)))
        });
        sample.scans.cpu_users = true;
        Ok(())
    }

    /// Number of threads in the previous scan.
    pub(super) fn threads(&self) -> usize {
        self.previous.len()
    }

    fn add(&mut self, record: &CpuRecord) {
        self.current
            .insert((record.header.tgid, record.tid), record.cpu_ns);
    }

    /// Ends a scan. `name_of`: a process's name and cgroup.
    fn finish(
        &mut self,
        name_of: impl Fn(u32) -> Option<(String, Option<String>)>,
    ) -> Vec<CpuUser> {
        let mut used: HashMap<u32, u64> = HashMap::new();
        if self.has_previous {
            for (thread, cpu_ns) in &self.current {
                let before = self.previous.get(thread).copied().unwrap_or(0);
                let used_ns = cpu_ns.saturating_sub(before);
                if used_ns > 0 {
                    *used.entry(thread.0).or_default() += used_ns;
                }
            }
        }
        self.has_previous = true;
        std::mem::swap(&mut self.previous, &mut self.current);
        self.current.clear();
        let mut used: Vec<(u32, u64)> = used.into_iter().collect();
        used.sort_unstable_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        used.truncate(MAX_REPORTED);
        used.into_iter()
            .map(|(tgid, cpu_ns)| {
                let (name, cgroup) = name_of(tgid).unwrap_or_default();
                CpuUser {
                    tgid,
                    name,
                    cgroup,
                    cpu_ns,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use tailback_ebpf::{CpuRecord, Header, KIND_CPU};

    use super::CpuAccounting;

    fn record(tgid: u32, tid: u32, cpu_ns: u64) -> CpuRecord {
        CpuRecord {
            header: Header {
                kind: KIND_CPU,
                len: size_of::<CpuRecord>() as u16,
                tgid,
            },
            tid,
            reserved: 0,
            cpu_ns,
        }
    }

    #[test]
    fn cpu_time_of_threads_since_the_previous_scan_is_summed_by_process() {
        let mut accounting = CpuAccounting::default();
        accounting.add(&record(1, 1, 100));
        accounting.add(&record(2, 2, 900));
        assert!(accounting.finish(|_| None).is_empty());
        assert_eq!(accounting.threads(), 2);
        accounting.add(&record(1, 1, 150));
        // A new thread.
        accounting.add(&record(1, 3, 70));
        accounting.add(&record(2, 2, 900));
        let reported = accounting.finish(|tgid| Some((format!("p{tgid}"), None)));
        assert_eq!(reported.len(), 1);
        assert_eq!((reported[0].name.as_str(), reported[0].cpu_ns), ("p1", 120));
    }
}
