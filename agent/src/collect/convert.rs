//! From the eBPF programs' records to plain data. Pure.
#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tailback_ebpf::{
    ListenerRecord, PIPE_BYTES_UNKNOWN, PIPE_READ_END, PIPE_WRITE_END, PipeRecord, ProcessRecord,
    SocketRecord, ThreadRecord,
};

use crate::{
    sample::{Connection, Listener, Pipe, Thread},
    target::{ListenerSeen, ProcessSeen},
};

const AF_INET: u8 = 2;

pub(super) fn connection(record: &SocketRecord) -> Connection {
    Connection {
        cookie: record.cookie,
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
        snd_wl1: 0,
        since_received_ns: 0,
        since_sent_ns: 0,
        since_heard_ns: 0,
    }
}

/// `stamps`: one u64 per waiting connection, as `ListenerRecord` describes.
pub(super) fn listener(record: &ListenerRecord, stamps: &[u8]) -> Listener {
    let ages_ns = stamps
        .chunks_exact(8)
        .filter_map(|stamp| {
            let stamp = u64::from_le_bytes(stamp.try_into().ok()?);
            let done_us = stamp & 0xffff_ffff_ffff;
            // 0: not timed (SYN cookie). Another port: the entry was reused for a stranger while we walked.
            let ours = done_us != 0 && (stamp >> 48) as u16 == record.port;
            ours.then(|| record.now_ns.saturating_sub(done_us * 1000))
        })
        .collect();
    Listener {
        cookie: record.cookie,
        tgid: record.header.tgid,
        netns: record.netns,
        address: address(record.family, record.local, record.port),
        depth: record.depth,
        limit: record.limit,
        drops: record.drops,
        half_open: None,
        seen_ns: record.now_ns,
        ages_ns,
    }
}

pub(super) fn listener_seen(record: &ListenerRecord) -> ListenerSeen {
    ListenerSeen {
        tgid: record.header.tgid,
        cookie: record.cookie,
        netns: record.netns,
        address: address(record.family, record.local, record.port),
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

pub(super) fn process(record: &ProcessRecord) -> ProcessSeen {
    let comm = record
        .comm
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    ProcessSeen {
        tgid: record.header.tgid,
        pid: record.pid,
        parent: record.parent,
        start_ns: record.start_ns,
        exec_id: record.exec_id,
        kernel: record.kernel != 0,
        comm: String::from_utf8_lossy(comm).into_owned(),
    }
}

/// IPv4 addresses inside IPv6 sockets are shown as what they are.
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
    fn ages_are_the_time_since_the_handshake() {
        let stamps = [80 << 48 | 4_000_000_u64, 80 << 48 | 4_999_000]
            .map(u64::to_le_bytes)
            .concat();
        assert_eq!(
            listener(&record(), &stamps).ages_ns,
            [1_000_000_000, 1_000_000]
        );
    }

    #[test]
    fn entries_without_a_time_or_of_another_port_have_no_age() {
        let stamps = [80 << 48, 81 << 48 | 4_000_000_u64, 0]
            .map(u64::to_le_bytes)
            .concat();
        assert!(listener(&record(), &stamps).ages_ns.is_empty());
    }

    #[test]
    fn mapped_addresses_are_shown_as_ipv4() {
        let mapped = Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets();
        assert_eq!(address(10, mapped, 80).to_string(), "10.0.0.1:80");
    }
}
