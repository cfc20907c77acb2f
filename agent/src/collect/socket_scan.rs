//! The scan over the open files of the targets: sockets, pipes, io_uring and epoll instances.

use std::collections::BTreeMap;

use anyhow::Result;

use super::{ObjectIds, convert};
use crate::{
    in_order::InOrder,
    kernel::scanner::{Record, Scanner},
    sample::{DatagramSocket, Files, Listener, Ring, Sample, UnixSocket},
};

/// Room for connections that are new since the previous scan, so that the vector need not grow by doubling.
const SPARE_CONNECTIONS: usize = 64;

pub(super) struct SocketScan {
    ids: ObjectIds,
    jiffy_ns: u64,
    /// The number of the scan that last found each socket, by the kernel's cookie.
    seen: InOrder<u64>,
    /// Number of the current scan.
    scan: u64,
    /// Number of connections in the previous scan over all files.
    connections: usize,
}

/// Objects that several processes may hold, once each.
#[derive(Default)]
struct Shared {
    listeners: BTreeMap<u64, Listener>,
    datagrams: BTreeMap<u64, DatagramSocket>,
    unix: BTreeMap<u64, UnixSocket>,
    rings: BTreeMap<u64, Ring>,
}

impl SocketScan {
    /// `jiffy_ns`: the kernel's timer tick.
    pub(super) fn new(ids: ObjectIds, jiffy_ns: u64) -> Self {
        Self {
            ids,
            jiffy_ns,
            seen: InOrder::default(),
            scan: 0,
            connections: 0,
        }
    }

    /// Scans all open files of all targets; returns the number of records read.
    pub(super) fn scan_files(&mut self, scanner: &mut Scanner, sample: &mut Sample) -> Result<u64> {
        sample
            .connections
            .reserve(self.connections + SPARE_CONNECTIONS);
        let mut shared = Shared::default();
        let mut records = 0;
        self.scan += 1;
        scanner.scan_files(&mut |record| {
            records += 1;
            self.add(record, sample, &mut shared);
        })?;
        let scan = self.scan;
        self.seen.retain(|seen| *seen == scan);
        self.connections = sample.connections.len();
        sample.scans.files = true;
        sample.listeners = shared.listeners.into_values().collect();
        sample.datagrams = shared.datagrams.into_values().collect();
        sample.unix = shared.unix.into_values().collect();
        sample.rings = shared.rings.into_values().collect();
        scanner.open_files(|tgid, open, limit| sample.files.push(Files { tgid, open, limit }));
        Ok(records)
    }

    /// Scans only the listeners, and the busy connections in the focus scope. Returns the number of records read.
    pub(super) fn scan_focused_sockets(
        &mut self,
        scanner: &mut Scanner,
        sample: &mut Sample,
    ) -> Result<u64> {
        let mut shared = Shared::default();
        let mut records = 0;
        self.scan += 1;
        sample.scans.focused_sockets = scanner.scan_focused_sockets(&mut |record| {
            records += 1;
            self.add(record, sample, &mut shared);
        })?;
        sample.listeners = shared.listeners.into_values().collect();
        Ok(records)
    }

    fn add(&mut self, record: Record<'_>, sample: &mut Sample, shared: &mut Shared) {
        let ids = self.ids;
        match record {
            // A socket that several processes hold is met once for each of them.
            Record::Socket(socket) if self.is_first(socket.cookie) => {
                let connection = convert::connection(socket, ids, self.jiffy_ns);
                sample.connections.push(connection);
            }
            Record::Listener(listener, stamps) => {
                let converted = convert::listener(listener, stamps, ids);
                shared.listeners.insert(listener.cookie, converted);
            }
            Record::Udp(socket) => {
                let converted = convert::datagrams(socket, ids);
                shared.datagrams.insert(socket.cookie, converted);
            }
            Record::Unix(socket) => {
                if let Some(socket) = convert::unix(socket, ids) {
                    shared.unix.insert(socket.inode, socket);
                }
            }
            Record::Pipe(pipe) => sample.pipes.push(convert::pipe(pipe)),
            Record::Epoll(epoll) => sample.epolls.push(convert::epoll(epoll)),
            Record::Ring(ring) => {
                shared.rings.insert(ring.id, convert::ring(ring, ids));
            }
            _ => {}
        }
    }

    /// Whether this scan meets the socket for the first time.
    fn is_first(&mut self, cookie: u64) -> bool {
        match self.seen.next(cookie) {
            Some(last) => std::mem::replace(last, self.scan) != self.scan,
            None => {
                self.seen.insert(cookie, self.scan);
                true
            }
        }
    }
}
