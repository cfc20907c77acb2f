//! Loading: what of it this kernel takes, and what has to be learned before the first walk.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::net::UnixDatagram,
    },
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    EbpfLoader,
    maps::{Array, HashMap, Map},
    programs::Iter,
};
use tailback_ebpf::{Layout, Types, Walk, Ways};

use super::{Glance, Record, link, run};
use crate::kernel::{
    btf::Btf,
    cast,
    iter::Over,
    layout::{self, Feature, Resolved},
    output_buffer::Shared,
    ring,
};

/// The kernel's own description of its types.
pub const BTF_PATH: &str = "/sys/kernel/btf/vmlinux";

/// What one read of an iterator returns at most (`PAGE_SIZE << 3` in kernel/bpf/bpf_iter.c), doubled.
const READ_BYTES: usize = 64 * 1024;

/// How long a busy socket stays marked.
const MARK_TTL_NS: u64 = 3_000_000_000;

/// Which way of looking the kernel lets us use, with the reason where it is not the best one.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Fields found in the kernel's BTF, and missing ones.
    pub fields: Resolved,
    /// `Err(why)`: every walk visits the whole machine.
    pub bound_to_process: Result<(), String>,
    /// `Err(why)`: listeners and suspicious sockets are seen by the walk over files alone.
    pub marked_sockets: Result<(), String>,
    /// `Err(why)`: what threads wait for is known by system call and arguments alone.
    pub user_memory: Result<(), String>,
    /// `Err(why)`: the verifier walks every round of the walk over an accept queue, and loading takes that long.
    pub kernel_loops: Result<(), String>,
    /// `Err(why)`: each file and thread is visited by itself.
    pub quick: Result<(), String>,
    /// `Err(why)`: rings of io_uring are not told from other files.
    pub rings: Result<(), String>,
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
struct WaysPod(Ways);
// SAFETY: `Ways` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for WaysPod {}

impl Glance {
    /// Loads the object into the running kernel.
    pub fn load() -> Result<Self> {
        let bytes = fs::read(BTF_PATH).with_context(|| {
            format!(
                "cannot read {BTF_PATH}: Tailback needs a kernel built with CONFIG_DEBUG_INFO_BTF"
            )
        })?;
        let btf = Btf::parse(&bytes).with_context(|| format!("cannot use {BTF_PATH}"))?;
        Self::load_with(layout::resolve(&btf))
    }

    /// Loads the object with the given offsets; the verifier refuses those that do not fit this kernel's types.
    pub fn load_with(fields: Resolved) -> Result<Self> {
        if let Some(missing) = fields
            .missing
            .iter()
            .find(|missing| missing.feature == Feature::Base)
        {
            return Err(anyhow!("this kernel cannot be watched: {missing}"));
        }
        let kernel_btf =
            aya::Btf::from_sys_fs().with_context(|| format!("cannot use {BTF_PATH}"))?;
        let mut object = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/glance")).to_vec();
        if let Some(function) = fields.cast {
            cast::resolve_calls(&mut object, function);
        }
        let layout = LayoutPod(fields.layout);
        let ways = WaysPod(fields.ways);
        let types = TypesPod(fields.types);
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&kernel_btf))
            .override_global("LAYOUT", &layout, true)
            .override_global("WAYS", &ways, true)
            .override_global("TYPES", &types, true)
            .load(&object)
            .context("cannot create the eBPF maps")?;
        let mut load = |name: &str, kind: &str| -> Result<()> {
            let program: &mut Iter = ebpf
                .program_mut(name)
                .with_context(|| format!("the eBPF object has no program {name}"))?
                .try_into()?;
            program
                .load(kind, &kernel_btf)
                .with_context(|| format!("the kernel refuses the iterator {name} (iter/{kind})"))
        };
        let kernel_loops = if fields.ways.bpf_loop == 1 {
            load("files", "task_file").map_err(|error| format!("{error:#}"))
        } else {
            Err("this kernel has no bpf_loop (5.17 has)".to_owned())
        };
        let (files_program, marked_program) = if kernel_loops.is_ok() {
            ("files", "marked")
        } else {
            load("files_bounded", "task_file")?;
            ("files_bounded", "marked_bounded")
        };
        load("holders", "task_file")?;
        load("operations", "task_file")?;
        load("threads", "task")?;
        load("census", "task")?;
        load("processes", "task")?;
        let marked = if fields.ways.marks == 1 {
            load(marked_program, "bpf_sk_storage_map").map_err(|error| format!("{error:#}"))
        } else {
            Err("this kernel's iterators have no socket-local storage (5.13 has)".to_owned())
        };
        let user_memory = if fields.ways.user_memory == 1 {
            load("waits_in_depth", "task").map_err(|error| format!("{error:#}"))
        } else {
            Err("this kernel's iterators cannot read user memory (5.18 can)".to_owned())
        };
        let waits_program = if user_memory.is_ok() {
            "waits_in_depth"
        } else {
            load("waits", "task")?;
            "waits"
        };
        let without = |feature| {
            let mut missing = fields.missing.iter();
            missing.find(|missing| missing.feature == feature)
        };
        let quick = if fields.cast.is_none() {
            Err("this kernel has no bpf_rdonly_cast (6.2 has)".to_owned())
        } else if let Some(missing) = [Feature::Quick, Feature::FileLimit, Feature::Rings]
            .into_iter()
            .find_map(without)
        {
            Err(missing.to_string())
        } else {
            load("quick_threads", "task")
                .and_then(|()| load("quick_files", "task"))
                .map_err(|error| format!("{error:#}"))
        };
        drop(kernel_btf);

        let all = |name: &str| {
            link(&ebpf, name, Over::All)
                .with_context(|| format!("cannot create the iterator {name}"))
        };
        let (holders, processes, census) = (all("holders")?, all("processes")?, all("census")?);
        // Made once to see that they can be; nobody is watched yet, and nothing is walked in vain.
        for name in [files_program, "threads", waits_program] {
            all(name).map(drop)?;
        }
        let marked = marked.and_then(|()| {
            let Some(Map::SkStorage(marks)) = ebpf.map("MARKS") else {
                return Err("the eBPF object has no map MARKS".to_owned());
            };
            let over = Over::Map(marks.fd().as_fd().as_raw_fd());
            link(&ebpf, marked_program, over).map_err(|error| error.to_string())
        });
        // Our own process is as good as any to see whether a walk can be bound to one.
        let bound_to_process = link(&ebpf, "threads", Over::Process(std::process::id()))
            .map(drop)
            .map_err(|error| {
                format!("this kernel cannot bind an iterator to a process (6.1 can): {error}")
            });
        let sheet = match (&quick, ebpf.map("SHEET")) {
            (Ok(()), Some(Map::Array(map))) => Some(Shared::new(map.fd().as_fd())?),
            _ => None,
        };
        let mut map = |name: &str| {
            ebpf.take_map(name)
                .with_context(|| format!("no map {name}"))
        };
        let targets = HashMap::try_from(map("TARGETS")?)?;
        let wanted = HashMap::try_from(map("WANTED")?)?;
        let walk = Array::try_from(map("WALK")?)?;
        let mut glance = Self {
            links: Vec::new(),
            marks_are_old: true,
            profile: Vec::new(),
            profile_is_bound: true,
            tasks: 0,
            holders,
            processes,
            census,
            files_program,
            waits_program,
            walk_settings: Walk {
                marks_left: 0,
                walk: 0,
                mark_ttl_ns: MARK_TTL_NS,
                ring_operations: 0,
                socket_operations: 0,
                own_tgid: 0,
                tgid: 0,
                is_watched: 0,
                flags: 0,
                limit: 0,
                open: 0,
                next_fd: 0,
                only_hot: 0,
                wanted: 0,
            },
            targets,
            wanted,
            wanted_keys: BTreeSet::new(),
            known: BTreeMap::new(),
            pids: BTreeMap::new(),
            walk,
            plan: Plan {
                fields,
                bound_to_process,
                marked_sockets: marked.as_ref().map(|_| ()).map_err(Clone::clone),
                user_memory,
                kernel_loops,
                quick: quick.clone(),
                rings: Err("not looked for yet".to_owned()),
            },
            marked: marked.ok(),
            sheet,
            buffer: vec![0; READ_BYTES].into_boxed_slice(),
            ebpf,
        };
        glance.plan.rings = glance.learn_rings().map_err(|error| format!("{error:#}"));
        if glance.plan.quick.is_ok() {
            glance.plan.quick = glance.learn_sockets().map_err(|error| format!("{error:#}"));
        }
        Ok(glance)
    }

    /// Learns by which operations a ring's file is told from others: by making one.
    fn learn_rings(&mut self) -> Result<()> {
        let ring = ring::probe().context("cannot make an io_uring instance to learn from")?;
        self.walk_settings.ring_operations = self.operations_of(ring.as_fd())?;
        Ok(())
    }

    /// As [`Glance::learn_rings`], of sockets' files.
    fn learn_sockets(&mut self) -> Result<()> {
        let socket = UnixDatagram::unbound().context("cannot make a socket to learn from")?;
        self.walk_settings.socket_operations = self.operations_of(socket.as_fd())?;
        Ok(())
    }

    /// The operations of a file of our own.
    fn operations_of(&mut self, file: BorrowedFd<'_>) -> Result<u64> {
        if !self.plan.fields.has(Feature::Rings) {
            bail!("the kernel's types do not say where the operations of a file are");
        }
        let own_pid = std::process::id();
        let mut own_tgid = 0;
        self.walk_processes(&mut |record| {
            if let Record::Process(process) = record
                && process.pid == own_pid
            {
                own_tgid = process.header.tgid;
            }
        })?;
        self.walk_settings.own_tgid = own_tgid;
        self.set_walk()?;
        let operations = link(&self.ebpf, "operations", Over::All)?;
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
            bail!("the agent does not find its own file");
        }
        Ok(found)
    }
}
