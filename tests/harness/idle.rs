//! Many idle TCP connections in one process.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context as _, Result, bail};
use rustix::{
    net::sockopt::set_socket_linger,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

/// Maximum connections per listener, below the number of ephemeral ports.
const PER_LISTENER: usize = 10_000;

/// Closed on drop.
pub struct Idle {
    streams: Vec<TcpStream>,
    /// Kept open, as a real service would.
    listeners: Vec<TcpListener>,
}

impl Idle {
    /// Opens `count` connections to `to`; the other ends belong to its listener.
    pub fn open(to: SocketAddr, count: usize) -> Result<Self> {
        raise_file_limit(count + 100)?;
        let mut idle = Self {
            streams: Vec::with_capacity(count),
            listeners: Vec::new(),
        };
        for _ in 0..count {
            let stream = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
            idle.keep(stream)?;
        }
        Ok(idle)
    }

    /// Opens `count` sockets in this process: both ends of `count / 2` connections over loopback.
    pub fn pairs(count: usize) -> Result<Self> {
        raise_file_limit(count + 100)?;
        let mut idle = Self {
            streams: Vec::with_capacity(count),
            listeners: Vec::new(),
        };
        while idle.streams.len() + 1 < count {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
                .context("listen for idle connections")?;
            let to = listener
                .local_addr()
                .context("read the address of a listener")?;
            for _ in 0..PER_LISTENER.min((count - idle.streams.len()) / 2) {
                idle.keep(TcpStream::connect(to).with_context(|| format!("connect to {to}"))?)?;
                idle.keep(
                    listener
                        .accept()
                        .with_context(|| format!("accept on {to}"))?
                        .0,
                )?;
            }
            idle.listeners.push(listener);
        }
        Ok(idle)
    }

    pub fn count(&self) -> usize {
        self.streams.len()
    }

    fn keep(&mut self, stream: TcpStream) -> Result<()> {
        // Closed with a reset: thousands of ports in TIME_WAIT would disturb later tests.
        set_socket_linger(&stream, Some(std::time::Duration::ZERO)).context("set SO_LINGER")?;
        self.streams.push(stream);
        Ok(())
    }
}

/// Hard limit of open files of this process; `None` if unlimited.
pub fn max_open_files() -> Option<u64> {
    getrlimit(Resource::Nofile).maximum
}

/// Raises the soft limit of open files, and the hard limit where permitted.
pub fn raise_file_limit(wanted: usize) -> Result<()> {
    let wanted = wanted as u64;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let maximum = limit.maximum.map(|maximum| maximum.max(wanted));
    let raised = Rlimit {
        current: Some(wanted),
        maximum,
    };
    if setrlimit(Resource::Nofile, raised).is_err() {
        bail!(
            "{wanted} open files needed, RLIMIT_NOFILE allows {}: raise it with `ulimit -Hn {wanted}`",
            limit.maximum.unwrap_or(u64::MAX)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_count_both_ends() {
        assert_eq!(Idle::pairs(21).unwrap().count(), 20);
    }
}
