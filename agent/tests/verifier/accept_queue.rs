use std::net::{TcpListener, TcpStream};

use tailback::kernel::{
    btf::Btf,
    layout::{Resolved, resolve},
    scanner::Record,
};

use crate::own_process::{kernel_btf, watch_own_process};

/// The timestamps in the accept queue of this port: by the file scan, and by the scan of focused sockets if there is one.
fn timestamps(fields: &Resolved, port: u16) -> [Option<Vec<u8>>; 2] {
    let mut scanner = watch_own_process(fields);
    let mut seen = [None, None];
    let [by_file, by_focus] = &mut seen;
    let of = |record: Record<'_>, seen: &mut Option<Vec<u8>>| {
        if let Record::Listener(listener, timestamps) = record
            && listener.port == port
        {
            *seen = Some(timestamps.to_vec());
        }
    };
    scanner
        .scan_files(&mut |record| of(record, by_file))
        .unwrap();
    scanner
        .scan_focused_sockets(&mut |record| of(record, by_focus))
        .unwrap();
    seen
}

#[test]
fn both_accept_queue_loops_yield_the_same_timestamps() {
    let Some(bytes) = kernel_btf("both_accept_queue_loops_yield_the_same_timestamps") else {
        return;
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let waiting: Vec<_> = (0..100)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();

    let by_kernel = resolve(&Btf::parse(&bytes).unwrap());
    let mut by_program = by_kernel.clone();
    by_program.helpers.bpf_loop = 0;
    let by_kernel = timestamps(&by_kernel, address.port());
    let by_program = timestamps(&by_program, address.port());
    assert_eq!(by_kernel, by_program);
    let all = by_kernel[0].as_ref().expect("the listener is reported");
    let all: Vec<u64> = all
        .chunks_exact(8)
        .map(|timestamp| u64::from_le_bytes(timestamp.try_into().unwrap()))
        .collect();
    assert_eq!(all.len(), waiting.len());
    assert!(all.iter().all(|timestamp| *timestamp > 0), "{all:?}");
}
