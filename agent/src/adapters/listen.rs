//! Listening on TCP or unix sockets.

use std::{io, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore},
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
    Listener::bind(at)
        .map_err(|error| stats.failed(&format!("{error:#}")))
        .ok()
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

    /// The next connection for which there is a slot. Connections beyond the slots are counted and closed.
    pub async fn accept_within(
        &self,
        slots: &Arc<Semaphore>,
        stats: &AdapterStats,
    ) -> (Box<dyn Stream>, OwnedSemaphorePermit) {
        loop {
            let stream = self.accept().await;
            match Arc::clone(slots).try_acquire_owned() {
                Ok(slot) => return (stream, slot),
                Err(_) => stats.rejected(),
            }
        }
    }

    /// The next connection. Errors such as EMFILE are retried: they pass as other connections close.
    pub async fn accept(&self) -> Box<dyn Stream> {
        loop {
            let accepted: io::Result<Box<dyn Stream>> = match self {
                Self::Tcp(listener) => listener
                    .accept()
                    .await
                    .map(|(stream, _)| Box::new(stream) as _),
                Self::Unix(listener) => listener
                    .accept()
                    .await
                    .map(|(stream, _)| Box::new(stream) as _),
            };
            match accepted {
                Ok(stream) => return stream,
                Err(_) => tokio::time::sleep(ACCEPT_RETRY_INTERVAL).await,
            }
        }
    }
}
