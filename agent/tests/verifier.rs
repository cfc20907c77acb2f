//! The kernel's verifier as the guard of the layout: real offsets load, wrong ones do not, and a field that a
//! kernel lacks takes its feature with it and nothing else.
//!
//! Needs root, and a kernel with BTF.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod ourselves;

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    net::{TcpListener, TcpStream},
};

use ourselves::{kernel, watch_ourselves};

use tailback::kernel::{
    btf::Btf,
    glance::{Glance, Record},
    layout::{Feature, Resolved, resolve, resolve_without},
};
use tailback_ebpf::{Layout, ThreadRecord};

fn by_name(layout: &Layout) -> BTreeMap<&'static str, u32> {
    let offsets: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(layout));
    Layout::FIELDS
        .iter()
        .copied()
        .zip(offsets.iter().copied())
        .collect()
}

/// The layout with one field somewhere else.
fn moved(found: &Resolved, field: &str, offset: u32) -> Resolved {
    let at = Layout::FIELDS.iter().position(|known| *known == field);
    let at = at.unwrap_or_else(|| panic!("there is no field {field}"));
    let mut moved = found.clone();
    let offsets: &mut [u32] = bytemuck::cast_slice_mut(bytemuck::bytes_of_mut(&mut moved.layout));
    offsets[at] = offset;
    moved
}

/// What the kernel says when it refuses to load with `field` at `offset`.
fn refusal(found: &Resolved, field: &str, offset: u32) -> String {
    match Glance::load_with(moved(found, field, offset)) {
        Ok(_) => panic!("the kernel takes {field} at {offset}"),
        Err(error) => {
            let text = format!("{error:#}");
            assert!(
                text.contains("the kernel refuses the iterator"),
                "{field} at {offset}: {text}"
            );
            text
        }
    }
}

#[test]
fn the_kernel_takes_its_own_layout() {
    let Some(bytes) = kernel("the_kernel_takes_its_own_layout") else {
        return;
    };
    let found = resolve(&Btf::parse(&bytes).unwrap());
    let glance = Glance::load_with(found.clone()).unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(glance.plan().fields, found);
}

#[test]
fn the_kernel_refuses_an_offset_outside_of_the_struct() {
    let Some(bytes) = kernel("the_kernel_refuses_an_offset_outside_of_the_struct") else {
        return;
    };
    // One of each struct. (`pid` is not among them: it ends in an array without a length, and so has no outside;
    // btf_struct_walk in kernel/bpf/btf.c.)
    let fields = [
        "task_comm",
        "file_mode",
        "inode_pipe",
        "pipe_head",
        "socket_sk",
        "sk_rcvbuf",
        "net_inum",
        "tcp_snd_nxt",
        "req_dl_next",
        "req_snt_synack",
    ];
    let found = resolve(&Btf::parse(&bytes).unwrap());
    for field in fields {
        refusal(&found, field, 1 << 20);
    }
}

#[test]
fn the_kernel_refuses_what_does_not_fit_the_type_at_the_offset() {
    let Some(bytes) = kernel("the_kernel_refuses_what_does_not_fit_the_type_at_the_offset") else {
        return;
    };
    let found = resolve(&Btf::parse(&bytes).unwrap());
    let at = by_name(&found.layout);

    let across = refusal(&found, "tcp_snd_wnd", at["tcp_snd_wnd"] + 2);
    assert!(across.contains("beyond the end of member"), "{across}");
    let half_a_pointer = refusal(&found, "task_flags", at["task_group_leader"]);
    assert!(
        half_a_pointer.contains("cannot access ptr member group_leader"),
        "{half_a_pointer}"
    );
    let no_pointer = refusal(&found, "task_group_leader", at["task_start_boottime"]);
    assert!(
        no_pointer.contains("invalid mem access 'scalar'"),
        "{no_pointer}"
    );
    let btf = Btf::parse(&bytes).unwrap();
    let socket = btf.structs(&["socket"])[0].unwrap();
    let ops = btf.field(socket, "ops").unwrap();
    let another_struct = refusal(&found, "socket_sk", ops.offset);
    assert!(another_struct.contains("ptr_proto_ops"), "{another_struct}");
}

#[test]
fn without_a_basic_field_it_is_said_which() {
    let Some(bytes) = kernel("without_a_basic_field_it_is_said_which") else {
        return;
    };
    let btf = Btf::parse(&bytes).unwrap();
    for field in Layout::FIELDS {
        let without = resolve_without(&btf, &[field]);
        let Some(missing) = without.missing.first() else {
            continue;
        };
        if missing.feature != Feature::Base {
            continue;
        }
        let expected = format!(
            "this kernel cannot be watched: struct {} has no {}",
            missing.container,
            missing.paths.join(" or ")
        );
        let error = Glance::load_with(without)
            .err()
            .map(|error| error.to_string());
        assert_eq!(error, Some(expected), "without {field}");
    }
}

/// What the walks show of this very process, which has all that there is to be seen.
#[derive(Default)]
struct Seen {
    connections: usize,
    /// Stamps of connections that wait on its IPv6 listener.
    stamps: Option<u32>,
    depth: Option<u32>,
    local: [u8; 16],
    pipes: usize,
    threads: Vec<ThreadRecord>,
}

fn look(fields: Resolved) -> Seen {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let address = listener.local_addr().unwrap();
    // One is accepted and has unread data, one waits.
    let mut first = TcpStream::connect(address).unwrap();
    let accepted = listener.accept().unwrap();
    first.write_all(b"unread").unwrap();
    let second = TcpStream::connect(address).unwrap();
    let (reader, mut writer) = io::pipe().unwrap();
    writer.write_all(b"unread").unwrap();

    let mut glance = watch_ourselves(fields);
    let mut seen = Seen::default();
    glance
        .walk_files(&mut |record| match record {
            Record::Socket(socket)
                if [socket.local_port, socket.remote_port].contains(&address.port()) =>
            {
                seen.connections += 1;
            }
            Record::Listener(listener, stamps) if listener.port == address.port() => {
                assert_eq!(stamps.len(), listener.waiting as usize * size_of::<u64>());
                seen.stamps = Some(listener.waiting);
                seen.depth = Some(listener.depth);
                seen.local = listener.local;
            }
            Record::Pipe(_) => seen.pipes += 1,
            _ => {}
        })
        .unwrap();
    glance
        .walk_threads(&mut |record| {
            if let Record::Thread(thread) = record {
                seen.threads.push(*thread);
            }
        })
        .unwrap();
    drop((first, accepted, second, reader));
    seen
}

/// Everything is seen that these fields allow, and nothing else.
fn check(seen: &Seen, fields: &Resolved) {
    let has = |feature| fields.has(feature);
    let what = format!("without {:?}", fields.missing);
    assert_eq!(seen.depth, Some(1), "{what}");
    // Both ends of the first, and the client of the one that waits.
    assert_eq!(seen.connections, 3, "{what}");
    let stamps = u32::from(has(Feature::AcceptAges));
    assert_eq!(seen.stamps, Some(stamps), "{what}");
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
    // The thread that reads the iterator runs while it is visited.
    let runs = any(|thread| thread.on_cpu != 0);
    assert_eq!(runs, has(Feature::OnCpu), "{what}");
}

/// For each optional feature that this kernel has, one field of it. With it the whole feature is off, so that any
/// other would lead to the same layout.
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
fn an_absent_field_costs_its_feature_and_no_other() {
    let Some(bytes) = kernel("an_absent_field_costs_its_feature_and_no_other") else {
        return;
    };
    let btf = Btf::parse(&bytes).unwrap();
    let whole = resolve(&btf);
    check(&look(whole.clone()), &whole);
    for field in one_field_each(&btf).into_values() {
        let without = resolve_without(&btf, &[field]);
        check(&look(without.clone()), &without);
    }
}

#[test]
fn a_kernel_without_any_optional_field_is_watched() {
    let Some(bytes) = kernel("a_kernel_without_any_optional_field_is_watched") else {
        return;
    };
    let btf = Btf::parse(&bytes).unwrap();
    let optional: Vec<&str> = one_field_each(&btf).into_values().collect();
    let without = resolve_without(&btf, &optional);
    for feature in Feature::ALL.iter().copied() {
        // What this kernel lacks anyway is no field's fault.
        assert_eq!(without.has(feature), feature == Feature::Base);
    }
    check(&look(without.clone()), &without);
}

/// The stamps of those that wait on this port: as the walk over files tells them, and as the one over marked sockets
/// does, where there is one.
fn stamps(fields: Resolved, port: u16) -> [Option<Vec<u8>>; 2] {
    let mut glance = watch_ourselves(fields);
    let mut told = [None, None];
    let [by_file, by_mark] = &mut told;
    let of = |record: Record<'_>, told: &mut Option<Vec<u8>>| {
        if let Record::Listener(listener, stamps) = record
            && listener.port == port
        {
            *told = Some(stamps.to_vec());
        }
    };
    glance
        .walk_files(&mut |record| of(record, by_file))
        .unwrap();
    glance
        .walk_marked(&mut |record| of(record, by_mark))
        .unwrap();
    told
}

#[test]
fn stamps_are_the_same_whoever_counts_the_rounds() {
    let Some(bytes) = kernel("stamps_are_the_same_whoever_counts_the_rounds") else {
        return;
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let waiting: Vec<_> = (0..100)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();

    let by_kernel = resolve(&Btf::parse(&bytes).unwrap());
    let mut by_program = by_kernel.clone();
    by_program.ways.bpf_loop = 0;
    let by_kernel = stamps(by_kernel, address.port());
    let by_program = stamps(by_program, address.port());
    assert_eq!(by_kernel, by_program);
    let all = by_kernel[0].as_ref().expect("the listener is seen");
    let all: Vec<u64> = all
        .chunks_exact(8)
        .map(|stamp| u64::from_le_bytes(stamp.try_into().unwrap()))
        .collect();
    assert_eq!(all.len(), waiting.len());
    assert!(all.iter().all(|stamp| *stamp > 0), "{all:?}");
}
