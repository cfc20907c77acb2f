//! The agent's own connections to services, so that no queue counts them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A closed connection may still be open at the other end for this time.
const CLOSED_FOR: Duration = Duration::from_secs(5);

/// The agent's own connections to services.
#[derive(Default)]
pub struct Own {
    connections: Mutex<BTreeMap<u64, Listed>>,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// The agent's end, and the service's.
    Tcp(SocketAddr, SocketAddr),
    /// Inode of the agent's end.
    Unix(u64),
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

    pub fn add_unix(self: &Arc<Self>, inode: u64) -> OwnConnection {
        self.add(Ends::Unix(inode))
    }

    fn add(self: &Arc<Self>, ends: Ends) -> OwnConnection {
        let mut connections = lock(&self.connections);
        let id = connections.last_key_value().map_or(0, |(id, _)| id + 1);
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

    /// All connections that are open, or were a moment ago.
    pub fn all(&self) -> Vec<Listed> {
        let mut connections = lock(&self.connections);
        connections.retain(|_, listed| {
            listed
                .closed
                .is_none_or(|closed| closed.elapsed() < CLOSED_FOR)
        });
        connections.values().copied().collect()
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
