//! Decodes the records of the eBPF programs from what one read of an iterator returned. Pure.
#![forbid(unsafe_code)]

use std::io;

use tailback_ebpf::{
    CgroupRecord, CpuRecord, EpollRecord, Header, HolderRecord, KIND_CGROUP, KIND_CPU, KIND_EPOLL,
    KIND_HOLDER, KIND_LISTENER, KIND_OPERATIONS, KIND_PEER, KIND_PIPE, KIND_PROCESS, KIND_RING,
    KIND_SOCKET, KIND_THREAD, KIND_UDP, KIND_UNIX, KIND_WAIT, ListenerRecord, OperationsRecord,
    PeerRecord, PipeRecord, ProcessRecord, RingRecord, SocketRecord, ThreadRecord, UdpRecord,
    UnixRecord, WaitRecord,
};

/// One record of a scan.
#[derive(Clone, Copy, Debug)]
pub enum Record<'a> {
    /// A TCP connection.
    Socket(&'a SocketRecord),
    /// A listener, and the raw timestamps (u64, little-endian) of its accept queue.
    Listener(&'a ListenerRecord, &'a [u8]),
    /// A UDP socket.
    Udp(&'a UdpRecord),
    /// A unix socket.
    Unix(&'a UnixRecord),
    /// One end of a pipe.
    Pipe(&'a PipeRecord),
    /// An io_uring instance.
    Ring(&'a RingRecord),
    /// An epoll instance.
    Epoll(&'a EpollRecord),
    /// What a thread of a target is doing or blocked on.
    Wait(&'a WaitRecord),
    /// CPU time of a thread on the host.
    Cpu(&'a CpuRecord),
    /// A holder of a pipe end or a unix socket.
    Holder(&'a HolderRecord),
    /// A holder of a requested connection.
    Peer(&'a PeerRecord),
    /// The `file_operations` of one of the agent's own files.
    Operations(&'a OperationsRecord),
    /// A thread of a target.
    Thread(&'a ThreadRecord),
    /// A process on the host.
    Process(&'a ProcessRecord),
    /// A control group of a target's process, or a parent of it.
    Cgroup(&'a CgroupRecord),
}

/// Splits what one read returned into records. The kernel never splits a record, so a partial one is an error, as is an
/// unknown kind or size. The records before it are still visited.
pub fn decode(mut bytes: &[u8], visit: &mut dyn FnMut(Record<'_>)) -> io::Result<()> {
    while !bytes.is_empty() {
        let header: Header = prefix(bytes).ok_or_else(|| bad_record(bytes.len()))?;
        let record = bytes
            .get(..usize::from(header.len))
            .filter(|record| record.len() >= size_of::<Header>())
            .ok_or_else(|| bad_record(bytes.len()))?;
        bytes = bytes.get(record.len()..).unwrap_or_default();
        let decoded = match header.kind {
            KIND_SOCKET => prefix(record).map(|record| visit(Record::Socket(&record))),
            KIND_LISTENER => prefix(record).map(|listener| {
                let timestamps = record.get(size_of::<ListenerRecord>()..);
                visit(Record::Listener(&listener, timestamps.unwrap_or_default()));
            }),
            KIND_UDP => prefix(record).map(|record| visit(Record::Udp(&record))),
            KIND_UNIX => prefix(record).map(|record| visit(Record::Unix(&record))),
            KIND_PIPE => prefix(record).map(|record| visit(Record::Pipe(&record))),
            KIND_RING => prefix(record).map(|record| visit(Record::Ring(&record))),
            KIND_EPOLL => prefix(record).map(|record| visit(Record::Epoll(&record))),
            KIND_WAIT => prefix(record).map(|record| visit(Record::Wait(&record))),
            KIND_CPU => prefix(record).map(|record| visit(Record::Cpu(&record))),
            KIND_HOLDER => prefix(record).map(|record| visit(Record::Holder(&record))),
            KIND_PEER => prefix(record).map(|record| visit(Record::Peer(&record))),
            KIND_OPERATIONS => prefix(record).map(|record| visit(Record::Operations(&record))),
            KIND_THREAD => prefix(record).map(|record| visit(Record::Thread(&record))),
            KIND_CGROUP => prefix(record).map(|record| visit(Record::Cgroup(&record))),
            KIND_PROCESS => prefix(record).map(|record| visit(Record::Process(&record))),
            _ => None,
        };
        decoded.ok_or_else(|| bad_record(record.len()))?;
    }
    Ok(())
}

fn prefix<T: bytemuck::AnyBitPattern>(bytes: &[u8]) -> Option<T> {
    bytes
        .get(..size_of::<T>())
        .map(bytemuck::pod_read_unaligned)
}

fn bad_record(len: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the eBPF object wrote an unknown record of {len} bytes"),
    )
}

#[cfg(test)]
mod tests {
    use bytemuck::{Zeroable as _, bytes_of};

    use super::*;

    fn stream() -> Vec<u8> {
        let header = |kind, len| Header { kind, len, tgid: 7 };
        let thread = ThreadRecord {
            header: header(KIND_THREAD, size_of::<ThreadRecord>() as u16),
            tid: 8,
            ..ThreadRecord::zeroed()
        };
        let listener = ListenerRecord {
            header: header(KIND_LISTENER, size_of::<ListenerRecord>() as u16 + 16),
            ..ListenerRecord::zeroed()
        };
        [bytes_of(&thread), bytes_of(&listener), &[1; 16]].concat()
    }

    fn count(bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut count = 0;
        let decoded = decode(bytes, &mut |_| count += 1);
        (count, decoded)
    }

    #[test]
    fn decode_yields_each_record_and_the_timestamps_of_a_listener() {
        let mut timestamps = 0;
        let mut tids = Vec::new();
        decode(&stream(), &mut |record| match record {
            Record::Thread(thread) => tids.push(thread.tid),
            Record::Listener(_, raw) => timestamps = raw.len(),
            _ => panic!("{record:?}"),
        })
        .unwrap();
        assert_eq!((tids, timestamps), (vec![8], 16));
    }

    #[test]
    fn a_truncated_or_unknown_record_is_an_error_after_the_valid_ones() {
        let whole = stream();
        for cut in size_of::<ThreadRecord>() + 1..whole.len() {
            let (records, decoded) = count(&whole[..cut]);
            assert!(records == 1 && decoded.is_err(), "cut at {cut}");
        }
        let kind = core::mem::offset_of!(Header, kind);
        let mut unknown = whole;
        unknown[size_of::<ThreadRecord>() + kind] = 0xee;
        let (records, decoded) = count(&unknown);
        assert!(records == 1 && decoded.is_err());
    }

    #[test]
    fn a_record_of_length_zero_is_an_error_rather_than_an_endless_loop() {
        assert!(count(&[0; 64]).1.is_err());
    }
}
