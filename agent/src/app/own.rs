//! The agent's own connections to services, so that no queue counts them.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// A closed connection may still be open at the other end for this time.
const CLOSED_FOR: Duration = Duration::from_secs(5);
/// A connection that the service has not answered may wait in its accept queue for this time after it is closed.
const UNACCEPTED_FOR: Duration = Duration::from_hours(1);
/// Maximum number of connections that are listed. Beyond it, those that were closed first are forgotten.
const MAX_LISTED: usize = 2_048;
/// Memory that the answers under way may take, of all services together, bytes.
const MAX_HELD_BYTES: usize = 8 << 20;
/// What an answer may take in any case, so that a few large ones do not keep the others out, bytes.
const SMALL_BYTES: usize = 64 << 10;

/// The agent's own connections to services.
#[derive(Default)]
pub struct Own {
    connections: Mutex<BTreeMap<u64, Listed>>,
    /// Memory of the answers under way, bytes.
    held: AtomicUsize,
}

/// One of them.
#[derive(Clone, Copy, Debug)]
pub struct Listed {
    pub ends: Ends,
    pub opened: Instant,
    /// The service has answered, so it has accepted the connection.
    pub is_accepted: bool,
    closed: Option<Instant>,
}

impl Listed {
    /// It is open, or was a moment ago.
    pub fn is_recent(&self) -> bool {
        self.closed
            .is_none_or(|closed| closed.elapsed() < CLOSED_FOR)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// The agent's end, and the service's.
    Tcp(SocketAddr, SocketAddr),
    /// Inodes of the agent's end, and of the listener.
    Unix(u64, u64),
}

/// The memory that the answer of one connection takes.
pub struct Held {
    own: Arc<Own>,
    bytes: AtomicUsize,
}

impl Held {
    /// Counts more memory. Fails if the answers take too much; a small one always has room.
    pub fn add(&self, bytes: usize) -> io::Result<()> {
        let of_this = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let of_all = self.own.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        match of_this > SMALL_BYTES && of_all > MAX_HELD_BYTES {
            true => Err(io::Error::other("too many large answers at once")),
            false => Ok(()),
        }
    }

    /// Releases the memory: the answer is no longer kept.
    pub fn release(&self) {
        let bytes = self.bytes.swap(0, Ordering::Relaxed);
        self.own.held.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.release();
    }
}

/// Removes the connection from the list, a while after it is closed.
pub struct OwnConnection {
    own: Arc<Own>,
    id: u64,
}

impl Drop for OwnConnection {
    fn drop(&mut self) {
        if let Some(listed) = lock(&self.own.connections).get_mut(&self.id) {
            listed.closed = Some(Instant::now());
        }
    }
}

impl OwnConnection {
    /// The service has answered.
    pub fn set_accepted(&self) {
        if let Some(listed) = lock(&self.own.connections).get_mut(&self.id) {
            listed.is_accepted = true;
        }
    }
}

impl Own {
    pub fn add_tcp(self: &Arc<Self>, own: SocketAddr, service: SocketAddr) -> OwnConnection {
        self.add(Ends::Tcp(own, service))
    }

    pub fn add_unix(self: &Arc<Self>, inode: u64, listener: u64) -> OwnConnection {
        self.add(Ends::Unix(inode, listener))
    }

    /// Counts the memory of the answer on a new connection.
    pub fn hold(self: &Arc<Self>) -> Held {
        Held {
            own: Arc::clone(self),
            bytes: AtomicUsize::new(0),
        }
    }

    fn add(self: &Arc<Self>, ends: Ends) -> OwnConnection {
        let mut connections = lock(&self.connections);
        let id = connections.last_key_value().map_or(0, |(id, _)| id + 1);
        while connections.len() >= MAX_LISTED {
            let closed = connections
                .iter()
                .filter_map(|(id, listed)| Some((listed.closed?, *id)));
            let Some((_, first)) = closed.min() else {
                break;
            };
            connections.remove(&first);
        }
        let listed = Listed {
            ends,
            opened: Instant::now(),
            is_accepted: false,
            closed: None,
        };
        connections.insert(id, listed);
        OwnConnection {
            own: Arc::clone(self),
            id,
        }
    }

    /// All connections that are open, were a moment ago, or may wait in an accept queue.
    pub fn all(&self) -> Vec<Listed> {
        let mut connections = lock(&self.connections);
        connections.retain(|_, listed| {
            let limit = match listed.is_accepted {
                true => CLOSED_FOR,
                false => UNACCEPTED_FOR,
            };
            listed.closed.is_none_or(|closed| closed.elapsed() < limit)
        });
        connections.values().copied().collect()
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    const SERVICE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 80);

    #[test]
    fn a_closed_connection_that_was_not_answered_stays_listed_for_an_hour() {
        let own = Arc::<Own>::default();
        let (answered, waiting) = (own.add_tcp(SERVICE, SERVICE), own.add_unix(4, 5));
        answered.set_accepted();
        drop((answered, waiting));
        let closed_before = |time: Duration| {
            for listed in lock(&own.connections).values_mut() {
                listed.closed = Instant::now().checked_sub(time);
                assert!(listed.closed.is_some(), "the clock began too late");
            }
            own.all()
        };
        assert_eq!(own.all().len(), 2);
        let left = closed_before(Duration::from_secs(6));
        assert_eq!((left.len(), left[0].ends), (1, Ends::Unix(4, 5)));
        assert!(!left[0].is_recent());
    }

    #[test]
    fn the_connections_that_were_closed_first_are_forgotten_beyond_the_limit() {
        let own = Arc::<Own>::default();
        let open = own.add_unix(0, 1);
        for inode in 1..=MAX_LISTED as u64 {
            drop(own.add_unix(inode, 1));
        }
        let inodes: Vec<Ends> = own.all().iter().map(|listed| listed.ends).collect();
        assert_eq!(inodes.len(), MAX_LISTED);
        assert_eq!((inodes[0], inodes[1]), (Ends::Unix(0, 1), Ends::Unix(2, 1)));
        drop(open);
    }

    #[test]
    fn all_answers_share_one_budget_of_memory_and_small_ones_have_room() {
        let own = Arc::<Own>::default();
        let large: Vec<Held> = (0..8).map(|_| own.hold()).collect();
        for held in &large {
            held.add(1 << 20).unwrap();
        }
        let further = own.hold();
        further.add(SMALL_BYTES).unwrap();
        assert!(further.add(1).is_err());
        large[0].release();
        further.add(1).unwrap();
        drop((large, further));
        assert_eq!(own.held.load(Ordering::Relaxed), 0);
    }
}
