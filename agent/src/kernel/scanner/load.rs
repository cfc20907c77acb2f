//! Loads the eBPF object and finds out what this kernel supports.
//!
//! It tries each capability. A program that does not load is switched off, and [`Capabilities`] keeps the reason. Loading
//! fails only if processes cannot be listed, or if neither files nor threads can be scanned.

mod capabilities;
mod file_operations;
mod object;
mod page_offset;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::maps::{Array, HashMap, Map};
use bytemuck::Zeroable as _;
pub use capabilities::{Capabilities, Capability};
use object::{Object, ProgramChoice, missing_part, off};
use tailback_ebpf::Scan;

use super::{Scanner, link};
use crate::kernel::{
    LoadError,
    btf::Btf,
    hooks::Hooks,
    iter::{IterScope, Link},
    layout::{self, Feature, Resolved},
    log::{self, BpfLog},
    output_buffer::SharedBuffer,
};

/// The kernel's description of its own types.
pub const BTF_PATH: &str = "/sys/kernel/btf/vmlinux";

/// Size of the read buffer, bytes: twice the most that one read of an iterator returns (`PAGE_SIZE << 3`,
/// kernel/bpf/bpf_iter.c).
const READ_BYTES: usize = 64 * 1024;

/// How long a busy socket stays in `FOCUSED_SOCKETS` unless a file scan renews it, ns.
const FOCUSED_SOCKET_TTL_NS: u64 = 3_000_000_000;

/// What to load besides the iterators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Debug lines (see `kernel/log.rs`).
    pub log_bpf: bool,
    /// The hooks that measure waits (see `kernel/hooks.rs`). They are loaded, not attached.
    pub hooks: bool,
}

impl Scanner {
    /// Loads the object into the running kernel.
    pub fn load(options: LoadOptions) -> Result<Self, LoadError> {
        let bytes = fs::read(BTF_PATH).map_err(LoadError::NoBtf)?;
        let btf = Btf::parse(&bytes).map_err(|error| LoadError::BadBtf(error.into()))?;
        Self::load_fields(&layout::resolve(&btf), options)
    }

    /// Loads the object with the given offsets. The verifier rejects those that do not fit this kernel's types.
    ///
    /// An old verifier may reject programs because of their log statements. If fewer programs load with log statements
    /// than without, the log statements are left out.
    pub fn load_with(fields: &Resolved, log_bpf: bool) -> Result<Self, LoadError> {
        let options = LoadOptions {
            log_bpf,
            ..LoadOptions::default()
        };
        Self::load_fields(fields, options)
    }

    /// Hooks are optional: if the object does not load with them, for want of memory for their maps for example, it is loaded without.
    fn load_fields(fields: &Resolved, options: LoadOptions) -> Result<Self, LoadError> {
        match Self::load_logging(fields, options) {
            Err(error) if options.hooks => {
                let without_hooks = LoadOptions {
                    hooks: false,
                    ..options
                };
                let mut scanner = Self::load_logging(fields, without_hooks)?;
                scanner.capabilities.hooks = Err(off(error));
                Ok(scanner)
            }
            result => result,
        }
    }

    fn load_logging(fields: &Resolved, options: LoadOptions) -> Result<Self, LoadError> {
        let missing = fields.missing_for(Feature::Base);
        if let Some(missing) = missing {
            return Err(LoadError::MissingField(missing.clone()));
        }
        let without_log = LoadOptions {
            log_bpf: false,
            ..options
        };
        if !options.log_bpf {
            return Self::try_load(fields, without_log).0;
        }
        let (logging, rejected) = Self::try_load(fields, options);
        let Some(reason) = rejected.first() else {
            return logging;
        };
        let (quiet, rejected_anyway) = Self::try_load(fields, without_log);
        if rejected_anyway.len() >= rejected.len() {
            return logging;
        }
        quiet.map(|mut scanner| {
            scanner.capabilities.log = Err(reason.clone());
            scanner
        })
    }

    /// One attempt. Also returns the reasons of programs that the verifier rejected.
    fn try_load(fields: &Resolved, options: LoadOptions) -> (Result<Self, LoadError>, Vec<String>) {
        let mut object = match Object::open(fields, options) {
            Ok(object) => object,
            Err(error) => return (Err(error), Vec::new()),
        };
        let loaded = LoadedPrograms::load(&mut object, fields, options);
        let rejected = std::mem::take(&mut object.rejected);
        let scanner =
            loaded.and_then(|loaded| loaded.into_scanner(object, fields, options.log_bpf));
        (scanner, rejected)
    }
}

/// The programs that loaded, and their links.
struct LoadedPrograms {
    processes: Link,
    threads: Result<Link, String>,
    files: ProgramChoice,
    waits: Capability,
    user_memory: Capability,
    holders: Result<Link, String>,
    cpu_times: Result<Link, String>,
    cgroups: Capability,
    focused_sockets: Result<Link, String>,
    file_operations: Capability,
    batched_scans: Capability,
    hooks: Result<Hooks, String>,
}

impl LoadedPrograms {
    fn load(
        object: &mut Object,
        fields: &Resolved,
        options: LoadOptions,
    ) -> Result<Self, LoadError> {
        let processes = object.load_over_all("processes", "task")?;
        let threads = object.load_over_all("threads", "task");
        let no_bpf_loop = (fields.helpers.bpf_loop == 0)
            .then_some("bpf_loop is not available (needs Linux 5.17)");
        let mut files =
            ProgramChoice::load(object, "task_file", ["files", "files_bounded"], no_bpf_loop);
        files.check_link(object);
        let (threads, files) = match (threads, files) {
            (
                Err(_),
                ProgramChoice {
                    any: Err(error), ..
                },
            ) => return Err(error),
            (threads, files) => (threads.map_err(off), files),
        };
        // This only checks that the program can be linked: each process gets a link of its own.
        let waits = object.load_over_all("waits", "task").map(drop);
        let focused_sockets = load_focused_sockets(object, fields, files.better.is_ok());
        Ok(Self {
            processes,
            threads,
            files,
            waits: waits.map_err(off),
            user_memory: load_user_memory(object, fields),
            holders: object.load_over_all("holders", "task_file").map_err(off),
            cpu_times: object.load_over_all("cpu_times", "task").map_err(off),
            cgroups: object.load("cgroups", "task").map_err(off),
            focused_sockets,
            file_operations: object.load("file_operations", "task_file").map_err(off),
            batched_scans: load_batched_scans(object, fields),
            hooks: if options.hooks {
                object.load_hooks().map_err(off)
            } else {
                Err("not requested (--tier glance)".to_owned())
            },
        })
    }

    fn into_scanner(
        self,
        mut object: Object,
        fields: &Resolved,
        log_bpf: bool,
    ) -> Result<Scanner, LoadError> {
        // Try a bound iterator on the agent's own process: any would do.
        let bound_to_process = link(
            &object.ebpf,
            "processes",
            IterScope::Process(std::process::id()),
        )
        .map(drop)
        .map_err(|error| {
            format!("iterators cannot be bound to a process (needs Linux 6.1): {error}")
        });
        let mut batched_scans = self.batched_scans;
        let output = match (&batched_scans, object.ebpf.map("OUTPUT")) {
            (Ok(()), Some(Map::Array(map))) => match SharedBuffer::new(map.fd().as_fd()) {
                Ok(output) => Some(output),
                Err(error) => {
                    batched_scans = Err(format!("cannot map the output buffer: {error}"));
                    None
                }
            },
            _ => None,
        };
        let (log, log_capability) = if log_bpf {
            match BpfLog::new(&mut object.ebpf) {
                Ok(log) => (Some(log), Ok(())),
                Err(error) => (None, Err(format!("{error:#}"))),
            }
        } else {
            // Nothing writes to it, and nothing will read it.
            drop(object.ebpf.take_map(log::LOG_MAP));
            (None, Err("not requested".to_owned()))
        };
        let state = |link: &Result<Link, String>| link.as_ref().map(drop).map_err(Clone::clone);
        let capabilities = Capabilities {
            fields: fields.clone(),
            threads: state(&self.threads),
            waits: self.waits,
            holders: state(&self.holders),
            cpu_times: state(&self.cpu_times),
            cgroups: self.cgroups,
            focused_sockets: state(&self.focused_sockets),
            files: self.files.any.map_err(off),
            bound_to_process,
            user_memory: self.user_memory,
            bpf_loop: self.files.better.clone(),
            batched_scans,
            rings: self.file_operations.clone(),
            epolls: match no_ready_files(fields) {
                None => self.file_operations.and(self.files.better),
                Some(reason) => Err(reason),
            },
            log: log_capability,
            hooks: self.hooks.as_ref().map(drop).map_err(Clone::clone),
        };
        let mut scanner = Scanner {
            links: Vec::new(),
            hooks: self.hooks.ok(),
            focus_is_stale: true,
            profile: Vec::new(),
            profile_is_bound: true,
            host_threads: 0,
            holders: self.holders.ok(),
            processes: self.processes,
            cpu_times: self.cpu_times.ok(),
            files_program: self.files.program,
            scan_settings: Scan {
                focus_ttl_ns: FOCUSED_SOCKET_TTL_NS,
                ..Scan::zeroed()
            },
            targets: object.map::<HashMap<_, _, _>>("TARGETS")?,
            requested_peers: object.map::<HashMap<_, _, _>>("PEER_PORTS")?,
            peer_keys: BTreeSet::new(),
            watched: BTreeMap::new(),
            pids: BTreeMap::new(),
            scan: object.map::<Array<_, _>>("SCAN")?,
            capabilities,
            focused_sockets: self.focused_sockets.ok(),
            output,
            buffer: vec![0; READ_BYTES].into_boxed_slice(),
            log,
            ebpf: object.ebpf,
        };
        scanner.learn_file_operations();
        scanner.learn_page_offset();
        Ok(scanner)
    }
}

/// Why the ready files of epoll instances cannot be counted on this kernel.
fn no_ready_files(fields: &Resolved) -> Option<String> {
    if fields.helpers.bpf_loop == 0 {
        return Some("bpf_loop is not available (needs Linux 5.17)".to_owned());
    }
    let needed = [Feature::EpollReady, Feature::Rings, Feature::Pipes];
    let mut missing = needed.into_iter().filter_map(|it| fields.missing_for(it));
    missing.next().map(ToString::to_string)
}

/// The scan over socket-local storage needs both the storage and an iterator bound to its map.
fn load_focused_sockets(
    object: &mut Object,
    fields: &Resolved,
    has_bpf_loop: bool,
) -> Result<Link, String> {
    if fields.helpers.sk_storage == 0 {
        return Err("iterators have no socket-local storage (needs Linux 5.13)".to_owned());
    }
    let program = if has_bpf_loop {
        "focused_sockets"
    } else {
        "focused_sockets_bounded"
    };
    object.load(program, "bpf_sk_storage_map").map_err(off)?;
    let Some(Map::SkStorage(map)) = object.ebpf.map("FOCUSED_SOCKETS") else {
        return Err(off(missing_part("FOCUSED_SOCKETS")));
    };
    let over = IterScope::Map(map.fd().as_fd().as_raw_fd());
    object.link(program, over).map_err(off)
}

fn load_user_memory(object: &mut Object, fields: &Resolved) -> Capability {
    if let Some(missing) = fields.missing_for(Feature::UserMemory) {
        return Err(missing.to_string());
    }
    object.load("page_offset", "task").map_err(off)
}

fn load_batched_scans(object: &mut Object, fields: &Resolved) -> Capability {
    if fields.cast.is_none() {
        return Err("bpf_rdonly_cast is not available (needs Linux 6.2)".to_owned());
    }
    let needed = [Feature::BatchedScans, Feature::FileLimit, Feature::Rings];
    let mut missing = needed.into_iter().filter_map(|it| fields.missing_for(it));
    if let Some(missing) = missing.next() {
        return Err(missing.to_string());
    }
    object.load("batched_threads", "task").map_err(off)?;
    object.load("batched_files", "task").map_err(off)
}
