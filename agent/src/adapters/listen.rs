//! Listening on TCP or unix sockets, with a bounded number of connections.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Notify,
};

use super::adapter_stats::AdapterStats;
use crate::{config::signal::Listen, signal::stream};

/// How often an address that cannot be bound is tried again.
const BIND_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Pause after a failed accept(2).
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// A bound socket.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// The address of an adapter. Binding is retried until it succeeds; meanwhile the other adapters are served.
pub struct Endpoint {
    at: Listen,
    bound: Option<Listener>,
    stats: Arc<AdapterStats>,
}

impl Endpoint {
    /// Tries to bind immediately, while the process still has its privileges.
    pub fn bind(at: Listen, stats: Arc<AdapterStats>) -> Self {
        let bound = try_bind(&at, &stats);
        Self { at, bound, stats }
    }

    /// The statistics of the adapter.
    pub fn stats(&self) -> Arc<AdapterStats> {
        Arc::clone(&self.stats)
    }

    /// Waits until the address is bound.
    pub async fn listen(self) -> (Listener, Arc<AdapterStats>) {
        let Self {
            at,
            mut bound,
            stats,
        } = self;
        loop {
            if let Some(listener) = bound {
                return (listener, stats);
            }
            tokio::time::sleep(BIND_RETRY_INTERVAL).await;
            bound = try_bind(&at, &stats);
        }
    }
}

fn try_bind(at: &Listen, stats: &AdapterStats) -> Option<Listener> {
    match Listener::bind(at) {
        Ok(listener) => {
            stats.recovered();
            Some(listener)
        }
        Err(error) => {
            stats.failed(&format!("{error:#}"));
            None
        }
    }
}

/// A connection of either kind.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    /// Binds the address.
    pub fn bind(at: &Listen) -> Result<Self> {
        match at {
            Listen::Tcp(address) => {
                let listener = std::net::TcpListener::bind(address)
                    .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
                    .with_context(|| format!("cannot listen on {address}"))?;
                Ok(Self::Tcp(TcpListener::from_std(listener)?))
            }
            Listen::Unix(path) => Ok(Self::Unix(stream::bind(path, 0o666)?)),
        }
    }

    /// The next connection for which there is a slot. If none is free, an idle connection is closed to make room. If none is
    /// idle either, the new connection is closed. Both are counted.
    pub async fn accept_within(
        &self,
        slots: &Arc<Slots>,
        stats: &AdapterStats,
    ) -> (Box<dyn Stream>, Slot) {
        loop {
            let (stream, peer) = self.accept().await;
            match slots.take(peer) {
                Some((slot, has_closed)) => {
                    if has_closed {
                        stats.closed();
                    }
                    return (stream, slot);
                }
                None => stats.rejected(),
            }
        }
    }

    /// The next connection, and who opened it. Errors such as EMFILE are retried: they pass as other connections close.
    pub async fn accept(&self) -> (Box<dyn Stream>, Peer) {
        loop {
            let accepted: io::Result<(Box<dyn Stream>, Peer)> = match self {
                Self::Tcp(listener) => listener
                    .accept()
                    .await
                    .map(|(stream, from)| (Box::new(stream) as _, Peer::Address(from.ip()))),
                Self::Unix(listener) => listener.accept().await.map(|(stream, _)| {
                    let credentials = stream.peer_cred().ok();
                    let pid = credentials.and_then(|credentials| credentials.pid());
                    (Box::new(stream) as _, Peer::Process(pid))
                }),
            };
            match accepted {
                Ok(accepted) => return accepted,
                Err(_) => tokio::time::sleep(ACCEPT_RETRY_INTERVAL).await,
            }
        }
    }
}

/// Who opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    Address(IpAddr),
    /// The client of a unix socket; `None`: it is in another pid namespace.
    Process(Option<i32>),
}

/// The connections of one endpoint, at most `max`.
pub struct Slots {
    max: usize,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    last_id: u64,
    connections: BTreeMap<u64, Connection>,
    last_turn: u64,
}

struct Connection {
    peer: Peer,
    /// Orders idle connections by when they became idle. `None`: busy.
    idle: Option<u64>,
    close: Arc<Notify>,
}

/// The place of one connection, idle at first. It is free again when this is dropped.
pub struct Slot {
    id: u64,
    peer: Peer,
    slots: Arc<Slots>,
    close: Arc<Notify>,
}

impl Slots {
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max,
            held: Mutex::default(),
        })
    }

    /// A slot, and whether an idle connection is closed for it. `None` if all connections are busy.
    fn take(self: &Arc<Self>, peer: Peer) -> Option<(Slot, bool)> {
        let mut held = self.lock();
        let is_full = held.connections.len() >= self.max;
        if is_full {
            let victim = held.victim()?;
            if let Some(victim) = held.connections.remove(&victim) {
                victim.close.notify_one();
            }
        }
        held.last_id += 1;
        let (id, close) = (held.last_id, Arc::new(Notify::new()));
        let idle = Some(held.turn());
        let connection = Connection {
            peer,
            idle,
            close: Arc::clone(&close),
        };
        held.connections.insert(id, connection);
        let slots = Arc::clone(self);
        let slot = Slot {
            id,
            peer,
            slots,
            close,
        };
        Some((slot, is_full))
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn turn(&mut self) -> u64 {
        self.last_turn += 1;
        self.last_turn
    }

    /// The connection to close: of the peer with the most connections, so that one leaking client does not cost others
    /// theirs, the one that has been idle for longest.
    fn victim(&self) -> Option<u64> {
        let mut of_peer: HashMap<Peer, usize> = HashMap::new();
        for connection in self.connections.values() {
            *of_peer.entry(connection.peer).or_default() += 1;
        }
        let idle = self.connections.iter().filter_map(|(id, connection)| {
            let turn = connection.idle?;
            Some((of_peer[&connection.peer], std::cmp::Reverse(turn), *id))
        });
        idle.max().map(|(.., id)| id)
    }
}

impl Slot {
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Marks the connection as busy, which protects it, or as idle.
    pub fn set_busy(&self, is_busy: bool) {
        let mut held = self.slots.lock();
        let idle = (!is_busy).then(|| held.turn());
        if let Some(connection) = held.connections.get_mut(&self.id) {
            connection.idle = idle;
        }
    }

    /// Returns when the connection has to close to make room.
    pub async fn revoked(&self) {
        self.close.notified().await;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.lock().connections.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    /// Whether the connection has to close. Does not wait.
    async fn is_revoked(slot: &Slot) -> bool {
        tokio::time::timeout(Duration::ZERO, slot.revoked())
            .await
            .is_ok()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_leaking_peer_loses_its_oldest_idle_connection() {
        let slots = Slots::new(4);
        let peer = |last| Peer::Address(Ipv4Addr::new(127, 0, 0, last).into());
        let take = |last| slots.take(peer(last)).unwrap();
        let (quiet, leaked) = (take(1).0, [take(2).0, take(2).0, take(2).0]);
        // Its first one is busy, and its second one was used again.
        leaked[0].set_busy(true);
        leaked[1].set_busy(true);
        leaked[1].set_busy(false);
        let (new, has_closed) = take(3);
        assert!(has_closed && is_revoked(&leaked[2]).await);
        let _next = take(2);
        assert!(is_revoked(&leaked[1]).await);
        for slot in [&quiet, &leaked[0], &new] {
            assert!(!is_revoked(slot).await);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn busy_connections_are_kept_and_a_new_one_is_rejected() {
        let slots = Slots::new(2);
        let peer = Peer::Process(Some(7));
        let held = [0, 1].map(|_| slots.take(peer).unwrap().0);
        held.iter().for_each(|slot| slot.set_busy(true));
        assert!(slots.take(peer).is_none());
        drop(held);
        let (_slot, has_closed) = slots.take(peer).unwrap();
        assert!(!has_closed);
    }
}
