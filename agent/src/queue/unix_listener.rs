//! Accept queues of unix listeners, which are of kind `accept` like the TCP ones.
//!
//! While more connections wait than the backlog allows, `connect` blocks, or fails with EAGAIN; none is refused or
//! dropped. The kernel counts neither arrivals nor accepts, and provides no ages.

use crate::hash::HashMap;
use std::{collections::BTreeMap, sync::Arc};

use super::{Kind, QueueId, Reading, Sink, Targets, head::Head};
use crate::{
    sample::{Sample, TargetId, UnixSocket},
    text,
};

/// Longest path in a name, bytes: a path has up to 108 bytes (UNIX_PATH_MAX), and up to several times that when escaped.
const MAX_NAME_BYTES: usize = 512;

#[derive(Default)]
pub(super) struct UnixListeners {
    known: HashMap<u64, Known>,
}

/// State kept per listening socket.
struct Known {
    target: TargetId,
    queued: u32,
    head: Head,
    seen_ns: u64,
}

/// All listening sockets of one target on one path. The path may be bound again while the first socket is still open.
#[derive(Default)]
struct Group {
    sockets: u32,
    depth: u64,
    limit: u64,
    fill: f64,
    full: bool,
    oldest_age_ns: Option<u64>,
    elapsed_ns: Option<u64>,
}

/// A socket path as it appears in names. Any process may choose one, so control characters are escaped. A path relative
/// to the process's working directory gets a `./`, so that it never looks like an address; one that begins with `@` has it
/// already.
pub(super) fn spelled(path: &str) -> Arc<str> {
    let path = text::bounded(path, MAX_NAME_BYTES);
    if path.starts_with(['/', '@']) || path.starts_with("./@") {
        path.into()
    } else {
        format!("./{path}").into()
    }
}

impl UnixListeners {
    /// Reads the listeners of a file scan.
    pub(super) fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        let mut groups: BTreeMap<(TargetId, QueueId), Group> = BTreeMap::new();
        let mut known = HashMap::default();
        for socket in sample.unix.iter().filter(|socket| socket.listening) {
            let before = self.known.get(&socket.inode);
            let Some(target) = targets
                .of(socket.tgid)
                .or(before.map(|before| before.target))
            else {
                continue;
            };
            if targets.get(target).is_none() {
                continue;
            }
            let id = match &socket.path {
                Some(path) => QueueId::UnixListener(spelled(path)),
                None => QueueId::UnnamedUnixListener(socket.inode),
            };
            let group = groups.entry((target, id)).or_default();
            let now = group.add(socket, target, before, sample.mono_ns);
            known.insert(socket.inode, now);
        }
        self.known = known;
        for ((target, id), group) in &groups {
            let reading = group.reading(targets.threads(*target));
            sink.put(*target, Kind::Accept, id, reading);
        }
        sink.forget_unseen_where(Kind::Accept, |id| {
            matches!(
                id,
                QueueId::UnixListener(_) | QueueId::UnnamedUnixListener(_)
            )
        });
    }
}

impl Group {
    fn add(
        &mut self,
        socket: &UnixSocket,
        target: TargetId,
        before: Option<&Known>,
        now_ns: u64,
    ) -> Known {
        self.sockets += 1;
        self.depth += u64::from(socket.queued);
        self.limit += u64::from(socket.limit);
        let fill = f64::from(socket.queued) / f64::from(socket.limit.max(1));
        self.fill = self.fill.max(fill);
        // unix_recvq_full: one more than the backlog may wait.
        self.full |= socket.queued > socket.limit;
        let elapsed_ns = before.map(|before| now_ns.saturating_sub(before.seen_ns));
        self.elapsed_ns = self.elapsed_ns.max(elapsed_ns);
        let mut head = before.map_or_else(Head::default, |before| before.head);
        if before.is_some_and(|before| socket.queued < before.queued) {
            head.moved();
        }
        let age_ns = head
            .observe(socket.head, socket.queued > 0, now_ns)
            .filter(|_| socket.head != 0);
        self.oldest_age_ns = self.oldest_age_ns.max(age_ns);
        Known {
            target,
            queued: socket.queued,
            head,
            seen_ns: now_ns,
        }
    }

    fn reading(&self, servers: u32) -> Reading {
        Reading {
            depth: self.depth,
            limit: Some(self.limit),
            fill: Some(self.fill),
            full: self.full,
            elapsed_ns: self.elapsed_ns,
            servers,
            wait_ns: (self.depth == 0).then_some(0),
            oldest_age_ns: self.oldest_age_ns,
            extra: vec![("sockets", f64::from(self.sockets))],
            ..Reading::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Kind,
        watched::{PID, TICK, Watched},
    };
    use super::spelled;
    use crate::sample::{Listener, Sample, Scans, UnixSocket, UnixStyle};

    fn listener(queued: u32, head: u64) -> UnixSocket {
        UnixSocket {
            inode: 1,
            peer: None,
            tgid: PID,
            fd: 3,
            netns: 1,
            style: UnixStyle::Stream,
            listening: true,
            path: Some("/run/app.sock".to_owned()),
            peer_path: None,
            queued,
            limit: 4,
            head,
            unread_by_peer: 0,
            sndbuf: 0,
            unread: 0,
            peer_sndbuf: 0,
        }
    }

    fn sample(socket: UnixSocket) -> Sample {
        Sample {
            unix: vec![socket],
            ..Sample::default()
        }
    }

    fn tcp() -> Listener {
        Listener {
            cookie: 1,
            tgid: PID,
            netns: 1,
            address: ([0, 0, 0, 0], 80).into(),
            depth: 0,
            limit: 8,
            drops: 0,
            half_open: None,
            seen_ns: 0,
            ages_ns: Vec::new(),
        }
    }

    #[test]
    fn connections_waiting_on_a_path_are_an_accept_queue() {
        let mut watched = Watched::default();
        let mut read =
            |queued, head| watched.scan_one(Kind::Accept, sample(listener(queued, head)));
        let idle = read(0, 0);
        assert_eq!((idle.depth, idle.limit), (0, Some(4)));
        assert_eq!((idle.wait_ns, idle.oldest_age_ns), (Some(0), None));
        assert_eq!(read(2, 7).oldest_age_ns, Some(0));
        assert_eq!(read(3, 7).oldest_age_ns, Some(TICK));
        assert_eq!(read(3, 8).oldest_age_ns, Some(0));
        assert_eq!(read(2, 8).oldest_age_ns, Some(0));
    }

    #[test]
    fn one_more_than_the_backlog_may_wait_before_connect_blocks() {
        let full = |queued| {
            let queue = sample(listener(queued, 7));
            Watched::default().scan_one(Kind::Accept, queue).full
        };
        assert!(!full(4));
        assert!(full(5));
    }

    #[test]
    fn a_scan_that_covers_no_unix_socket_does_not_end_its_queue() {
        let mut watched = Watched::default();
        let both = Sample {
            listeners: vec![tcp()],
            ..sample(listener(1, 7))
        };
        assert_eq!(watched.scan(Kind::Accept, both).len(), 2);
        let marked = Sample {
            scans: Scans {
                focused_sockets: true,
                ..Scans::default()
            },
            listeners: vec![tcp()],
            ..Sample::default()
        };
        assert_eq!(watched.read(Kind::Accept, marked).len(), 1);
        assert_eq!(watched.gone(), Vec::<String>::new());
        let files = Sample {
            listeners: vec![tcp()],
            ..Sample::default()
        };
        watched.scan(Kind::Accept, files);
        assert_eq!(watched.gone(), ["/run/app.sock"]);
    }

    #[test]
    fn a_path_never_looks_like_an_address() {
        for path in ["/run/a", "@a", "127.0.0.1:80", "[::1]:80", "unnamed", ""] {
            assert!(spelled(path).starts_with(['/', '@', '.']), "{path}");
        }
        assert_eq!(&*spelled("@a\u{1b}[2J"), "@a\\u{1b}[2J");
    }
}
