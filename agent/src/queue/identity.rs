//! What a queue is: the listener, endpoint, pipe, lock or thread that it belongs to.
//!
//! The identity is structured, so that no consumer parses a name. The name that users see is its [`Display`] text.
//!
//! **Invariant:** the text of an identity never changes. Page entry ids, episode ids and span ids are hashes of it.

use std::{
    cmp::Ordering,
    fmt::{self, Display, Formatter},
    hash::{Hash, Hasher},
    net::SocketAddr,
    sync::Arc,
};

use super::Kind;
use crate::sample::TargetId;

/// Identifies a queue while its target is watched.
#[derive(Clone, Debug)]
pub struct QueueKey {
    /// The service that the queue belongs to.
    pub target: TargetId,
    pub kind: Kind,
    /// Unique among the target's queues of this kind.
    pub id: QueueId,
    /// The text of `id`, rendered once.
    name: Box<str>,
}

impl QueueKey {
    pub fn new(target: TargetId, kind: Kind, id: QueueId) -> Self {
        let name = id.to_string().into_boxed_str();
        Self {
            target,
            kind,
            id,
            name,
        }
    }

    /// The text of [`QueueKey::id`]: `0.0.0.0:8080`, `-> 10.0.0.5:6379`, `pipe:[4711]`.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn identity(&self) -> (TargetId, Kind, &QueueId) {
        (self.target, self.kind, &self.id)
    }
}

impl PartialEq for QueueKey {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for QueueKey {}

impl PartialOrd for QueueKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// By target, then by kind in the order of the path that work takes, then by identity.
impl Ord for QueueKey {
    fn cmp(&self, other: &Self) -> Ordering {
        self.identity().cmp(&other.identity())
    }
}

impl Hash for QueueKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.identity().hash(state);
    }
}

/// The object that a queue belongs to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum QueueId {
    /// Connections, or datagram sockets, that the target opened to this address: `-> 10.0.0.5:6379`.
    Remote(SocketAddr),
    /// A TCP listener, or a bound UDP port: `0.0.0.0:8080`.
    Local(SocketAddr),
    /// Connections accepted on this local port, whichever address was listened on: `:8080`.
    Port(u16),
    /// A unix listener bound to this path: `/run/app.sock`, `@abstract`, `./relative`.
    UnixListener(Arc<str>),
    /// A unix listener without a path, by inode: `socket:[4711]`.
    UnnamedUnixListener(u64),
    /// Connected unix sockets, and unix datagram sockets.
    UnixSockets {
        end: UnixEnd,
        /// `true`: data that the target wrote and its peer has not read. `false`: data that the target has not read.
        sent: bool,
    },
    /// An unnamed pipe, by inode: `pipe:[4711]`.
    Pipe(u64),
    /// A named pipe. `inode` is set if another open FIFO of the target has the same path: `/run/log [4711]`.
    Fifo { path: Arc<str>, inode: Option<u64> },
    /// Threads whose names differ only in digits: `worker-#`.
    Pool(Arc<str>),
    /// One thread: `node/4711`.
    Thread { name: Arc<str>, tid: u32 },
    /// All threads of the target: `threads`.
    Threads,
    /// A futex, by its address in the memory of this process: `0x7f00 of 4711`.
    Lock { address: u64, tgid: u32 },
    /// A block device, `8:0`, or the file where the device is unknown.
    Device(Arc<str>),
    /// Disk waits whose device and file are both unknown: `disk`.
    AnyDisk,
    /// A control group, by path.
    Cgroup(Arc<str>),
    /// The machine as a whole: `machine`.
    Machine,
    /// The descriptor table of the target's process that is nearest to its limit: `open files`.
    OpenFiles,
    /// One of the two rings of an io_uring instance: `ring fd 9 sq`, `ring fd 9 of 4711 cq`.
    Ring {
        fd: u32,
        /// Set if the target had several processes when the ring was first seen.
        tgid: Option<u32>,
        half: RingHalf,
    },
    /// A queue inside the service, by preset and name: `redis: celery`.
    App { preset: Arc<str>, name: Arc<str> },
}

/// What the unix sockets of one queue have in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UnixEnd {
    /// Connected to this path: `-> /run/log`.
    Remote(Arc<str>),
    /// Accepted at this path, or bound to it: `/run/app.sock`.
    Local(Arc<str>),
    /// Neither end has a path, as with socketpair(2): `unnamed`, `unnamed datagrams`.
    Unnamed { datagrams: bool },
}

/// One of the two rings of an io_uring instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RingHalf {
    /// Submissions that the kernel has not consumed: `sq`.
    Submission,
    /// Completions that the process has not consumed: `cq`.
    Completion,
}

impl QueueId {
    /// The address that the target opened connections to.
    pub fn remote(&self) -> Option<SocketAddr> {
        match self {
            Self::Remote(address) => Some(*address),
            _ => None,
        }
    }
}

impl Display for QueueId {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Remote(address) => write!(out, "-> {address}"),
            Self::Local(address) => address.fmt(out),
            Self::Port(port) => write!(out, ":{port}"),
            Self::UnixListener(text)
            | Self::Pool(text)
            | Self::Device(text)
            | Self::Cgroup(text)
            | Self::Fifo {
                path: text,
                inode: None,
            } => out.write_str(text),
            Self::UnnamedUnixListener(inode) => write!(out, "socket:[{inode}]"),
            Self::UnixSockets { end, sent } => {
                let direction = if *sent { " sent" } else { "" };
                write!(out, "{end}{direction}")
            }
            Self::Pipe(inode) => write!(out, "pipe:[{inode}]"),
            Self::Fifo {
                path,
                inode: Some(inode),
            } => write!(out, "{path} [{inode}]"),
            Self::App { preset, name } => write!(out, "{preset}: {name}"),
            Self::Thread { name, tid } => write!(out, "{name}/{tid}"),
            Self::Threads => out.write_str("threads"),
            Self::Lock { address, tgid } => write!(out, "{address:#x} of {tgid}"),
            Self::AnyDisk => out.write_str("disk"),
            Self::Machine => out.write_str("machine"),
            Self::OpenFiles => out.write_str("open files"),
            Self::Ring { fd, tgid, half } => {
                write!(out, "ring fd {fd}")?;
                if let Some(tgid) = tgid {
                    write!(out, " of {tgid}")?;
                }
                write!(out, " {half}")
            }
        }
    }
}

impl Display for UnixEnd {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Remote(path) => write!(out, "-> {path}"),
            Self::Local(path) => out.write_str(path),
            Self::Unnamed { datagrams: false } => out.write_str("unnamed"),
            Self::Unnamed { datagrams: true } => out.write_str("unnamed datagrams"),
        }
    }
}

impl Display for RingHalf {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Submission => "sq",
            Self::Completion => "cq",
        })
    }
}

/// For tests that name a queue by its text: parsed as an address, port, pipe, lock or thread, else taken as a pool.
#[cfg(test)]
impl From<&str> for QueueId {
    fn from(text: &str) -> Self {
        let parse = || -> Option<Self> {
            if let Some(remote) = text.strip_prefix("-> ") {
                return Some(Self::Remote(remote.parse().ok()?));
            }
            if let Some(inode) = text.strip_prefix("pipe:[") {
                return Some(Self::Pipe(inode.strip_suffix(']')?.parse().ok()?));
            }
            if let Some((address, tgid)) = text
                .strip_prefix("0x")
                .and_then(|lock| lock.split_once(" of "))
            {
                let address = u64::from_str_radix(address, 16).ok()?;
                return Some(Self::Lock {
                    address,
                    tgid: tgid.parse().ok()?,
                });
            }
            if let Ok(local) = text.parse() {
                return Some(Self::Local(local));
            }
            if let Some(port) = text.strip_prefix(':') {
                return Some(Self::Port(port.parse().ok()?));
            }
            let (name, tid) = text.rsplit_once('/')?;
            Some(Self::Thread {
                name: name.into(),
                tid: tid.parse().ok()?,
            })
        };
        parse().unwrap_or_else(|| Self::Pool(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_hashes_of_the_text_of_an_identity() {
        let v4 = SocketAddr::from(([10, 0, 0, 5], 6379));
        let v6 = SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], 80));
        let path: Arc<str> = "/run/log".into();
        let sockets = |end, sent| QueueId::UnixSockets { end, sent };
        let fifo = |inode| QueueId::Fifo {
            path: Arc::clone(&path),
            inode,
        };
        let ring = |tgid, half| QueueId::Ring { fd: 9, tgid, half };
        let texts = [
            (QueueId::Remote(v4), "-> 10.0.0.5:6379"),
            (QueueId::Remote(v6), "-> [::1]:80"),
            (QueueId::Local(v4), "10.0.0.5:6379"),
            (QueueId::Port(8080), ":8080"),
            (QueueId::UnixListener(Arc::clone(&path)), "/run/log"),
            (QueueId::UnnamedUnixListener(7), "socket:[7]"),
            (
                sockets(UnixEnd::Local(Arc::clone(&path)), false),
                "/run/log",
            ),
            (
                sockets(UnixEnd::Remote(Arc::clone(&path)), true),
                "-> /run/log sent",
            ),
            (
                sockets(UnixEnd::Unnamed { datagrams: false }, false),
                "unnamed",
            ),
            (
                sockets(UnixEnd::Unnamed { datagrams: true }, true),
                "unnamed datagrams sent",
            ),
            (QueueId::Pipe(4711), "pipe:[4711]"),
            (fifo(None), "/run/log"),
            (fifo(Some(5)), "/run/log [5]"),
            (QueueId::Pool("worker-#".into()), "worker-#"),
            (
                QueueId::Thread {
                    name: "node".into(),
                    tid: 11,
                },
                "node/11",
            ),
            (QueueId::Threads, "threads"),
            (
                QueueId::Lock {
                    address: 0x7f00,
                    tgid: 11,
                },
                "0x7f00 of 11",
            ),
            (QueueId::Device("8:0".into()), "8:0"),
            (QueueId::AnyDisk, "disk"),
            (QueueId::Cgroup("/svc".into()), "/svc"),
            (QueueId::Machine, "machine"),
            (QueueId::OpenFiles, "open files"),
            (
                QueueId::App {
                    preset: "redis".into(),
                    name: "celery".into(),
                },
                "redis: celery",
            ),
            (ring(None, RingHalf::Submission), "ring fd 9 sq"),
            (ring(Some(12), RingHalf::Completion), "ring fd 9 of 12 cq"),
        ];
        for (id, text) in texts {
            assert_eq!(id.to_string(), text);
            assert_eq!(QueueKey::new(1, Kind::Pipe, id).name(), text);
        }
    }
}
