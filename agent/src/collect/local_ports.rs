//! Finds remote addresses towards which a network namespace has used up a range of local ports.
//!
//! connect(2) then fails with EADDRNOTAVAIL. Most of these connections are in TIME_WAIT and belong to no process, so no scan over
//! files sees them. The range (net.ipv4.ip_local_port_range) can be read only from within the namespace. It need not be: ports
//! are chosen at random, and half of them, the odd ones, only once the others are used up. So a stretch of ports that are all
//! in use is a range that is used up.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use super::paths::read_text;
use crate::{sample::LocalPorts, target::ProcessInfo};

/// Fewer ports than this towards one address are no range: administrators of containers set it to hundreds at least.
const MIN_USED: u32 = 100;
/// Share of the stretch that is in use, in percent. Not all: a port becomes free when its minute in TIME_WAIT is over, and some may be
/// reserved (net.ipv4.ip_local_reserved_ports).
const MIN_USED_PERCENT: u32 = 98;
/// Maximum number of network namespaces examined in one search.
const MAX_NETWORKS: usize = 8;
/// Longest text read from /proc/PID/net/tcp, bytes: 100,000 connections.
const MAX_BYTES: u64 = 16 << 20;
/// Maximum number of remote addresses counted: each client of a server is one.
const MAX_REMOTES: usize = 65_536;
/// Maximum number of remote addresses reported.
const MAX_REPORTED: usize = 16;

#[derive(Default)]
pub(super) struct LocalPortScan {
    /// The last search found something.
    has_found: bool,
}

impl LocalPortScan {
    /// Searches these network namespaces, each given with a process in it. `None`: nothing to report.
    pub(super) fn search(&mut self, networks: &BTreeMap<u32, u32>) -> Option<Vec<LocalPorts>> {
        let mut found: Vec<LocalPorts> = Vec::new();
        for (netns, pid) in networks {
            // A line or two. Most namespaces hold too few connections to be read in full.
            let summary = read_text(&format!("/proc/{pid}/net/sockstat"), 4_096);
            if connections(&summary) < MIN_USED {
                continue;
            }
            let mut ports = Ports::default();
            for file in ["tcp", "tcp6"] {
                ports.read(&read_text(&format!("/proc/{pid}/net/{file}"), MAX_BYTES));
            }
            found.extend(ports.used_up(*netns));
        }
        found.sort_by_key(|ports| std::cmp::Reverse(ports.used));
        found.truncate(MAX_REPORTED);
        let had_found = std::mem::replace(&mut self.has_found, !found.is_empty());
        (self.has_found || had_found).then_some(found)
    }
}

/// The network namespaces of these processes, at most [`MAX_NETWORKS`] of them, each with a process in it.
pub(super) fn networks_of(processes: &[&ProcessInfo]) -> BTreeMap<u32, u32> {
    let mut networks = BTreeMap::new();
    for process in processes {
        if networks.len() >= MAX_NETWORKS {
            break;
        }
        if let Some(netns) = network_of(process.pid) {
            networks.entry(netns).or_insert(process.pid);
        }
    }
    networks
}

/// Inode of a process's network namespace.
pub(super) fn network_of(pid: u32) -> Option<u32> {
    let link = fs::read_link(format!("/proc/{pid}/ns/net")).ok()?;
    let link = link.to_str()?;
    let inode = link.strip_prefix("net:[")?.strip_suffix(']')?;
    inode.parse().ok()
}

/// TCP connections and those in TIME_WAIT, in /proc/PID/net/sockstat: `TCP: inuse 5 orphan 0 tw 28000 alloc 9 mem 1`. The first
/// number is of IPv4 alone.
fn connections(sockstat: &str) -> u32 {
    let line = sockstat.lines().find_map(|line| line.strip_prefix("TCP: "));
    let words: Vec<&str> = line.unwrap_or_default().split(' ').collect();
    let number = |name: &str| {
        let at = words.iter().position(|word| *word == name)?;
        words.get(at + 1)?.parse::<u32>().ok()
    };
    let sum = |names: [&str; 2]| names.into_iter().filter_map(number).sum();
    sum(["tw", "alloc"])
}

/// Local ports in use, by local address and remote address.
#[derive(Default)]
struct Ports {
    by_remote: HashMap<(IpAddr, SocketAddr), LocalPorts>,
}

impl Ports {
    /// Counts the lines of /proc/PID/net/tcp or tcp6.
    fn read(&mut self, text: &str) {
        /// include/net/tcp_states.h
        const TIME_WAIT: u8 = 6;
        const LISTEN: u8 = 10;
        for (local, remote, state) in text.lines().filter_map(connection) {
            if state == LISTEN {
                continue;
            }
            let key = (local.ip(), remote);
            if !self.by_remote.contains_key(&key) && self.by_remote.len() >= MAX_REMOTES {
                continue;
            }
            let port = local.port();
            let ports = self.by_remote.entry(key).or_insert(LocalPorts {
                netns: 0,
                remote,
                lowest: port,
                highest: port,
                used: 0,
                time_wait: 0,
            });
            ports.lowest = ports.lowest.min(port);
            ports.highest = ports.highest.max(port);
            ports.used += 1;
            ports.time_wait += u32::from(state == TIME_WAIT);
        }
    }

    fn used_up(self, netns: u32) -> impl Iterator<Item = LocalPorts> {
        let all = self.by_remote.into_values();
        all.filter(|ports| {
            ports.used >= MIN_USED && ports.used * 100 >= ports.span() * MIN_USED_PERCENT
        })
        .map(move |ports| LocalPorts { netns, ..ports })
    }
}

/// The addresses and the state of a connection: `3: 0100007F:9C40 0200007F:1F90 06 …`.
fn connection(line: &str) -> Option<(SocketAddr, SocketAddr, u8)> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (local, remote) = (address(words.next()?)?, address(words.next()?)?);
    Some((local, remote, u8::from_str_radix(words.next()?, 16).ok()?))
}

/// An address as these files write it: words of four bytes, each in the order of this machine, then the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let word = u32::from_str_radix(ip.get(at * 8..at * 8 + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (at, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(at)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    /// Connections from these ports of 10.0.0.1 to 10.0.0.2:5432, and a listener.
    fn table(ports: impl Iterator<Item = u16>, state: u8) -> String {
        let [local, remote] = [[10, 0, 0, 1], [10, 0, 0, 2]].map(u32::from_ne_bytes);
        let mut text = "  sl  local_address rem_address   st tx_queue rx_queue\n".to_owned();
        writeln!(
            text,
            "   0: 00000000:1538 00000000:0000 0A 00000000:00000000"
        )
        .unwrap();
        for port in ports {
            writeln!(
                text,
                "   1: {local:08X}:{port:04X} {remote:08X}:1538 {state:02X} 0:0"
            )
            .unwrap();
        }
        text
    }

    fn used_up(text: &str) -> Vec<LocalPorts> {
        let mut ports = Ports::default();
        ports.read(text);
        ports.used_up(7).collect()
    }

    #[test]
    fn a_stretch_of_ports_without_a_gap_is_a_range_that_is_used_up() {
        let expected = LocalPorts {
            netns: 7,
            remote: "10.0.0.2:5432".parse().unwrap(),
            lowest: 40_000,
            highest: 40_299,
            used: 300,
            time_wait: 300,
        };
        assert_eq!(used_up(&table(40_000..40_300, 6)), [expected]);
        let open = LocalPorts {
            time_wait: 0,
            ..expected
        };
        assert_eq!(used_up(&table(40_000..40_300, 1)), [open]);
    }

    #[test]
    fn a_range_with_free_ports_is_not_used_up() {
        let half = (40_000..40_400).filter(|port| port % 2 == 0);
        assert_eq!(used_up(&table(half, 6)), []);
        let gaps = (40_000..40_400).filter(|port| port % 20 != 0);
        assert_eq!(used_up(&table(gaps, 6)), []);
        assert_eq!(used_up(&table(40_000..40_050, 6)), [], "too few");
    }

    #[test]
    fn text_that_is_no_table_of_connections_is_ignored() {
        for line in [
            "",
            "1:",
            "1: 0100007F:9C40",
            "1: 0100007F:9C40 0200007F 06",
            "1: 0100007X:9C40 0200007F:0050 06",
            "1: 01:9C40 0200007F:0050 06",
            "1: 0100007F:9C40 0200007F:0050 XX",
        ] {
            assert_eq!(connection(line), None, "{line:?}");
        }
        assert_eq!(
            connections("sockets: used 9\nTCP: inuse 5 orphan 0 tw 70 alloc 9 mem 1\n"),
            79
        );
        assert_eq!(connections("TCP: inuse x orphan\n"), 0);
    }

    #[test]
    fn mapped_addresses_are_those_of_version_4() {
        let mapped: Vec<u32> = [[0; 4], [0; 4], [0, 0, 255, 255], [10, 0, 0, 2]]
            .map(u32::from_ne_bytes)
            .to_vec();
        let text: String = mapped.iter().map(|word| format!("{word:08X}")).collect();
        let expected: SocketAddr = "10.0.0.2:80".parse().unwrap();
        assert_eq!(address(&format!("{text}:0050")), Some(expected));
    }
}
