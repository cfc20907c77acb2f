//! Removes the agent's own connections from what was scanned, so that no queue counts them.

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
    time::Duration,
};

use super::{Apps, canonical, own_netns};
use crate::{
    app::own::{Ends, Listed},
    sample::{Listener, Sample, UnixSocket},
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
            self.accepted_unix.clear();
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
                Ends::Unix(inode, _) => Some(inode),
                Ends::Tcp(..) => None,
            })
            .collect();
        sample.unix.retain(|socket| {
            let own = socket.peer.filter(|peer| inodes.contains(peer));
            if let Some(own) = own {
                accepted_by.push((socket.tgid, (NOWHERE, NOWHERE)));
                self.accepted_unix.insert(own);
            }
            own.is_none()
        });
        self.accepted_unix.retain(|inode| inodes.contains(inode));
        take_from_unix_listeners(&own, &mut self.accepted_unix, &mut sample.unix);
        // They are open files of the service, too.
        for files in &mut sample.files {
            let count = accepted_by.iter().filter(|(tgid, _)| *tgid == files.tgid);
            files.open = files.open.saturating_sub(count.count() as u32);
        }
        for listed in own.iter().filter(|listed| !listed.is_accepted) {
            let Some(key) = tcp_ends(listed).filter(|key| !self.accepted.contains(key)) else {
                continue;
            };
            let at = |listener: &Listener| {
                let address = canonical(listener.address);
                Some(listener.netns) == netns
                    && address.port() == key.1.port()
                    && (address.ip() == key.1.ip() || address.ip().is_unspecified())
            };
            let (age, is_recent) = (listed.opened.elapsed(), listed.is_recent());
            take_from_one(&mut sample.listeners, at, age, is_recent);
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
        Ends::Unix(..) => None,
    }
}

/// Removes a connection from the accept queue of the one listener, of those at its address, that has it.
fn take_from_one(
    listeners: &mut [Listener],
    at: impl Fn(&Listener) -> bool,
    age: Duration,
    is_recent: bool,
) {
    for listener in listeners.iter_mut().filter(|listener| at(listener)) {
        if take_from_accept_queue(listener, age, is_recent) {
            return;
        }
    }
}

/// Removes the agent's own connections that are not accepted from the accept queues of unix listeners, as of the same scan.
fn take_from_unix_listeners(
    own: &[Listed],
    accepted: &mut HashSet<u64>,
    sockets: &mut [UnixSocket],
) {
    // The oldest first.
    let mut waiting: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for listed in own {
        if let Ends::Unix(inode, listener) = listed.ends
            && !listed.is_accepted
            && listed.opened.elapsed() >= UNACCEPTED_AFTER
            && !accepted.contains(&inode)
        {
            waiting.entry(listener).or_default().push(inode);
        }
    }
    // Several processes may hold one listener.
    for socket in sockets.iter_mut().filter(|socket| socket.listening) {
        let Some(waiting) = waiting.get(&socket.inode) else {
            continue;
        };
        // Connections are accepted in their order: if fewer wait, the oldest are not among them.
        let passed = waiting.len().saturating_sub(socket.queued as usize);
        accepted.extend(&waiting[..passed]);
        socket.queued -= (waiting.len() - passed) as u32;
    }
}

/// Removes a connection of this age from the readings of an accept queue, if it is still in there; returns whether it was.
/// `is_recent`: it is open, or has just been closed.
fn take_from_accept_queue(listener: &mut Listener, age: Duration, is_recent: bool) -> bool {
    let age_ns = age.as_nanos() as u64;
    let ages = listener.ages_ns.iter().enumerate();
    let nearest = ages.min_by_key(|(_, known)| known.abs_diff(age_ns));
    let nearest = nearest.map(|(at, known)| (at, known.abs_diff(age_ns)));
    match nearest {
        Some((at, difference_ns)) if difference_ns <= AGE_TOLERANCE_NS => {
            listener.ages_ns.remove(at);
            listener.depth = listener.depth.saturating_sub(1);
            true
        }
        // The kernel has not stamped it.
        _ if (listener.ages_ns.len() as u64) < u64::from(listener.depth)
            && is_recent
            && age >= UNACCEPTED_AFTER =>
        {
            listener.depth -= 1;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Instant};

    use super::*;
    use crate::{app::own::Own, sample::UnixStyle};

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
        take_from_accept_queue(&mut queue, Duration::from_millis(500), true);
        assert_eq!((queue.depth, queue.ages_ns.len()), (2, 2));
        // It was accepted meanwhile: the others stay.
        take_from_accept_queue(&mut queue, Duration::from_millis(500), true);
        assert_eq!((queue.depth, queue.ages_ns.len()), (2, 2));
        let mut unstamped = listener(2, &[]);
        // It was closed a while ago, and may have been accepted since.
        assert!(!take_from_accept_queue(
            &mut unstamped,
            Duration::from_secs(60),
            false
        ));
        take_from_accept_queue(&mut unstamped, Duration::from_millis(500), true);
        assert_eq!(unstamped.depth, 2);
        take_from_accept_queue(&mut unstamped, Duration::from_secs(2), true);
        assert_eq!(unstamped.depth, 1);
    }
    #[test]
    fn it_is_taken_out_of_the_accept_queue_of_any_listener_that_shares_the_port() {
        let mut listeners = [900, 500, 500].map(|ms| listener(1, &[ms]));
        take_from_one(&mut listeners, |_| true, Duration::from_millis(500), true);
        assert_eq!(listeners.map(|listener| listener.depth), [1, 0, 1]);
    }

    #[test]
    fn the_agents_own_connections_are_taken_out_of_the_accept_queues_of_unix_listeners() {
        let own = Arc::<Own>::default();
        let opened = [11, 12, 13].map(|inode| own.add_unix(inode, 7));
        let mut all = own.all();
        let began = Instant::now().checked_sub(Duration::from_secs(2)).unwrap();
        for listed in &mut all[..2] {
            listed.opened = began;
        }
        let queue = |inode, queued| UnixSocket {
            inode,
            listening: true,
            queued,
            ..unix_socket()
        };
        let mut accepted = HashSet::new();
        // The third one is too young: this scan may be older.
        let mut sockets = [queue(7, 3), queue(8, 3)];
        take_from_unix_listeners(&all, &mut accepted, &mut sockets);
        assert_eq!(sockets.map(|socket| socket.queued), [1, 3]);
        assert!(accepted.is_empty());
        // One was accepted, and closed: it is not taken out of what waits later.
        let mut sockets = [queue(7, 1)];
        take_from_unix_listeners(&all, &mut accepted, &mut sockets);
        assert_eq!((sockets[0].queued, &accepted), (0, &HashSet::from([11])));
        let mut sockets = [queue(7, 9)];
        take_from_unix_listeners(&all, &mut accepted, &mut sockets);
        assert_eq!(sockets[0].queued, 8);
        drop(opened);
    }

    fn unix_socket() -> UnixSocket {
        UnixSocket {
            inode: 0,
            peer: None,
            tgid: 7,
            fd: 3,
            netns: 1,
            style: UnixStyle::Stream,
            listening: false,
            path: None,
            peer_path: None,
            queued: 0,
            limit: 128,
            head: 0,
            unread_by_peer: 0,
            sndbuf: 0,
            unread: 0,
            peer_sndbuf: 0,
        }
    }
}
