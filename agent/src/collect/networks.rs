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
            let Some([passive_opens]) =
                counters(&mut files.snmp, &mut self.text, "Tcp: ", ["PassiveOpens"])
            else {
                continue;
            };
            let names = ["ListenOverflows", "TCPReqQFullDrop", "SyncookiesSent"];
            let Some([listen_overflows, syn_drops, syn_cookies]) =
                counters(&mut files.netstat, &mut self.text, "TcpExt: ", names)
            else {
                continue;
            };
            networks.push(Network {
                netns: *netns,
                passive_opens,
                others: 0,
                listen_overflows,
                syn_drops,
                syn_cookies,
            });
        }
        networks
    }
}

fn counters<const N: usize>(
    file: &mut File,
    text: &mut String,
    section: &str,
    names: [&str; N],
) -> Option<[u64; N]> {
    reread(file, text).ok()?;
    columns(text, section, names)
}

fn reread(file: &mut File, text: &mut String) -> io::Result<()> {
    text.clear();
    file.rewind()?;
    file.read_to_string(text).map(drop)
}

/// Counters of one section: its first line names the columns, its second holds them.
fn columns<const N: usize>(text: &str, section: &str, names: [&str; N]) -> Option<[u64; N]> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(section));
    let (heads, values) = (lines.next()?, lines.next()?);
    let mut found = [None; N];
    for (head, value) in heads.split(' ').zip(values.split(' ')) {
        if let Some(index) = names.iter().position(|name| *name == head) {
            found[index] = value.parse().ok();
        }
    }
    found
        .iter()
        .all(Option::is_some)
        .then(|| found.map(Option::unwrap_or_default))
}

#[cfg(test)]
mod tests {
    use super::columns;

    #[test]
    fn a_counter_is_found_by_its_column() {
        let text =
            "Ip: Forwarding\nIp: 1\nTcp: RtoAlgorithm ActiveOpens PassiveOpens\nTcp: 1 22 333\n";
        assert_eq!(
            columns(text, "Tcp: ", ["PassiveOpens", "ActiveOpens"]),
            Some([333, 22])
        );
        assert_eq!(columns(text, "Tcp: ", ["Absent"]), None);
        assert_eq!(columns("", "Tcp: ", ["PassiveOpens"]), None);
    }
}
