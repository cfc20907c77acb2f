//! Converts the eBPF programs' records to sample types. Pure.
#![forbid(unsafe_code)]

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tailback_ebpf::{
    EPOLL_MORE, EpollRecord, HOLDER_SOCKET, HolderRecord, ListenerRecord, NO_SYSCALL,
    PIPE_BYTES_UNKNOWN, PIPE_READ_END, PIPE_WRITE_END, PeerRecord, PipeRecord, ProcessRecord,
    RingRecord, SocketRecord, ThreadRecord, UNIX_PATH, UNKNOWN, UdpRecord, UnixRecord, WAIT_IO,
    WAIT_ON_CPU, WAIT_WORD, WaitRecord,
};

use super::{accelerators::RunningThread, object_ids::ObjectIds, peers::PeerInfo};
use crate::{
    kernel::records::{Record, decode},
    sample::{
        Architecture, Connection, DatagramSocket, Detail, Epoll, Holder, Listener, Listening, Peer,
        Pipe, Ring, Sample, State, Syscall, Target, Thread, UnixSocket, UnixStyle, Wait,
    },
    target::{ListenerInfo, ProcessInfo},
    text::harmless,
};

const AF_INET: u8 = 2;

/// Converts a whole stream of records to one sample, as the scans do. For tests and fuzzing without a kernel.
///
/// # Errors
/// If a record is truncated or of an unknown kind.
pub fn sample_of_records(bytes: &[u8]) -> io::Result<Sample> {
    const JIFFY_NS: u64 = 4_000_000;
    let ids = ObjectIds::default();
    let mut sample = Sample::default();
    decode(bytes, &mut |record| match record {
        Record::Socket(socket) => {
            let connection = connection(socket, ids, JIFFY_NS);
            sample.connections.push(connection);
        }
        Record::Listener(record, timestamps) => {
            sample.listeners.push(listener(record, timestamps, ids));
            let info = listener_info(record, ids);
            sample.listening.get_or_insert_default().push(Listening {
                netns: info.netns,
                address: info.address,
                tgid: info.tgid,
                name: String::new(),
            });
        }
        Record::Udp(socket) => sample.datagrams.push(datagrams(socket, ids)),
        Record::Unix(socket) => sample.unix.extend(unix(socket, ids)),
        Record::Pipe(record) => sample.pipes.push(pipe(record)),
        Record::Ring(record) => sample.rings.push(ring(record, ids)),
        Record::Epoll(record) => sample.epolls.push(epoll(record)),
        Record::Wait(record) => sample.waits.push(wait(record)),
        Record::Cpu(_) | Record::Operations(_) | Record::Cgroup(_) => {}
        Record::Peer(record) => {
            let info = peer_info(record, ids);
            sample.peers.get_or_insert_default().push(Peer {
                netns: info.netns,
                local: info.local,
                remote: info.remote,
                tgid: info.tgid,
                fd: info.fd,
                name: String::new(),
            });
        }
        Record::Holder(record) => {
            let holder = holder(record, String::new());
            sample.holders.get_or_insert_default().push(holder);
        }
        Record::Thread(record) => sample.threads.push(thread(record)),
        Record::Process(record) => {
            let ProcessInfo {
                tgid, pid, comm, ..
            } = process(record);
            sample.targets.get_or_insert_default().push(Target {
                id: pid,
                name: harmless(&comm),
                tgids: vec![tgid],
                ..Target::default()
            });
        }
    })?;
    Ok(sample)
}

/// `jiffy_ns`: the kernel's timer tick, the unit of the record's `since_` fields.
pub(super) fn connection(record: &SocketRecord, ids: ObjectIds, jiffy_ns: u64) -> Connection {
    // 1 ns means just now, because 0 means unknown.
    let since = |jiffies: u32| u64::from(jiffies) * jiffy_ns + 1;
    // If data went both ways within one timer tick, the sequence numbers show the order: our data was last if the peer's bare
    // ACK of it came last. The counts of segments exclude a connection that never carried data: both its times are those of its
    // creation.
    let (received, sent) = (record.segments & 0xffff, record.segments >> 16);
    let sent_last = record.since_received == record.since_sent
        && received > 0
        && sent > 0
        && record.snd_una == record.write_seq
        && record.snd_wl1 == record.rcv_nxt;
    Connection {
        cookie: ids.cookie(record.cookie),
        tgid: record.header.tgid,
        fd: record.fd,
        netns: record.netns,
        local: address(record.family, record.local, record.local_port),
        remote: address(record.family, record.remote, record.remote_port),
        state: record.state,
        rcv_nxt: record.rcv_nxt,
        copied_seq: record.copied_seq,
        write_seq: record.write_seq,
        snd_una: record.snd_una,
        snd_nxt: record.snd_nxt,
        snd_wnd: record.snd_wnd,
        rmem_alloc: record.rmem_alloc,
        rcvbuf: record.rcvbuf,
        wmem_queued: record.wmem_queued,
        sndbuf: record.sndbuf,
        drops: record.drops,
        snd_wl1: record.snd_wl1,
        segments: record.segments,
        since_received_ns: since(record.since_received) + u64::from(sent_last),
        since_sent_ns: since(record.since_sent),
        since_any_segment_ns: since(record.since_any_segment),
    }
}

/// `timestamps`: one u64 for each connection in the accept queue, as `ListenerRecord` documents.
pub(super) fn listener(record: &ListenerRecord, timestamps: &[u8], ids: ObjectIds) -> Listener {
    let ages_ns = timestamps
        .chunks_exact(8)
        .filter_map(|timestamp| {
            let timestamp = u64::from_le_bytes(timestamp.try_into().ok()?);
            let done_us = timestamp & 0xffff_ffff_ffff;
            // 0: not timed (SYN cookie). Another port: the kernel reused the entry for another listener during the scan.
            let is_valid = done_us != 0 && (timestamp >> 48) as u16 == record.port;
            is_valid.then(|| record.now_ns.saturating_sub(done_us * 1000))
        })
        .collect();
    Listener {
        cookie: ids.cookie(record.cookie),
        tgid: record.header.tgid,
        netns: record.netns,
        address: address(record.family, record.local, record.port),
        depth: record.depth,
        limit: record.limit,
        drops: record.drops,
        half_open: Some(record.half_open).filter(|half_open| *half_open != UNKNOWN),
        seen_ns: record.now_ns,
        ages_ns,
    }
}

pub(super) fn listener_info(record: &ListenerRecord, ids: ObjectIds) -> ListenerInfo {
    ListenerInfo {
        tgid: record.header.tgid,
        cookie: ids.cookie(record.cookie),
        netns: record.netns,
        address: address(record.family, record.local, record.port),
    }
}

pub(super) fn peer_info(record: &PeerRecord, ids: ObjectIds) -> PeerInfo {
    PeerInfo {
        cookie: ids.cookie(record.cookie),
        netns: record.netns,
        local: address(record.family, record.local, record.local_port),
        remote: address(record.family, record.remote, record.remote_port),
        tgid: record.header.tgid,
        fd: record.fd,
    }
}

pub(super) fn datagrams(record: &UdpRecord, ids: ObjectIds) -> DatagramSocket {
    DatagramSocket {
        cookie: ids.cookie(record.cookie),
        tgid: record.header.tgid,
        fd: record.fd,
        netns: record.netns,
        local: address(record.family, record.local, record.local_port),
        remote: address(record.family, record.remote, record.remote_port),
        // The kernel returns memory in batches: between two reads the difference can become negative.
        memory: if (record.memory as i32) < 0 {
            0
        } else {
            record.memory
        },
        rcvbuf: record.rcvbuf,
        queued: Some(record.queued).filter(|queued| *queued != UNKNOWN),
        drops: record.drops,
        head: ids.object(record.head),
    }
}

/// `None` for a socket type other than stream, datagram and seqpacket.
pub(super) fn unix(record: &UnixRecord, ids: ObjectIds) -> Option<UnixSocket> {
    const TCP_LISTEN: u8 = 10;
    Some(UnixSocket {
        inode: record.inode,
        peer: Some(record.peer).filter(|peer| *peer != 0),
        tgid: record.header.tgid,
        fd: record.fd,
        netns: record.netns,
        style: match record.style {
            1 => UnixStyle::Stream,
            2 => UnixStyle::Datagram,
            5 => UnixStyle::SeqPacket,
            _ => return None,
        },
        listening: record.state == TCP_LISTEN,
        path: path(&record.path, record.path_len),
        peer_path: path(&record.peer_path, record.peer_path_len),
        queued: record.queued,
        limit: record.limit,
        head: ids.object(record.head),
        unread_by_peer: record.written,
        sndbuf: record.sndbuf,
        unread: record.peer_written,
        peer_sndbuf: record.peer_sndbuf,
    })
}

/// A unix address. `len` includes the two bytes of the family. A path ends at its first NUL; an abstract name begins with one, and
/// gets an `@` instead. A relative path that begins with `@` gets a `./`, so that it is not taken for an abstract name.
fn path(bytes: &[u8; UNIX_PATH], len: u16) -> Option<String> {
    const FAMILY: usize = 2;
    let name = bytes.get(..usize::from(len).checked_sub(FAMILY)?.min(UNIX_PATH))?;
    let (first, rest) = name.split_first()?;
    let text = |bytes: &[u8]| harmless(&String::from_utf8_lossy(bytes));
    if *first == 0 {
        return (!rest.is_empty()).then(|| format!("@{}", text(rest)));
    }
    let end = name
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(name.len());
    let directory = if *first == b'@' { "./" } else { "" };
    Some(format!("{directory}{}", text(&name[..end])))
}

pub(super) fn epoll(record: &EpollRecord) -> Epoll {
    Epoll {
        tgid: record.header.tgid,
        fd: record.fd,
        ready: record.ready,
        more: record.flags & EPOLL_MORE != 0,
    }
}

pub(super) fn ring(record: &RingRecord, ids: ObjectIds) -> Ring {
    Ring {
        id: ids.object(record.id),
        tgid: record.header.tgid,
        fd: record.fd,
        sq_tail: record.sq_tail,
        sq_head: record.sq_head,
        sq_entries: record.sq_entries,
        cq_tail: record.cq_tail,
        cq_head: record.cq_head,
        cq_entries: record.cq_entries,
        sq_dropped: record.sq_dropped,
        cq_overflow: record.cq_overflow,
    }
}

pub(super) fn wait(record: &WaitRecord) -> Wait {
    Wait {
        tgid: record.header.tgid,
        tid: record.tid,
        own_tid: record.own_tid,
        comm: comm(&record.comm),
        state: state(record.state, record.flags & WAIT_ON_CPU != 0),
        io: record.flags & WAIT_IO != 0,
        syscall: (record.syscall != NO_SYSCALL && record.state != 0).then(|| Syscall {
            architecture: Architecture::OWN,
            number: record.syscall,
            args: record.args,
            detail: detail(record),
        }),
        voluntary: record.voluntary,
        involuntary: record.involuntary,
        cpu_ns: record.cpu_ns,
        run_delay_ns: record.run_delay_ns,
    }
}

/// A thread that runs, if its instruction pointer is known.
pub(super) fn running(record: &WaitRecord) -> Option<RunningThread> {
    let runs = record.state == 0 && record.flags & WAIT_ON_CPU != 0;
    let [address, ..] = record.args;
    (runs && address != 0).then_some(RunningThread {
        tgid: record.header.tgid,
        tid: record.tid,
        address,
    })
}

fn detail(record: &WaitRecord) -> Detail {
    if record.flags & WAIT_WORD != 0 {
        return Detail::Futex {
            word: record.word,
            owner: record.owner,
        };
    }
    let polled = record.polled.iter().take(record.polled_len as usize);
    let polled: Vec<(i32, i16)> = polled
        .map(|[fd, events]| (*fd as i32, *events as i16))
        .collect();
    if polled.is_empty() {
        Detail::None
    } else {
        Detail::Poll(polled)
    }
}

/// `task_struct.__state` (include/linux/sched.h): the bits that are the same in all kernels since 5.10.
fn state(bits: u32, on_cpu: bool) -> State {
    const UNINTERRUPTIBLE: u32 = 0x2;
    const STOPPED_OR_TRACED: u32 = 0x4 | 0x8;
    const DEAD: u32 = 0x10 | 0x20 | 0x80;
    /// Uninterruptible but not counted as load: idle kernel threads and the like.
    const NOLOAD: u32 = 0x400;
    match bits {
        0 if on_cpu => State::Running,
        0 => State::Runnable,
        _ if bits & STOPPED_OR_TRACED != 0 => State::Stopped,
        _ if bits & DEAD != 0 => State::Dead,
        _ if bits & UNINTERRUPTIBLE != 0 && bits & NOLOAD == 0 => State::Uninterruptible,
        // Interruptible, frozen (a separate state since 6.1), parked, waking.
        _ => State::Sleeping,
    }
}

fn comm(bytes: &[u8; 16]) -> String {
    harmless(&raw_comm(bytes))
}

/// As the process set it: it may hold any bytes.
fn raw_comm(bytes: &[u8; 16]) -> String {
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

pub(super) fn holder(record: &HolderRecord, name: String) -> Holder {
    let is_socket = record.end & HOLDER_SOCKET != 0;
    Holder {
        inode: record.inode,
        tgid: record.header.tgid,
        name,
        fd: record.fd,
        reads: is_socket || record.end & PIPE_READ_END != 0,
        writes: is_socket || record.end & PIPE_WRITE_END != 0,
    }
}

pub(super) fn pipe(record: &PipeRecord) -> Pipe {
    Pipe {
        inode: record.inode,
        tgid: record.header.tgid,
        fd: record.fd,
        reads: record.end & PIPE_READ_END != 0,
        writes: record.end & PIPE_WRITE_END != 0,
        head: record.head,
        tail: record.tail,
        limit: record.limit,
        bytes: Some(record.bytes).filter(|bytes| *bytes != PIPE_BYTES_UNKNOWN),
        readers: record.readers,
        writers: record.writers,
        path: None,
    }
}

pub(super) fn thread(record: &ThreadRecord) -> Thread {
    Thread {
        tgid: record.header.tgid,
        tid: record.tid,
        runnable: record.state == 0,
        on_cpu: record.on_cpu != 0,
        run_delay_ns: record.run_delay_ns,
        dispatches: record.dispatches,
        cpu_ns: record.cpu_ns,
    }
}

pub(super) fn process(record: &ProcessRecord) -> ProcessInfo {
    ProcessInfo {
        tgid: record.header.tgid,
        pid: record.pid,
        parent: record.parent,
        start_ns: record.start_ns,
        exec_id: record.exec_id,
        kernel: record.kernel != 0,
        comm: raw_comm(&record.comm),
    }
}

/// IPv4-mapped IPv6 addresses become IPv4 addresses.
fn address(family: u8, bytes: [u8; 16], port: u16) -> SocketAddr {
    let ip = if family == AF_INET {
        IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))
    } else {
        let v6 = Ipv6Addr::from(bytes);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    };
    SocketAddr::new(ip, port)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ListenerRecord {
        ListenerRecord {
            now_ns: 5_000_000_000,
            port: 80,
            family: AF_INET,
            depth: 3,
            ..bytemuck::Zeroable::zeroed()
        }
    }

    #[test]
    fn a_connections_age_is_the_time_since_its_handshake() {
        let timestamps = [80 << 48 | 4_000_000_u64, 80 << 48 | 4_999_000]
            .map(u64::to_le_bytes)
            .concat();
        assert_eq!(
            listener(&record(), &timestamps, ObjectIds::default()).ages_ns,
            [1_000_000_000, 1_000_000]
        );
    }

    #[test]
    fn entries_without_a_timestamp_or_of_another_port_have_no_age() {
        let timestamps = [80 << 48, 81 << 48 | 4_000_000_u64, 0]
            .map(u64::to_le_bytes)
            .concat();
        assert!(
            listener(&record(), &timestamps, ObjectIds::default())
                .ages_ns
                .is_empty()
        );
    }

    #[test]
    fn the_order_of_data_within_a_tick_follows_from_sequence_numbers() {
        let connection = |segments: u32, snd_wl1: u32, since_received: u32| {
            let record = SocketRecord {
                family: AF_INET,
                rcv_nxt: 100,
                write_seq: 200,
                snd_una: 200,
                snd_wl1,
                segments,
                since_received,
                since_sent: 3,
                ..bytemuck::Zeroable::zeroed()
            };
            let connection = connection(&record, ObjectIds::default(), 4_000_000);
            (connection.since_received_ns, connection.since_sent_ns)
        };
        assert_eq!(connection(2 << 16 | 1, 100, 3), (12_000_002, 12_000_001));
        assert_eq!(
            connection(2 << 16 | 1, 90, 3),
            (12_000_001, 12_000_001),
            "received last"
        );
        assert_eq!(connection(0, 100, 3), (12_000_001, 12_000_001), "no data");
        assert_eq!(connection(2 << 16 | 1, 100, 4), (16_000_001, 12_000_001));
    }

    #[test]
    fn a_unix_address_is_a_path_or_an_abstract_name() {
        let of = |name: &[u8], len: u16| {
            let mut bytes = [b'x'; UNIX_PATH];
            bytes[..name.len()].copy_from_slice(name);
            path(&bytes, len)
        };
        assert_eq!(of(b"/run/a\0", 9).as_deref(), Some("/run/a"));
        assert_eq!(of(b"/run/a", 8).as_deref(), Some("/run/a"));
        assert_eq!(of(b"\0name", 7).as_deref(), Some("@name"));
        assert_eq!(of(b"@name\0", 8).as_deref(), Some("./@name"));
        assert_eq!((of(b"", 2), of(b"", 0), of(b"\0", 3)), (None, None, None));
        assert_eq!(of(b"y", u16::MAX).unwrap().len(), UNIX_PATH);
    }

    #[test]
    fn thread_states_match_ps() {
        assert_eq!(state(0, true), State::Running);
        assert_eq!(state(0, false), State::Runnable);
        assert_eq!(state(1, false), State::Sleeping);
        assert_eq!(state(2, false), State::Uninterruptible);
        // TASK_KILLABLE, TASK_IDLE, TASK_STOPPED, __TASK_TRACED with TASK_WAKEKILL.
        assert_eq!(state(0x102, false), State::Uninterruptible);
        assert_eq!(state(0x402, false), State::Sleeping);
        assert_eq!(state(0x104, false), State::Stopped);
        assert_eq!(state(0x108, false), State::Stopped);
    }

    #[test]
    fn ipv4_mapped_addresses_become_ipv4() {
        let mapped = Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets();
        assert_eq!(address(10, mapped, 80).to_string(), "10.0.0.1:80");
    }
}
