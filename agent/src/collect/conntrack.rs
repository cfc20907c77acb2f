//! Finds connection tracking tables that are full.
//!
//! The kernel drops the first packet of a connection for which the table has no room ("nf_conntrack: table full, dropping packet").
//! The client sends it again after one second, and waits. Each network namespace has a table of its own, and the packets of a
//! container also pass the one of the host. The limit is the same for all.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};

use super::{local_ports::network_of, paths::read_text};
use crate::{
    sample::Conntrack,
    target::namespaces::{self, is_initial},
};

/// Longest text read from /proc/PID/net/stat/nf_conntrack, bytes: a line of 160 for each of 6,000 CPUs.
const MAX_BYTES: u64 = 1 << 20;
/// The limit of all tables.
const LIMIT: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
const INIT: u32 = 1;
/// The first kernel thread, in the initial PID namespace.
const KTHREADD: u32 = 2;
/// Observations older than this, ns, are ignored: three times the longest interval between searches.
const MAX_AGE_NS: u64 = 30_000_000_000;

#[derive(Default)]
pub(super) struct ConntrackScan {
    /// What is known of each network namespace.
    known: HashMap<u32, Known>,
    /// The last search found something.
    has_found: bool,
}

#[derive(Clone, Copy)]
struct Known {
    /// Dropped packets up to the last search.
    drops: u64,
    /// Those of them that are attributed to a full table: dropped after the last search that found room in it. Starts
    /// again at 0 if the table has room, or if nothing was dropped for [`MAX_AGE_NS`].
    dropped_full: u64,
    /// Time of the last search, ns.
    searched_ns: u64,
    /// Time of the last search that found more dropped packets, ns.
    dropped_ns: Option<u64>,
}

impl ConntrackScan {
    /// Searches these network namespaces, each given with a process in it, and that of the host. `None`: nothing to report.
    pub(super) fn search(
        &mut self,
        networks: &BTreeMap<u32, u32>,
        now_ns: u64,
    ) -> Option<Vec<Conntrack>> {
        let limit = read_text(LIMIT, 64).trim().parse::<u64>().ok();
        // 0: no limit.
        let limit = limit.filter(|limit| *limit > 0);
        // In another PID namespace, process 1 may be a watched service.
        let sees_host = is_initial(namespaces::PID) == Ok(true);
        // A security module may protect init. Kernel threads are in the host's network namespace as well.
        let host = sees_host.then_some([INIT, KTHREADD]);
        let mut host = host.into_iter().flatten();
        let host = host.find_map(|pid| Some((network_of(pid)?, pid)));
        let mut networks = networks.clone();
        networks.extend(host);
        let mut known = HashMap::with_capacity(networks.len());
        let mut found = Vec::new();
        for (netns, pid) in networks {
            let text = read_text(&format!("/proc/{pid}/net/stat/nf_conntrack"), MAX_BYTES);
            let (Some(table), Some(limit)) = (table(&text), limit) else {
                continue;
            };
            let mut conntrack = Conntrack {
                netns,
                is_of_host: host.is_some_and(|(host, _)| host == netns),
                entries: table.entries,
                limit,
                drops: 0,
            };
            let is_recent = |at_ns: u64| now_ns.saturating_sub(at_ns) <= MAX_AGE_NS;
            let is_full = conntrack.is_full();
            let before = self.known.get(&netns);
            let before = before.filter(|before| is_full && is_recent(before.searched_ns));
            let mut dropped_ns = None;
            if let Some(before) = before {
                let more = table.drops.saturating_sub(before.drops);
                dropped_ns = if more > 0 {
                    Some(now_ns)
                } else {
                    before.dropped_ns.filter(|at_ns| is_recent(*at_ns))
                };
                if dropped_ns.is_some() {
                    conntrack.drops = before.dropped_full.saturating_add(more);
                }
            }
            let now = Known {
                drops: table.drops,
                dropped_full: conntrack.drops,
                searched_ns: now_ns,
                dropped_ns,
            };
            known.insert(netns, now);
            let has_no_room = conntrack.entries >= limit || conntrack.drops > 0;
            found.extend(has_no_room.then_some(conntrack));
        }
        self.known = known;
        let had_found = std::mem::replace(&mut self.has_found, !found.is_empty());
        (self.has_found || had_found).then_some(found)
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Table {
    entries: u64,
    /// Dropped packets, of all CPUs.
    drops: u64,
}

/// Reads /proc/PID/net/stat/nf_conntrack: titles, then a line per CPU with hexadecimal numbers. The number of entries is the same in
/// all lines.
fn table(text: &str) -> Option<Table> {
    let mut lines = text.lines();
    let titles: Vec<&str> = lines.next()?.split_whitespace().collect();
    let column = |name: &str| titles.iter().position(|title| *title == name);
    let (entries_at, drops_at) = (column("entries")?, column("drop")?);
    let mut table: Option<Table> = None;
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| u64::from_str_radix(words.get(at)?, 16).ok();
        let (entries, drops) = (number(entries_at)?, number(drops_at)?);
        let before = table.map_or(0, |table| table.drops);
        table = Some(Table {
            entries,
            drops: before.saturating_add(drops),
        });
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const TITLES: &str = "entries  clashres found new invalid ignore delete chainlength insert insert_failed drop early_drop icmp_error  expect_new expect_create expect_delete search_restart\n";

    #[test]
    fn drops_of_all_cpus_are_added() {
        let cpu = |entries, drops| {
            let zero = "00000000 ".repeat(9);
            format!("{entries:08x}  {zero}{drops:08x} 00000000 00000000\n")
        };
        let text = format!("{TITLES}{}{}", cpu(300, 5), cpu(300, 0x10));
        let expected = Table {
            entries: 300,
            drops: 21,
        };
        assert_eq!(table(&text), Some(expected));
    }

    #[test]
    fn a_kernel_without_the_file_or_with_other_columns_has_no_table() {
        assert_eq!(table(""), None);
        assert_eq!(table(TITLES), None);
        assert_eq!(table("entries searched\n00000001 00000000\n"), None);
        assert_eq!(table(&format!("{TITLES}garbage\n")), None);
    }
}
