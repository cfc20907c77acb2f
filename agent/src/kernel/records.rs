//! The eBPF programs' records: what one read of an iterator returned, split and told apart. Pure.
#![forbid(unsafe_code)]

use std::io;

use tailback_ebpf::{
    CpuRecord, Header, HolderRecord, KIND_CPU, KIND_HOLDER, KIND_LISTENER, KIND_OPERATIONS,
    KIND_PEER, KIND_PIPE, KIND_PROCESS, KIND_RING, KIND_SOCKET, KIND_THREAD, KIND_UDP, KIND_UNIX,
    KIND_WAIT, ListenerRecord, OperationsRecord, PeerRecord, PipeRecord, ProcessRecord, RingRecord,
    SocketRecord, ThreadRecord, UdpRecord, UnixRecord, WaitRecord,
};

/// One record of a walk.
#[derive(Clone, Copy, Debug)]
pub enum Record<'a> {
    /// A TCP connection.
    Socket(&'a SocketRecord),
    /// A listener, and the raw stamps (u64, little-endian) of those that wait.
    Listener(&'a ListenerRecord, &'a [u8]),
    /// A UDP socket.
    Udp(&'a UdpRecord),
    /// A unix socket.
    Unix(&'a UnixRecord),
    /// One end of a pipe.
    Pipe(&'a PipeRecord),
    /// An io_uring instance.
    Ring(&'a RingRecord),
    /// What a thread of a target waits for.
    Wait(&'a WaitRecord),
    /// CPU time of a thread of the machine.
    Cpu(&'a CpuRecord),
    /// Who holds an end of a pipe or a unix socket.
    Holder(&'a HolderRecord),
    /// Who holds a connection that was asked for.
    Peer(&'a PeerRecord),
    /// What kind of file one of the agent's own is.
    Operations(&'a OperationsRecord),
    /// A thread of a target.
    Thread(&'a ThreadRecord),
    /// A process of the machine.
    Process(&'a ProcessRecord),
}

/// Splits what one read returned into records. The kernel never cuts a record in two, so a part of one is an error,
/// as is a record of a kind or size that this agent does not know; those before it are visited.
pub fn decode(mut bytes: &[u8], visit: &mut dyn FnMut(Record<'_>)) -> io::Result<()> {
    while !bytes.is_empty() {
        let header: Header = head(bytes).ok_or_else(|| bad_record(bytes.len()))?;
        let record = bytes
            .get(..usize::from(header.len))
            .filter(|record| record.len() >= size_of::<Header>())
            .ok_or_else(|| bad_record(bytes.len()))?;
        bytes = bytes.get(record.len()..).unwrap_or_default();
        let decoded = match header.kind {
            KIND_SOCKET => head(record).map(|record| visit(Record::Socket(&record))),
            KIND_LISTENER => head(record).map(|listener| {
                let stamps = record.get(size_of::<ListenerRecord>()..);
                visit(Record::Listener(&listener, stamps.unwrap_or_default()));
            }),
            KIND_UDP => head(record).map(|record| visit(Record::Udp(&record))),
            KIND_UNIX => head(record).map(|record| visit(Record::Unix(&record))),
            KIND_PIPE => head(record).map(|record| visit(Record::Pipe(&record))),
            KIND_RING => head(record).map(|record| visit(Record::Ring(&record))),
            KIND_WAIT => head(record).map(|record| visit(Record::Wait(&record))),
            KIND_CPU => head(record).map(|record| visit(Record::Cpu(&record))),
            KIND_HOLDER => head(record).map(|record| visit(Record::Holder(&record))),
            KIND_PEER => head(record).map(|record| visit(Record::Peer(&record))),
            KIND_OPERATIONS => head(record).map(|record| visit(Record::Operations(&record))),
            KIND_THREAD => head(record).map(|record| visit(Record::Thread(&record))),
            KIND_PROCESS => head(record).map(|record| visit(Record::Process(&record))),
            _ => None,
        };
        decoded.ok_or_else(|| bad_record(record.len()))?;
    }
    Ok(())
}

fn head<T: bytemuck::AnyBitPattern>(bytes: &[u8]) -> Option<T> {
    bytes
        .get(..size_of::<T>())
        .map(bytemuck::pod_read_unaligned)
}

fn bad_record(len: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the eBPF object wrote a record of {len} bytes that this agent cannot read"),
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
    fn records_come_one_by_one_and_a_listener_with_its_stamps() {
        let mut stamps = 0;
        let mut tids = Vec::new();
        decode(&stream(), &mut |record| match record {
            Record::Thread(thread) => tids.push(thread.tid),
            Record::Listener(_, raw) => stamps = raw.len(),
            _ => panic!("{record:?}"),
        })
        .unwrap();
        assert_eq!((tids, stamps), (vec![8], 16));
    }

    #[test]
    fn a_record_that_is_cut_or_foreign_is_an_error_and_those_before_it_stand() {
        let whole = stream();
        for cut in size_of::<ThreadRecord>() + 1..whole.len() {
            let (records, decoded) = count(&whole[..cut]);
            assert!(records == 1 && decoded.is_err(), "cut at {cut}");
        }
        let kind = core::mem::offset_of!(Header, kind);
        let mut foreign = whole;
        foreign[size_of::<ThreadRecord>() + kind] = 0xee;
        let (records, decoded) = count(&foreign);
        assert!(records == 1 && decoded.is_err());
    }

    #[test]
    fn a_record_that_says_it_is_empty_does_not_stop_the_walk_for_ever() {
        assert!(count(&[0; 64]).1.is_err());
    }
}
