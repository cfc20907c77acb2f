//! Loads the eBPF object and finds out what this kernel supports.
//!
//! It tries each capability. A program that does not load is switched off, and [`Capabilities`] keeps the reason. Loading
//! fails only if processes cannot be listed, or if neither files nor threads can be scanned.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::net::UnixDatagram,
    },
};

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map},
    programs::Iter,
};
use bytemuck::Zeroable as _;
use tailback_ebpf::{Helpers, Layout, Scan, Types};

use super::{Glance, Record, link, run};
use crate::kernel::{
    LoadError,
    btf::Btf,
    cast,
    iter::{IterScope, Link},
    layout::{self, Feature, Resolved},
    log::{self, BpfLog},
    output_buffer::SharedBuffer,
    ring,
};

/// The kernel's description of its own types.
pub const BTF_PATH: &str = "/sys/kernel/btf/vmlinux";

/// Size of the read buffer, bytes: twice the most that one read of an iterator returns (`PAGE_SIZE << 3`,
/// kernel/bpf/bpf_iter.c).
const READ_BYTES: usize = 64 * 1024;

/// How long a busy socket stays in `FOCUSED_SOCKETS` unless a file scan renews it, ns.
const FOCUSED_SOCKET_TTL_NS: u64 = 3_000_000_000;

/// Whether a capability works on this kernel; `Err` is the reason for the user.
pub type Capability = Result<(), String>;

/// What works on this kernel, and why the rest does not.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// Fields found in the kernel's BTF, and missing ones.
    pub fields: Resolved,
    /// Scanning open files. Without it no socket or pipe is watched.
    pub files: Capability,
    /// Scanning threads. Without it no run queue is watched.
    pub threads: Capability,
    /// What threads are blocked on. Without it workers, event loops, locks and disks are not watched.
    pub waits: Capability,
    /// Which process holds the other end of a connection, pipe or unix socket. Without it no wait is followed to another process.
    pub holders: Capability,
    /// CPU time of every thread on the host. Without it the process that starves a target is not named.
    pub cpu_times: Capability,
    /// Iterators bound to one process. Without it every scan visits the whole host.
    pub bound_to_process: Capability,
    /// The scan of focused sockets. Without it listeners and busy sockets are seen by the file scan only.
    pub focused_sockets: Capability,
    /// Reading user memory. Without it only the system call of a blocked thread and its arguments are known.
    pub user_memory: Capability,
    /// `bpf_loop`. Without it the verifier checks every iteration of the accept queue loop, which slows down loading.
    pub bpf_loop: Capability,
    /// Batched scans. Without it the kernel visits each file and thread separately.
    pub batched_scans: Capability,
    /// Recognising io_uring files.
    pub rings: Capability,
    /// Debug lines of the programs (`--log-bpf`).
    pub log: Capability,
}

impl Capabilities {
    /// Scans that this kernel should run but does not, with the reason. `tailback doctor` shows the optional rest.
    pub fn failed_scans(&self) -> Vec<(&'static str, &str)> {
        let scans = [
            ("open files", &self.files),
            ("threads", &self.threads),
            ("what threads wait for", &self.waits),
            (
                "who holds the other end of a connection or pipe",
                &self.holders,
            ),
            ("CPU time of all threads", &self.cpu_times),
        ];
        let failed = scans.into_iter().filter_map(|(scan, capability)| {
            let reason = capability.as_ref().err()?;
            Some((scan, reason.as_str()))
        });
        failed.collect()
    }
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct LayoutPod(Layout);
// SAFETY: `Layout` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for LayoutPod {}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct TypesPod(Types);
// SAFETY: `Types` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for TypesPod {}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct HelpersPod(Helpers);
// SAFETY: `Helpers` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for HelpersPod {}

/// The object with its maps created, while its programs are being loaded.
struct Object {
    ebpf: Ebpf,
    kernel_btf: aya::Btf,
    /// Reasons of programs that the verifier rejected. Their number shows whether logging costs programs.
    rejected: Vec<String>,
}

impl Object {
    /// Resolves the object for this kernel and creates its maps.
    fn open(fields: &Resolved, log_bpf: bool) -> Result<Self, LoadError> {
        let kernel_btf =
            aya::Btf::from_sys_fs().map_err(|error| LoadError::BadBtf(error.into()))?;
        let mut object = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/glance")).to_vec();
        if let Some(kfunc) = fields.cast {
            cast::resolve_calls(&mut object, kfunc);
        }
        let layout = LayoutPod(fields.layout);
        let helpers = HelpersPod(fields.helpers);
        let types = TypesPod(fields.types);
        let log_level = log::level(log_bpf);
        let mut loader = EbpfLoader::new();
        loader
            .btf(Some(&kernel_btf))
            .override_global("LAYOUT", &layout, true)
            .override_global("HELPERS", &helpers, true)
            .override_global("TYPES", &types, true)
            .override_global(log::LEVEL_GLOBAL, &log_level, true);
        if !log_bpf {
            // Every map of the object is created; aya rounds this one up to a page.
            loader.map_max_entries(log::LOG_MAP, 1);
        }
        let ebpf = loader
            .load(&object)
            .map_err(|error| LoadError::new("cannot create the eBPF maps", error))?;
        Ok(Self {
            ebpf,
            kernel_btf,
            rejected: Vec::new(),
        })
    }

    /// Loads one iterator. `target` is what the kernel iterates over, as in `iter/target`.
    fn load(&mut self, program: &'static str, target: &str) -> Result<(), LoadError> {
        let iter: &mut Iter = self
            .ebpf
            .program_mut(program)
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| missing_part(program))?;
        iter.load(target, &self.kernel_btf).map_err(|error| {
            let error = LoadError::of_program(program, error);
            if let LoadError::Rejected { .. } | LoadError::KernelTooOld { .. } = error {
                self.rejected.push(error.to_string());
            }
            error
        })
    }

    /// Loads one iterator and creates a link over everything it can visit.
    fn load_over_all(&mut self, program: &'static str, target: &str) -> Result<Link, LoadError> {
        self.load(program, target)?;
        self.link(program, IterScope::All)
    }

    fn link(&self, program: &'static str, over: IterScope) -> Result<Link, LoadError> {
        link(&self.ebpf, program, over)
            .map_err(|error| LoadError::new(format!("cannot create the iterator {program}"), error))
    }

    /// Takes a map out of the object.
    fn map<T: TryFrom<Map, Error = aya::maps::MapError>>(
        &mut self,
        name: &'static str,
    ) -> Result<T, LoadError> {
        let map = self.ebpf.take_map(name).ok_or_else(|| missing_part(name))?;
        T::try_from(map)
            .map_err(|error| LoadError::new(format!("cannot use the eBPF map {name}"), error))
    }
}

/// The object was built without a program or map that the agent needs: a bug.
fn missing_part(name: &str) -> LoadError {
    LoadError::new(
        "cannot use the eBPF object",
        format!("it does not contain {name}"),
    )
}

/// An error with its causes, as the reason why a capability is off.
fn off(error: LoadError) -> String {
    format!("{:#}", anyhow::Error::new(error))
}

/// A scan for which there are two programs, and which of them loaded.
struct ProgramChoice {
    program: &'static str,
    /// Whether the better one works.
    better: Capability,
    /// Whether any works.
    any: Result<(), LoadError>,
}

impl ProgramChoice {
    /// Loads `better` unless this kernel lacks what it needs, which `lacking` names. If it does not load, loads `fallback`.
    fn load(
        object: &mut Object,
        target: &str,
        [better, fallback]: [&'static str; 2],
        lacking: Option<&str>,
    ) -> Self {
        let loaded = match lacking {
            Some(reason) => Err(reason.to_owned()),
            None => object.load(better, target).map_err(off),
        };
        if loaded.is_ok() {
            return Self {
                program: better,
                better: loaded,
                any: Ok(()),
            };
        }
        Self {
            program: fallback,
            better: loaded,
            any: object.load(fallback, target),
        }
    }

    /// Checks that a link can be created, without running the scan.
    fn check_link(&mut self, object: &Object) {
        if self.any.is_ok() {
            self.any = object.link(self.program, IterScope::All).map(drop);
        }
    }
}

impl Glance {
    /// Loads the object into the running kernel. `log_bpf`: with debug lines (see `kernel/log.rs`).
    pub fn load(log_bpf: bool) -> Result<Self, LoadError> {
        let bytes = fs::read(BTF_PATH).map_err(LoadError::NoBtf)?;
        let btf = Btf::parse(&bytes).map_err(|error| LoadError::BadBtf(error.into()))?;
        Self::load_with(&layout::resolve(&btf), log_bpf)
    }

    /// Loads the object with the given offsets. The verifier rejects those that do not fit this kernel's types.
    ///
    /// An old verifier may reject programs because of their log statements. If fewer programs load with them, they are left out.
    pub fn load_with(fields: &Resolved, log_bpf: bool) -> Result<Self, LoadError> {
        let missing = fields.missing_for(Feature::Base);
        if let Some(missing) = missing {
            return Err(LoadError::MissingField(missing.clone()));
        }
        if !log_bpf {
            return Self::try_load(fields, false).0;
        }
        let (logging, rejected) = Self::try_load(fields, true);
        let Some(reason) = rejected.first() else {
            return logging;
        };
        let (quiet, rejected_anyway) = Self::try_load(fields, false);
        if rejected_anyway.len() >= rejected.len() {
            return logging;
        }
        quiet.map(|mut glance| {
            glance.capabilities.log = Err(reason.clone());
            glance
        })
    }

    /// One attempt. Also returns the reasons of programs that the verifier rejected.
    fn try_load(fields: &Resolved, log_bpf: bool) -> (Result<Self, LoadError>, Vec<String>) {
        let mut object = match Object::open(fields, log_bpf) {
            Ok(object) => object,
            Err(error) => return (Err(error), Vec::new()),
        };
        let loaded = LoadedPrograms::load(&mut object, fields);
        let rejected = std::mem::take(&mut object.rejected);
        let glance = loaded.and_then(|loaded| loaded.into_glance(object, fields, log_bpf));
        (glance, rejected)
    }
}

/// The programs that loaded, and their links.
struct LoadedPrograms {
    processes: Link,
    threads: Result<Link, String>,
    files: ProgramChoice,
    waits: ProgramChoice,
    holders: Result<Link, String>,
    cpu_times: Result<Link, String>,
    focused_sockets: Result<Link, String>,
    file_operations: Capability,
    batched_scans: Capability,
}

impl LoadedPrograms {
    fn load(object: &mut Object, fields: &Resolved) -> Result<Self, LoadError> {
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
        let no_user_memory = (fields.helpers.user_memory == 0)
            .then_some("bpf_copy_from_user_task is not available (needs Linux 5.18)");
        let mut waits =
            ProgramChoice::load(object, "task", ["waits_sleepable", "waits"], no_user_memory);
        waits.check_link(object);
        let focused_sockets = load_focused_sockets(object, fields, files.better.is_ok());
        Ok(Self {
            processes,
            threads,
            files,
            waits,
            holders: object.load_over_all("holders", "task_file").map_err(off),
            cpu_times: object.load_over_all("cpu_times", "task").map_err(off),
            focused_sockets,
            file_operations: object.load("file_operations", "task_file").map_err(off),
            batched_scans: load_batched_scans(object, fields),
        })
    }

    fn into_glance(
        self,
        mut object: Object,
        fields: &Resolved,
        log_bpf: bool,
    ) -> Result<Glance, LoadError> {
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
            waits: self.waits.any.map_err(off),
            holders: state(&self.holders),
            cpu_times: state(&self.cpu_times),
            focused_sockets: state(&self.focused_sockets),
            files: self.files.any.map_err(off),
            bound_to_process,
            user_memory: self.waits.better,
            bpf_loop: self.files.better,
            batched_scans,
            rings: self.file_operations,
            log: log_capability,
        };
        let mut glance = Glance {
            links: Vec::new(),
            focus_is_stale: true,
            profile: Vec::new(),
            profile_is_bound: true,
            host_threads: 0,
            holders: self.holders.ok(),
            processes: self.processes,
            cpu_times: self.cpu_times.ok(),
            files_program: self.files.program,
            waits_program: self.waits.program,
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
        glance.learn_file_operations();
        Ok(glance)
    }
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

impl Glance {
    /// Learns the addresses of the `file_operations` of sockets and io_uring instances. A capability whose address cannot be
    /// learned is switched off.
    fn learn_file_operations(&mut self) {
        if self.capabilities.rings.is_ok() {
            self.capabilities.rings = self.learn_rings().map_err(|error| format!("{error:#}"));
        }
        if self.capabilities.batched_scans.is_ok() {
            self.capabilities.batched_scans =
                self.learn_sockets().map_err(|error| format!("{error:#}"));
        }
    }

    /// Learns the `file_operations` of io_uring by creating an instance.
    fn learn_rings(&mut self) -> Result<()> {
        let ring = ring::probe().context("cannot create an io_uring instance to probe")?;
        self.scan_settings.ring_operations = self.operations_of(ring.as_fd())?;
        Ok(())
    }

    /// Learns the `file_operations` of sockets by creating one.
    fn learn_sockets(&mut self) -> Result<()> {
        let socket = UnixDatagram::unbound().context("cannot create a socket to probe")?;
        self.scan_settings.socket_operations = self.operations_of(socket.as_fd())?;
        Ok(())
    }

    /// The address of the `file_operations` of one of the agent's own files.
    fn operations_of(&mut self, file: BorrowedFd<'_>) -> Result<u64> {
        if !self.capabilities.fields.has(Feature::Rings) {
            bail!("BTF does not describe the operations of a file");
        }
        let own_pid = std::process::id();
        let mut own_tgid = 0;
        self.scan_processes(&mut |record| {
            if let Record::Process(process) = record
                && process.pid == own_pid
            {
                own_tgid = process.header.tgid;
            }
        })?;
        self.scan_settings.own_tgid = own_tgid;
        self.write_scan_settings()?;
        let operations = link(&self.ebpf, "file_operations", IterScope::All)?;
        let wanted = file.as_raw_fd() as u32;
        let mut found = 0;
        run(&operations, &mut self.buffer, &mut |record| {
            if let Record::Operations(file) = record
                && file.fd == wanted
            {
                found = file.operations;
            }
        })?;
        if found == 0 {
            bail!("the scan did not find the agent's own file");
        }
        Ok(found)
    }
}
