//! The protocols in which services are asked. Each module bounds the size of an answer; `asker` bounds its time.

pub mod http;
pub mod line;
pub mod owner;
pub mod postgres;
pub mod redis;
pub mod resp;
mod scram;

use std::{
    error, fmt, io,
    net::SocketAddr,
    os::fd::AsFd,
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll},
};

use anyhow::{Context as _, Result, ensure};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    sync::Semaphore,
};

use super::own::{Held, Own, OwnConnection};
use crate::text::harmless;

/// Largest answer, bytes.
pub const MAX_ANSWER_BYTES: usize = 1 << 20;
/// What may be read from a connection by HTTP, bytes: a few answers, with their heads and whatever surrounds the chunks.
const MAX_HTTP_BYTES: usize = 8 << 20;
/// Bytes that are read at once.
const CHUNK_BYTES: usize = 16 << 10;

/// A listener of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Tcp {
        address: SocketAddr,
        /// The kernel's cookie of that socket. If another process takes the port over, its listener has another one.
        cookie: u64,
        /// Its process, as the agent's /proc numbers it.
        pid: u32,
    },
    Unix {
        /// As its process sees it.
        path: String,
        inode: u64,
        pid: u32,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { address, .. } => write!(f, "{address}"),
            Self::Unix { path, .. } => f.write_str(&harmless(path)),
        }
    }
}

impl Endpoint {
    /// Where to connect: the address of the listener, or loopback if it listens on all.
    fn address(address: SocketAddr) -> SocketAddr {
        let ip = match address.ip().to_canonical() {
            ip if !ip.is_unspecified() => ip,
            std::net::IpAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            std::net::IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        };
        SocketAddr::new(ip, address.port())
    }

    /// Checks whose listener it is, and connects; nothing is sent before it is known that the connection is to that listener. The
    /// connection is listed as the agent's own while it exists. `user`: the only one besides root whose listener
    /// may receive a password.
    pub async fn connect(&self, from: &Origin, user: Option<u32>) -> Result<Connection> {
        let own = &from.own;
        let (stream, listed, holder) = match self {
            Self::Tcp { address, pid, .. } => {
                let address = Self::address(*address);
                let listeners = owner::listeners_at(address)?;
                ensure!(!listeners.is_empty(), "nothing listens at {address}");
                let holder = owner::holder(*pid, &listeners)?;
                let stream = TcpStream::connect(address).await;
                let stream = stream.with_context(|| format!("cannot connect to {address}"))?;
                let listed = own.add_tcp(stream.local_addr()?, stream.peer_addr()?);
                // Only then is the connection to one of these.
                ensure!(
                    listeners == owner::listeners_at(address)?,
                    "another process is taking over {address}"
                );
                stream.set_nodelay(true)?;
                (Stream::Tcp(stream), listed, holder)
            }
            Self::Unix { path, pid, inode } => {
                // The path may lead through a file system of the service's own, which may never answer: not on this thread.
                let (pid, path) = (*pid, path.clone());
                let connect = move || owner::connect_unix(pid, &path);
                let stream = from.run_blocking(connect).await;
                let stream = stream.with_context(|| format!("cannot connect to {self}"))?;
                let stream = UnixStream::from_std(stream)?;
                let listed = own.add_unix(rustix::fs::fstat(stream.as_fd())?.st_ino, *inode);
                let holder = stream.peer_cred()?;
                // In another pid namespace the number is 0.
                let process = holder.pid().map(i32::unsigned_abs).filter(|pid| *pid > 0);
                owner::check_unix(process, holder.uid(), pid)?;
                (Stream::Unix(stream), listed, holder.uid())
            }
        };
        ensure!(
            holder == 0 || user.is_none_or(|user| user == holder),
            "its listener belongs to user {holder}, who must not receive the password"
        );
        Ok(Connection::new(stream, listed, own.hold()))
    }
}

/// What the connections to one process share.
#[derive(Clone)]
pub struct Origin {
    pub own: Arc<Own>,
    /// Its one permit belongs to the thread that waits for a file system of the process.
    blocking: Arc<Semaphore>,
}

impl Origin {
    pub fn new(own: &Arc<Own>) -> Self {
        Self {
            own: Arc::clone(own),
            blocking: Arc::new(Semaphore::new(1)),
        }
    }

    /// Runs what waits for a file system on another thread: one for each process at most. The thread stays blocked even if nobody
    /// waits for its result any more.
    pub async fn run_blocking<T: Send + 'static>(
        &self,
        run: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = Arc::clone(&self.blocking).try_acquire_owned();
        let permit = permit.context("an earlier attempt still waits for its file system")?;
        let run = move || {
            let result = run();
            drop(permit);
            result
        };
        tokio::task::spawn_blocking(run).await?
    }
}

/// A password, and the only user besides root whose listeners get it.
pub struct Password {
    pub only: u32,
    pub text: String,
}

/// The service wants a password that the agent does not have, or has refused it. To try again soon is useless.
#[derive(Debug)]
pub struct LoginRefused(pub String);

impl fmt::Display for LoginRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl error::Error for LoginRefused {}

/// The answer exceeds [`MAX_ANSWER_BYTES`].
#[derive(Debug)]
pub struct TooLarge;

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the answer is larger than {MAX_ANSWER_BYTES} bytes")
    }
}

impl error::Error for TooLarge {}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A connection to a service.
pub struct Connection {
    stream: Stream,
    /// Read and not yet used.
    buffer: Vec<u8>,
    listed: OwnConnection,
    /// Memory of the answer.
    held: Arc<Held>,
    is_accepted: bool,
    /// Bytes that may still be read, if that is limited here.
    allowance: Option<usize>,
}

impl Connection {
    fn new(stream: Stream, listed: OwnConnection, held: Held) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            listed,
            held: Arc::new(held),
            is_accepted: false,
            allowance: None,
        }
    }

    /// Whether the other end has neither closed it nor sent anything unasked.
    pub fn is_idle(&self) -> bool {
        let mut byte = [0];
        let read = match &self.stream {
            Stream::Tcp(stream) => stream.try_read(&mut byte),
            Stream::Unix(stream) => stream.try_read(&mut byte),
        };
        let would_wait = |error: io::Error| error.kind() == io::ErrorKind::WouldBlock;
        self.buffer.is_empty() && read.is_err_and(would_wait)
    }

    /// Reads until `parse` finds a whole message at the beginning of what was read; it returns the message and its length.
    /// `budget`: bytes that may still be read.
    async fn message<T>(
        &mut self,
        budget: &mut usize,
        mut parse: impl FnMut(&[u8]) -> Result<Option<(T, usize)>>,
    ) -> Result<T> {
        loop {
            if let Some((message, len)) = parse(&self.buffer)? {
                self.buffer.drain(..len);
                return Ok(message);
            }
            ensure!(
                self.read_more(budget).await?,
                "the connection was closed within the answer"
            );
        }
    }

    /// Reads until the end of the connection.
    async fn rest(&mut self) -> Result<Vec<u8>> {
        let mut budget = MAX_ANSWER_BYTES;
        while self.read_more(&mut budget).await? {}
        Ok(std::mem::take(&mut self.buffer))
    }

    /// Whether there is more.
    async fn read_more(&mut self, budget: &mut usize) -> Result<bool> {
        let mut chunk = [0; CHUNK_BYTES];
        let read = self.read(&mut chunk).await?;
        if read > *budget {
            return Err(TooLarge.into());
        }
        *budget -= read;
        self.buffer.extend_from_slice(&chunk[..read]);
        Ok(read > 0)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let read = match &mut this.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        };
        let len = buffer.filled().len() - before;
        if !this.is_accepted && len > 0 {
            this.is_accepted = true;
            this.listed.set_accepted();
        }
        if let Some(allowance) = &mut this.allowance {
            match allowance.checked_sub(len) {
                Some(rest) => *allowance = rest,
                None => return Poll::Ready(Err(io::Error::other(TooLarge))),
            }
        }
        if let Err(error) = this.held.add(len) {
            return Poll::Ready(Err(error));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// The text of an answer, which must be UTF-8.
fn text(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).context("the answer is not UTF-8")
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_process_blocks_one_thread_at_most() {
        let own = Arc::<Own>::default();
        let (origin, other) = (Origin::new(&own), Origin::new(&own));
        let (unblock, blocked) = mpsc::channel::<()>();
        let wait = origin.run_blocking(move || Ok(blocked.recv()?));
        let given_up = tokio::time::timeout(Duration::from_millis(20), wait).await;
        assert!(given_up.is_err());
        let error = origin.run_blocking(|| Ok(())).await.unwrap_err();
        assert!(error.to_string().contains("earlier attempt"), "{error}");
        other.run_blocking(|| Ok(())).await.unwrap();
        unblock.send(()).unwrap();
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while origin.run_blocking(|| Ok(())).await.is_err() {
            assert!(std::time::Instant::now() < until);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
