//! Counters of network namespaces, from /proc/PID/net: the kernel counts connections that entered or overflowed an
//! accept queue per namespace, not per listener. Both files together take some 35 µs to read.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    io::{self, Read as _, Seek as _},
};

use crate::sample::Network;

/// Namespaces whose counters are read at most; a node with more has their arrivals unknown.
const MAX_NETWORKS: usize = 256;

#[derive(Default)]
pub(super) struct Networks {
    /// Kept open: a file under /proc/PID/net stays that namespace's for as long as it is open.
    files: HashMap<u32, Files>,
    text: String,
}

struct Files {
    snmp: File,
    netstat: File,
}

impl Networks {
    /// The counters of each namespace in `places` (namespace, tgid of a process in it).
    pub(super) fn read(
        &mut self,
        places: &BTreeSet<(u32, u32)>,
        pid_of: impl Fn(u32) -> Option<u32>,
    ) -> Vec<Network> {
        self.files.retain(|netns, _| {
            places
                .range((*netns, 0)..=(*netns, u32::MAX))
                .next()
                .is_some()
        });
        let mut networks: Vec<Network> = Vec::new();
        for (netns, tgid) in places {
            if networks
                .last()
                .is_some_and(|network| network.netns == *netns)
            {
                continue;
            }
            if !self.files.contains_key(netns)
                && self.files.len() < MAX_NETWORKS
                && let Some(pid) = pid_of(*tgid)
                && let Ok(snmp) = File::open(format!("/proc/{pid}/net/snmp"))
                && let Ok(netstat) = File::open(format!("/proc/{pid}/net/netstat"))
            {
                self.files.insert(*netns, Files { snmp, netstat });
            }
            let Some(files) = self.files.get_mut(netns) else {
                continue;
            };
            if let Some(passive_opens) =
                counter(&mut files.snmp, &mut self.text, "Tcp: ", "PassiveOpens")
                && let Some(listen_overflows) = counter(
                    &mut files.netstat,
                    &mut self.text,
                    "TcpExt: ",
                    "ListenOverflows",
                )
            {
                networks.push(Network {
                    netns: *netns,
                    passive_opens,
                    others: 0,
                    listen_overflows,
                    syn_drops: 0,
                    syn_cookies: 0,
                });
            }
        }
        networks
    }
}

fn counter(file: &mut File, text: &mut String, section: &str, name: &str) -> Option<u64> {
    reread(file, text).ok()?;
    column(text, section, name)
}

fn reread(file: &mut File, text: &mut String) -> io::Result<()> {
    text.clear();
    file.rewind()?;
    file.read_to_string(text).map(drop)
}

/// A counter of one section: its first line names the columns, its second holds them.
fn column(text: &str, section: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(section));
    let column = lines.next()?.split(' ').position(|column| column == name)?;
    lines.next()?.split(' ').nth(column)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::column;

    #[test]
    fn a_counter_is_found_by_its_column() {
        let text =
            "Ip: Forwarding\nIp: 1\nTcp: RtoAlgorithm ActiveOpens PassiveOpens\nTcp: 1 22 333\n";
        assert_eq!(column(text, "Tcp: ", "PassiveOpens"), Some(333));
        assert_eq!(column(text, "Tcp: ", "Absent"), None);
        assert_eq!(column("", "Tcp: ", "PassiveOpens"), None);
    }
}
