//! Removes the agent's own connections from what was scanned, so that no queue counts them.

use std::{collections::HashSet, net::SocketAddr, time::Duration};

use super::{Apps, canonical, own_netns};
use crate::{
    app::own::{Ends, Listed},
    sample::{Listener, Sample},
};

/// A connection that no process has accepted after this time waits in the accept queue: longer than the interval between scans
/// over all files usually is.
const UNACCEPTED_AFTER: Duration = Duration::from_secs(1);
/// Greatest difference between two readings of the age of one connection, ns: the kernel's is of its handshake.
const AGE_TOLERANCE_NS: u64 = 20_000_000;

impl Apps {
    /// Removes the agent's own connections from what was scanned: no queue counts them.
    pub(in crate::collect) fn leave_out_own(&mut self, sample: &mut Sample) {
        let Some(asker) = &self.asker else {
            return;
        };
        let own = asker.own().all();
        if own.is_empty() {
            self.accepted.clear();
            return;
        }
        let netns = own_netns();
        let mut accepted_by = Vec::new();
        let ends: HashSet<(SocketAddr, SocketAddr)> = own.iter().filter_map(tcp_ends).collect();
        sample.connections.retain(|connection| {
            let key = (canonical(connection.remote), canonical(connection.local));
            let is_own = Some(connection.netns) == netns && ends.contains(&key);
            if is_own {
                accepted_by.push((connection.tgid, key));
            }
            !is_own
        });
        self.accepted.retain(|key| ends.contains(key));
        self.accepted
            .extend(accepted_by.iter().map(|(_, key)| *key));
        let inodes: HashSet<u64> = own
            .iter()
            .filter_map(|listed| match listed.ends {
                Ends::Unix(inode) => Some(inode),
                Ends::Tcp(..) => None,
            })
            .collect();
        sample.unix.retain(|socket| {
            let is_own = socket.peer.is_some_and(|peer| inodes.contains(&peer));
            if is_own {
                accepted_by.push((socket.tgid, (NOWHERE, NOWHERE)));
            }
            !is_own
        });
        // They are open files of the service, too.
        for files in &mut sample.files {
            let count = accepted_by.iter().filter(|(tgid, _)| *tgid == files.tgid);
            files.open = files.open.saturating_sub(count.count() as u32);
        }
        for listed in own.iter().filter(|listed| !listed.is_accepted) {
            let Some(key) = tcp_ends(listed).filter(|key| !self.accepted.contains(key)) else {
                continue;
            };
            let mut listeners = sample.listeners.iter_mut();
            let at = |listener: &&mut Listener| {
                let address = canonical(listener.address);
                Some(listener.netns) == netns
                    && address.port() == key.1.port()
                    && (address.ip() == key.1.ip() || address.ip().is_unspecified())
            };
            if let Some(listener) = listeners.find(at) {
                take_from_accept_queue(listener, listed.opened.elapsed());
            }
        }
    }
}

/// Stands for the ends of a unix socket.
const NOWHERE: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

/// The agent's end of a TCP connection, and the other one.
fn tcp_ends(listed: &Listed) -> Option<(SocketAddr, SocketAddr)> {
    match listed.ends {
        Ends::Tcp(own, service) => Some((canonical(own), canonical(service))),
        Ends::Unix(_) => None,
    }
}

/// Removes a connection of this age from the readings of an accept queue, if it is still in there.
fn take_from_accept_queue(listener: &mut Listener, age: Duration) {
    let age_ns = age.as_nanos() as u64;
    let ages = listener.ages_ns.iter().enumerate();
    let nearest = ages.min_by_key(|(_, known)| known.abs_diff(age_ns));
    let nearest = nearest.map(|(at, known)| (at, known.abs_diff(age_ns)));
    match nearest {
        Some((at, difference_ns)) if difference_ns <= AGE_TOLERANCE_NS => {
            listener.ages_ns.remove(at);
            listener.depth = listener.depth.saturating_sub(1);
        }
        // The kernel has not stamped it.
        _ if (listener.ages_ns.len() as u64) < u64::from(listener.depth)
            && age >= UNACCEPTED_AFTER =>
        {
            listener.depth -= 1;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(depth: u32, ages_ms: &[u64]) -> Listener {
        Listener {
            cookie: 1,
            tgid: 7,
            netns: 1,
            address: NOWHERE,
            depth,
            limit: 128,
            drops: 0,
            half_open: None,
            seen_ns: 0,
            ages_ns: ages_ms.iter().map(|ms| ms * 1_000_000).collect(),
        }
    }

    #[test]
    fn the_agents_own_connection_is_taken_out_of_an_accept_queue() {
        let mut queue = listener(3, &[900, 505, 100]);
        take_from_accept_queue(&mut queue, Duration::from_millis(500));
        assert_eq!((queue.depth, queue.ages_ns.len()), (2, 2));
        // It was accepted meanwhile: the others stay.
        take_from_accept_queue(&mut queue, Duration::from_millis(500));
        assert_eq!((queue.depth, queue.ages_ns.len()), (2, 2));
        let mut unstamped = listener(2, &[]);
        take_from_accept_queue(&mut unstamped, Duration::from_millis(500));
        assert_eq!(unstamped.depth, 2);
        take_from_accept_queue(&mut unstamped, Duration::from_secs(2));
        assert_eq!(unstamped.depth, 1);
    }
}
