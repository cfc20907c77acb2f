//! CPU time of the machine's processes between two looks, watched or not. Pure but for the names.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use rustc_hash::FxHashMap;
use tailback_ebpf::CpuRecord;

use crate::sample::Neighbour;

/// Processes that are told, those that used the most first.
const MAX_TOLD: usize = 32;

#[derive(Default)]
pub(super) struct CpuAccounting {
    /// CPU time of each thread at the previous look.
    threads: FxHashMap<(u32, u32), u64>,
    now: FxHashMap<(u32, u32), u64>,
    /// There was a previous look: what is new now has used all its time since.
    looked: bool,
}

impl CpuAccounting {
    pub(super) fn add(&mut self, record: &CpuRecord) {
        self.now
            .insert((record.header.tgid, record.tid), record.cpu_ns);
    }

    /// Threads that the previous look met.
    pub(super) fn threads(&self) -> usize {
        self.threads.len()
    }

    /// After a complete walk: who used CPU since the previous one. `name` gives a process's name and control group.
    pub(super) fn finish(
        &mut self,
        name: impl Fn(u32) -> Option<(String, Option<String>)>,
    ) -> Vec<Neighbour> {
        let mut used: HashMap<u32, u64> = HashMap::new();
        if self.looked {
            for (thread, cpu_ns) in &self.now {
                let before = self.threads.get(thread).copied().unwrap_or(0);
                let spent = cpu_ns.saturating_sub(before);
                if spent > 0 {
                    *used.entry(thread.0).or_default() += spent;
                }
            }
        }
        self.looked = true;
        std::mem::swap(&mut self.threads, &mut self.now);
        self.now.clear();
        let mut used: Vec<(u32, u64)> = used.into_iter().collect();
        used.sort_unstable_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        used.truncate(MAX_TOLD);
        used.into_iter()
            .map(|(tgid, cpu_ns)| {
                let (name, cgroup) = name(tgid).unwrap_or_default();
                Neighbour {
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
    fn threads_are_added_up_since_the_previous_look() {
        let mut census = CpuAccounting::default();
        census.add(&record(1, 1, 100));
        census.add(&record(2, 2, 900));
        assert!(census.finish(|_| None).is_empty());
        assert_eq!(census.threads(), 2);
        census.add(&record(1, 1, 150));
        // A thread that came since.
        census.add(&record(1, 3, 70));
        census.add(&record(2, 2, 900));
        let told = census.finish(|tgid| Some((format!("p{tgid}"), None)));
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].name.as_str(), told[0].cpu_ns), ("p1", 120));
    }
}
