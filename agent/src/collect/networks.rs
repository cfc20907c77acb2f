//! Counters of network namespaces, from /proc/PID/net/snmp and netstat. The kernel counts connections that entered or
//! overflowed an accept queue per namespace, not per listener.
//!
//! Reading both files takes about 35 µs, and they are part of every sample. So they are kept open, and only the few wanted
//! columns are parsed.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs::File,
    io::{self, Read as _, Seek as _},
};

use crate::{
    sample::Network,
    target::{ListenerInfo, ProcessInfo},
};

/// Maximum number of namespaces whose counters are read. In further ones, arrivals are unknown.
const MAX_NETWORKS: usize = 256;

#[derive(Default)]
pub(super) struct Networks {
    /// Network namespaces in which targets listen, each with the tgids of the processes that do.
    listening: BTreeSet<(u32, u32)>,
    /// Listeners that no target holds, per network namespace: their arrivals are part of the same counters.
    foreign_listeners: HashMap<u32, u32>,
    /// A file under /proc/PID/net belongs to the same namespace for as long as it is open, whatever happens to the process.
    files: HashMap<u32, Files>,
    text: String,
}

struct Files {
    snmp: File,
    netstat: File,
}

impl Networks {
    /// Updates the namespaces from all listeners of the machine and the watched processes.
    pub(super) fn set_listeners(&mut self, listeners: &[ListenerInfo], watched: &[ProcessInfo]) {
        let watched: HashSet<u32> = watched.iter().map(|process| process.tgid).collect();
        let own = listeners
            .iter()
            .filter(|listener| watched.contains(&listener.tgid));
        let own_cookies: HashSet<u64> = own.clone().map(|listener| listener.cookie).collect();
        self.listening = own
            .map(|listener| (listener.netns, listener.tgid))
            .collect();
        let mut seen = HashSet::new();
        self.foreign_listeners.clear();
        for listener in listeners {
            if !own_cookies.contains(&listener.cookie) && seen.insert(listener.cookie) {
                *self.foreign_listeners.entry(listener.netns).or_default() += 1;
            }
        }
    }

    /// Reads the counters of each namespace in which targets listen. `pid_of`: a process as the agent's /proc shows it.
    pub(super) fn read(&mut self, pid_of: impl Fn(u32) -> Option<u32>) -> Vec<Network> {
        let listening = &self.listening;
        let has_listeners = |netns: u32| {
            let mut tgids = listening.range((netns, 0)..=(netns, u32::MAX));
            tgids.next().is_some()
        };
        self.files.retain(|netns, _| has_listeners(*netns));
        let mut networks: Vec<Network> = Vec::new();
        for (netns, tgid) in listening {
            let is_read = networks.last().is_some_and(|last| last.netns == *netns);
            if is_read {
                continue;
            }
            if !self.files.contains_key(netns)
                && self.files.len() < MAX_NETWORKS
                && let Some(pid) = pid_of(*tgid)
                && let Ok(files) = Files::open(pid)
            {
                self.files.insert(*netns, files);
            }
            let Some(files) = self.files.get_mut(netns) else {
                continue;
            };
            if let Some(network) = files.read(*netns, &mut self.text) {
                networks.push(Network {
                    others: self.foreign_listeners.get(netns).copied().unwrap_or(0),
                    ..network
                });
            }
        }
        networks
    }
}

impl Files {
    fn open(pid: u32) -> io::Result<Self> {
        Ok(Self {
            snmp: File::open(format!("/proc/{pid}/net/snmp"))?,
            netstat: File::open(format!("/proc/{pid}/net/netstat"))?,
        })
    }

    /// `text` is a scratch buffer. `None`: a counter is missing.
    fn read(&mut self, netns: u32, text: &mut String) -> Option<Network> {
        let [passive_opens] = counters(&mut self.snmp, text, "Tcp: ", ["PassiveOpens"])?;
        let names = ["ListenOverflows", "TCPReqQFullDrop", "SyncookiesSent"];
        let [listen_overflows, syn_drops, syn_cookies] =
            counters(&mut self.netstat, text, "TcpExt: ", names)?;
        Some(Network {
            netns,
            passive_opens,
            others: 0,
            listen_overflows,
            syn_drops,
            syn_cookies,
        })
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

/// Finds counters in one section: its first line names the columns, its second holds their values.
fn columns<const N: usize>(text: &str, section: &str, names: [&str; N]) -> Option<[u64; N]> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(section));
    let (titles, values) = (lines.next()?, lines.next()?);
    let mut found = [None; N];
    for (title, value) in titles.split(' ').zip(values.split(' ')) {
        if let Some(index) = names.iter().position(|name| *name == title) {
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
