use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::{AsRawFd as _, BorrowedFd},
    process::Command,
    time::Instant,
};

use tailback::kernel::{btf::Btf, layout::resolve, scanner::Scanner};
use tailback_ebpf::LOG_LINES_PER_SECOND;

use crate::own_process::kernel_btf;

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
    let scanner = Scanner::load_with(&without_bpf_loop, true).unwrap();
    assert_eq!(scanner.capabilities().log, Ok(()), "the bounded variants");
    let programs_that_log = |log_bpf| {
        let scanner = Scanner::load_with(&fields, log_bpf).unwrap();
        assert_eq!(
            scanner.capabilities().log.is_ok(),
            log_bpf,
            "{:?}",
            scanner.capabilities().log
        );
        let mut logging = BTreeSet::new();
        for (name, program) in scanner.programs() {
            let calls = helper_calls(program);
            // The others write into maps.
            let writes_records = !name.starts_with("batched") && name != "page_offset";
            assert!(
                calls.contains("bpf_seq_write") || !writes_records,
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
