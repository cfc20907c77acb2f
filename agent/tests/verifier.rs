//! The kernel's verifier checks the layout: real offsets load, wrong ones do not, and a missing field switches off its
//! feature and nothing else. And log statements cost nothing unless `--log-bpf` is given.
//!
//! Needs root, and a kernel with BTF.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod own_process;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::{AsRawFd as _, BorrowedFd},
    process::Command,
    time::Instant,
};

use own_process::{kernel_btf, watch_own_process};

use tailback::kernel::{
    LoadError,
    btf::Btf,
    glance::{Glance, Record},
    layout::{Feature, Resolved, resolve, resolve_without},
};
use tailback_ebpf::{LOG_LINES_PER_SECOND, Layout, ThreadRecord};

fn by_name(layout: &Layout) -> BTreeMap<&'static str, u32> {
    let offsets: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(layout));
    Layout::FIELDS
        .iter()
        .copied()
        .zip(offsets.iter().copied())
        .collect()
}

/// The layout with one field at another offset.
fn moved(found: &Resolved, field: &str, offset: u32) -> Resolved {
    let at = Layout::FIELDS.iter().position(|known| *known == field);
    let at = at.unwrap_or_else(|| panic!("there is no field {field}"));
    let mut moved = found.clone();
    let offsets: &mut [u32] = bytemuck::cast_slice_mut(bytemuck::bytes_of_mut(&mut moved.layout));
    offsets[at] = offset;
    moved
}

/// The verifier's reason for rejecting the programs that read `field`, if its offset is `offset`.
fn rejection(found: &Resolved, field: &str, offset: u32) -> String {
    let reason = match Glance::load_with(&moved(found, field, offset), false) {
        Err(error @ LoadError::Rejected { .. }) => error.to_string(),
        Err(error) => panic!("{field} at {offset}: {error}"),
        Ok(glance) => {
            let failed = glance.capabilities().failed_scans();
            let Some((_, reason)) = failed.first() else {
                panic!("the kernel accepts {field} at {offset}");
            };
            (*reason).to_owned()
        }
    };
    assert!(
        reason.contains("the verifier rejected"),
        "{field} at {offset}: {reason}"
    );
    reason
}

#[test]
fn the_verifier_accepts_the_layout_of_its_own_kernel() {
    let Some(bytes) = kernel_btf("the_verifier_accepts_the_layout_of_its_own_kernel") else {
        return;
    };
    let found = resolve(&Btf::parse(&bytes).unwrap());
    let glance = Glance::load_with(&found, false).unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(glance.capabilities().fields, found);
    assert_eq!(glance.capabilities().failed_scans(), []);
}

#[test]
fn the_verifier_rejects_an_offset_outside_of_the_struct() {
    let Some(bytes) = kernel_btf("the_verifier_rejects_an_offset_outside_of_the_struct") else {
        return;
    };
    // One field of each struct except `pid`, which ends in an array without a length and so has no outside
    // (btf_struct_walk, kernel/bpf/btf.c).
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
        rejection(&found, field, 1 << 20);
    }
}

#[test]
fn the_verifier_rejects_an_access_that_does_not_fit_the_type() {
    let Some(bytes) = kernel_btf("the_verifier_rejects_an_access_that_does_not_fit_the_type")
    else {
        return;
    };
    let found = resolve(&Btf::parse(&bytes).unwrap());
    let at = by_name(&found.layout);

    let across = rejection(&found, "tcp_snd_wnd", at["tcp_snd_wnd"] + 2);
    assert!(across.contains("beyond the end of member"), "{across}");
    let half_a_pointer = rejection(&found, "task_flags", at["task_group_leader"]);
    assert!(
        half_a_pointer.contains("cannot access ptr member group_leader"),
        "{half_a_pointer}"
    );
    let no_pointer = rejection(&found, "task_group_leader", at["task_start_boottime"]);
    assert!(
        no_pointer.contains("invalid mem access 'scalar'"),
        "{no_pointer}"
    );
    let btf = Btf::parse(&bytes).unwrap();
    let socket = btf.structs(&["socket"])[0].unwrap();
    let ops = btf.field(socket, "ops").unwrap();
    let another_struct = rejection(&found, "socket_sk", ops.offset);
    assert!(
        another_struct.contains("struct proto_ops"),
        "{another_struct}"
    );
}

#[test]
fn a_rejected_program_is_switched_off_and_the_others_keep_working() {
    let test = "a_rejected_program_is_switched_off_and_the_others_keep_working";
    let Some(bytes) = kernel_btf(test) else {
        return;
    };
    let found = resolve(&Btf::parse(&bytes).unwrap());
    let mut glance = watch_own_process(&moved(&found, "tcp_snd_nxt", 1 << 20));
    let capabilities = glance.capabilities();
    assert!(capabilities.files.is_err());
    assert_eq!(
        (&capabilities.threads, &capabilities.waits),
        (&Ok(()), &Ok(()))
    );
    let mut threads = 0;
    glance.scan_threads(&mut |_| threads += 1).unwrap();
    assert!(threads > 0);
    glance
        .scan_files(&mut |record| panic!("{record:?}"))
        .unwrap();
}

#[test]
fn without_a_base_field_the_error_names_it() {
    let Some(bytes) = kernel_btf("without_a_base_field_the_error_names_it") else {
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
        let error = Glance::load_with(&without, false)
            .err()
            .map(|error| error.to_string());
        assert_eq!(error, Some(expected), "without {field}");
    }
}

/// What the scans show of the test's own process, which has every kind of queue.
#[derive(Default)]
struct Seen {
    connections: usize,
    /// Number of timestamps in the accept queue of its IPv6 listener.
    stamps: Option<u32>,
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

    let mut glance = watch_own_process(fields);
    let mut seen = Seen::default();
    glance
        .scan_files(&mut |record| match record {
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

/// The timestamps in the accept queue of this port: by the file scan, and by the scan of focused sockets if there is one.
fn timestamps(fields: &Resolved, port: u16) -> [Option<Vec<u8>>; 2] {
    let mut glance = watch_own_process(fields);
    let mut seen = [None, None];
    let [by_file, by_focus] = &mut seen;
    let of = |record: Record<'_>, seen: &mut Option<Vec<u8>>| {
        if let Record::Listener(listener, stamps) = record
            && listener.port == port
        {
            *seen = Some(stamps.to_vec());
        }
    };
    glance
        .scan_files(&mut |record| of(record, by_file))
        .unwrap();
    glance
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
        .map(|stamp| u64::from_le_bytes(stamp.try_into().unwrap()))
        .collect();
    assert_eq!(all.len(), waiting.len());
    assert!(all.iter().all(|stamp| *stamp > 0), "{all:?}");
}

/// Calls of BPF helpers in a loaded program, by the name of the kernel function that implements each.
fn helper_calls(program: BorrowedFd<'_>) -> BTreeSet<String> {
    /// The start of `struct bpf_prog_info`, include/uapi/linux/bpf.h.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        tag: u64,
        jited_len: u32,
        xlated_len: u32,
        jited: u64,
        xlated: u64,
    }
    /// The part of `union bpf_attr` that `BPF_OBJ_GET_INFO_BY_FD` reads.
    #[repr(C)]
    struct GetInfo {
        fd: u32,
        info_len: u32,
        info: u64,
    }
    const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
    /// `BPF_JMP | BPF_CALL`; a source register of 0 marks the call of a helper.
    const CALL_OF_HELPER: [u8; 2] = [0x85, 0];
    let mut code = Vec::<u8>::new();
    // Once for the length, once for the code.
    for _ in 0..2 {
        let mut info = Info {
            xlated_len: code.len() as u32,
            xlated: if code.is_empty() {
                0
            } else {
                code.as_mut_ptr() as u64
            },
            ..Info::default()
        };
        let attr = GetInfo {
            fd: program.as_raw_fd() as u32,
            info_len: size_of::<Info>() as u32,
            info: (&raw mut info) as u64,
        };
        // SAFETY: live structs of the sizes passed; the kernel writes `info`, and `code` up to its length.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_OBJ_GET_INFO_BY_FD,
                &raw const attr,
                size_of::<GetInfo>(),
            )
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        code.resize(info.xlated_len as usize, 0);
    }
    let symbols = fs::read_to_string("/proc/kallsyms").unwrap();
    let symbols: BTreeMap<u64, &str> = symbols
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            Some((address, words.nth(1)?.split('\t').next()?))
        })
        .collect();
    let base = symbols.iter().find(|(_, name)| **name == "__bpf_call_base");
    let base = *base.expect("kallsyms has __bpf_call_base").0;
    // Helpers are called relative to that function.
    let calls = code
        .chunks_exact(8)
        .filter(|it| it[0] == CALL_OF_HELPER[0] && it[1] >> 4 == CALL_OF_HELPER[1]);
    calls
        .map(|it| {
            let offset = i32::from_le_bytes(it[4..].try_into().unwrap());
            let address = base.wrapping_add_signed(i64::from(offset));
            symbols
                .get(&address)
                .map_or_else(|| format!("{address:#x}"), |name| (*name).to_owned())
        })
        .collect()
}

#[test]
fn log_statements_are_pruned_unless_logging_is_requested() {
    let Some(bytes) = kernel_btf("log_statements_are_pruned_unless_logging_is_requested") else {
        return;
    };
    let fields = resolve(&Btf::parse(&bytes).unwrap());
    let mut without_bpf_loop = fields.clone();
    without_bpf_loop.helpers.bpf_loop = 0;
    let glance = Glance::load_with(&without_bpf_loop, true).unwrap();
    assert_eq!(glance.capabilities().log, Ok(()), "the bounded variants");
    let programs_that_log = |log_bpf| {
        let glance = Glance::load_with(&fields, log_bpf).unwrap();
        assert_eq!(
            glance.capabilities().log.is_ok(),
            log_bpf,
            "{:?}",
            glance.capabilities().log
        );
        let mut logging = BTreeSet::new();
        for (name, program) in glance.programs() {
            let calls = helper_calls(program);
            assert!(
                calls.contains("bpf_seq_write") || name.starts_with("batched"),
                "{name}: {calls:?}"
            );
            if calls
                .iter()
                .any(|call| call.contains("ringbuf") || call.contains("perf_event"))
            {
                logging.insert(name.to_owned());
            }
        }
        logging
    };
    assert_eq!(programs_that_log(false), BTreeSet::new());
    assert!(programs_that_log(true).contains("files"));
}

/// Lines that the agent prints on standard error with these arguments.
fn stderr_of(args: &[&str]) -> Vec<String> {
    let agent = env!("CARGO_BIN_EXE_tailback");
    let output = Command::new(agent).args(args).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    stderr.lines().map(str::to_owned).collect()
}

#[test]
fn log_bpf_prints_the_lines_of_the_programs_within_the_rate_limit() {
    let test = "log_bpf_prints_the_lines_of_the_programs_within_the_rate_limit";
    if kernel_btf(test).is_none() {
        return;
    }
    let own_pid = std::process::id().to_string();
    let sample = ["sample", "--pid", &own_pid];
    assert_eq!(stderr_of(&sample), Vec::<String>::new());
    let lines = stderr_of(&[&sample[..], &["--log-bpf"]].concat());
    let scan = format!("tailback: bpf: file scan: pid {own_pid} has ");
    assert!(
        lines.iter().any(|line| line.starts_with(&scan)),
        "{lines:?}"
    );

    // More than enough scans to exceed the limit, where there are more than a few processes.
    let began = Instant::now();
    let lines = stderr_of(&["diagnose", "--all", "--for", "2s", "--log-bpf"]);
    // The seconds of the limit are those of the clock: a partial one at either end.
    let seconds = began.elapsed().as_secs() + 2;
    let written = lines
        .iter()
        .filter(|line| line.contains("bpf: ") && !line.contains("suppressed"))
        .count() as u64;
    assert!(
        written > 0 && written <= seconds * LOG_LINES_PER_SECOND,
        "{written} in {seconds} s"
    );
}
