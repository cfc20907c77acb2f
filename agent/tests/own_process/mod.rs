//! Scans of the test's own process.

use std::{fs, os::unix::fs::MetadataExt as _, process};

use tailback::kernel::{
    layout::Resolved,
    scanner::{BTF_PATH, Record, Scanner, Watched},
};

/// The kernel's BTF. `None`, with an entry in the log of skipped tests, if programs cannot be loaded here.
pub fn kernel_btf(test: &str) -> Option<Vec<u8>> {
    let is_root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    if !is_root {
        tailback_tests::skip::skip(test, "loading eBPF programs needs root");
        return None;
    }
    match fs::read(BTF_PATH) {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            tailback_tests::skip::skip(test, &format!("{BTF_PATH}: {error}"));
            None
        }
    }
}

/// Loads the programs with these fields and watches the test's own process.
pub fn watch_own_process(fields: &Resolved) -> Scanner {
    let mut scanner = Scanner::load_with(fields, false).unwrap_or_else(|error| panic!("{error:#}"));
    let mut watched = None;
    scanner
        .scan_processes(&mut |record| {
            if let Record::Process(seen) = record
                && seen.pid == process::id()
            {
                watched = Some(Watched {
                    tgid: seen.header.tgid,
                    pid: seen.pid,
                    start_ns: seen.start_ns,
                });
            }
        })
        .unwrap();
    scanner
        .watch(&[watched.expect("the scan shows this process")])
        .unwrap();
    scanner
}
