//! A listener on TCP or on a unix socket, and its connections.

use std::{io, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::adapter_stats::AdapterStats;
use crate::{config::signal::Listen, signal::stream};

pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Where an adapter listens. What cannot be bound is tried again; the others are served meanwhile.
pub struct Door {
    at: Listen,
    bound: Option<Listener>,
    tally: Arc<AdapterStats>,
}

impl Door {
    /// Binds at once: privileges may be needed that are given up later.
    pub fn at(at: Listen, tally: Arc<AdapterStats>) -> Self {
        let bound = try_bind(&at, &tally);
        Self { at, bound, tally }
    }

    /// Where what is said there is counted.
    pub fn tally(&self) -> Arc<AdapterStats> {
        Arc::clone(&self.tally)
    }

    /// When it is bound.
    pub async fn opened(self) -> (Listener, Arc<AdapterStats>) {
        let Self {
            at,
            mut bound,
            tally,
        } = self;
        loop {
            if let Some(listener) = bound {
                return (listener, tally);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            bound = try_bind(&at, &tally);
        }
    }
}

fn try_bind(at: &Listen, tally: &AdapterStats) -> Option<Listener> {
    Listener::bind(at)
        .map_err(|error| tally.failed(&format!("{error:#}")))
        .ok()
}

/// A connection of either.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    /// Binds; what is in the way is named.
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

    /// The next connection for which there is room, with its place; the others are counted and closed.
    pub async fn accept_within(
        &self,
        room: &Arc<Semaphore>,
        tally: &AdapterStats,
    ) -> (Box<dyn Stream>, OwnedSemaphorePermit) {
        loop {
            let stream = self.accept().await;
            match Arc::clone(room).try_acquire_owned() {
                Ok(place) => return (stream, place),
                Err(_) => tally.refused(),
            }
        }
    }

    /// The next connection. That there is no descriptor left for it passes: those that there are will end.
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
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
}
