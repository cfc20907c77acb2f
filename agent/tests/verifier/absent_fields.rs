use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    net::{TcpListener, TcpStream},
};

use tailback::kernel::{
    btf::Btf,
    layout::{Feature, Resolved, resolve, resolve_without},
    scanner::Record,
};
use tailback_ebpf::{Layout, ThreadRecord};

use crate::own_process::{kernel_btf, watch_own_process};

/// What the scans show of the test's own process, which has every kind of queue.
#[derive(Default)]
struct Seen {
    connections: usize,
    /// Number of timestamps in the accept queue of its IPv6 listener.
    timestamps: Option<u32>,
    depth: Option<u32>,
    local: [u8; 16],
    pipes: usize,
    threads: Vec<ThreadRecord>,
}

fn scan(fields: &Resolved) -> Seen {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let address = listener.local_addr().unwrap();
    // One is accepted and has unread data, one waits.
    let mut first = TcpStream::connect(address).unwrap();
    let accepted = listener.accept().unwrap();
    first.write_all(b"unread").unwrap();
    let second = TcpStream::connect(address).unwrap();
    let (reader, mut writer) = io::pipe().unwrap();
    writer.write_all(b"unread").unwrap();

    let mut scanner = watch_own_process(fields);
    let mut seen = Seen::default();
    scanner
        .scan_files(&mut |record| match record {
            Record::Socket(socket)
                if [socket.local_port, socket.remote_port].contains(&address.port()) =>
            {
                seen.connections += 1;
            }
            Record::Listener(listener, timestamps) if listener.port == address.port() => {
                assert_eq!(
                    timestamps.len(),
                    listener.waiting as usize * size_of::<u64>()
                );
                seen.timestamps = Some(listener.waiting);
                seen.depth = Some(listener.depth);
                seen.local = listener.local;
            }
            Record::Pipe(_) => seen.pipes += 1,
            _ => {}
        })
        .unwrap();
    scanner
        .scan_threads(&mut |record| {
            if let Record::Thread(thread) = record {
                seen.threads.push(*thread);
            }
        })
        .unwrap();
    drop((first, accepted, second, reader));
    seen
}

/// Asserts that the scans show exactly what these fields allow.
fn check(seen: &Seen, fields: &Resolved) {
    let has = |feature| fields.has(feature);
    let what = format!("without {:?}", fields.missing);
    assert_eq!(seen.depth, Some(1), "{what}");
    // Both ends of the accepted connection, and the client end of the waiting one.
    assert_eq!(seen.connections, 3, "{what}");
    let timestamps = u32::from(has(Feature::AcceptAges));
    assert_eq!(seen.timestamps, Some(timestamps), "{what}");
    let mut address = [0; 16];
    address[15] = u8::from(has(Feature::Ipv6));
    assert_eq!(seen.local, address, "{what}");
    if has(Feature::Pipes) {
        assert!(seen.pipes >= 2, "{what}");
    } else {
        assert_eq!(seen.pipes, 0, "{what}");
    }
    let any = |is: fn(&ThreadRecord) -> bool| seen.threads.iter().any(is);
    assert!(any(|thread| thread.cpu_ns > 0), "{what}");
    let dispatched = any(|thread| thread.dispatches > 0);
    assert_eq!(dispatched, has(Feature::RunDelay), "{what}");
    // The thread that reads from the iterator is running while it is visited.
    let runs = any(|thread| thread.on_cpu != 0);
    assert_eq!(runs, has(Feature::OnCpu), "{what}");
}

/// One field of each optional feature that this kernel has. Hiding it switches off the whole feature, so any other field
/// would lead to the same layout.
fn one_field_each(btf: &Btf<'_>) -> BTreeMap<Feature, &'static str> {
    let whole = resolve(btf);
    let mut fields = BTreeMap::new();
    for field in Layout::FIELDS {
        let without = resolve_without(btf, &[field]);
        let lost = Feature::ALL
            .iter()
            .copied()
            .find(|feature| whole.has(*feature) && !without.has(*feature));
        if let Some(lost) = lost.filter(|lost| *lost != Feature::Base) {
            fields.entry(lost).or_insert(*field);
        }
    }
    fields
}

#[test]
fn an_absent_field_disables_its_feature_and_no_other() {
    let Some(bytes) = kernel_btf("an_absent_field_disables_its_feature_and_no_other") else {
        return;
    };
    let btf = Btf::parse(&bytes).unwrap();
    let whole = resolve(&btf);
    check(&scan(&whole), &whole);
    for field in one_field_each(&btf).into_values() {
        let without = resolve_without(&btf, &[field]);
        check(&scan(&without), &without);
    }
}

#[test]
fn a_kernel_without_any_optional_field_can_be_watched() {
    let Some(bytes) = kernel_btf("a_kernel_without_any_optional_field_can_be_watched") else {
        return;
    };
    let btf = Btf::parse(&bytes).unwrap();
    let optional: Vec<&str> = one_field_each(&btf).into_values().collect();
    let without = resolve_without(&btf, &optional);
    for feature in Feature::ALL.iter().copied() {
        // This includes features that the kernel lacks anyway.
        assert_eq!(without.has(feature), feature == Feature::Base);
    }
    check(&scan(&without), &without);
}
