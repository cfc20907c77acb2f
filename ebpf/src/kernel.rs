//! Reads kernel objects, and defines what all programs share: the field layout, the maps, the output sink.

use aya_ebpf::{
    bindings::seq_file,
    btf_maps::{Array, HashMap, SkStorage},
    helpers::generated::{
        bpf_get_current_task, bpf_get_current_task_btf, bpf_ktime_get_ns, bpf_probe_read_kernel,
        bpf_seq_write,
    },
    macros::btf_map,
};
use tailback_ebpf::{
    FocusedSocket, Helpers, Layout, MAX_REQUESTED_PEERS, Processor, Scan, TargetEntry,
};

use crate::log::debug;

/// The agent overrides it before loading; the kernel then freezes it as read-only data.
#[unsafe(no_mangle)]
static LAYOUT: Layout = Layout::EMPTY;

/// Overridden and frozen like `LAYOUT`. The default assumes no optional helper.
#[unsafe(no_mangle)]
static HELPERS: Helpers = Helpers {
    typed_sockets: 0,
    cookies: 0,
    sk_storage: 0,
    current_task: 0,
    task_registers: 0,
    bpf_loop: 0,
};

/// Overridden and frozen like `LAYOUT`.
#[unsafe(no_mangle)]
static PROCESSOR: Processor = Processor::NONE;

/// Watched processes, by tgid in the initial pid namespace. `Scanner::watch` fails beyond the capacity.
#[btf_map]
pub static TARGETS: HashMap<u32, TargetEntry, 16384> = HashMap::new();

/// Settings and progress of the current scan.
#[btf_map]
pub static SCAN: Array<Scan, 1> = Array::new();

/// Connections whose holders the agent requests, by their ports (`peer_key`); values are unused.
#[btf_map]
pub static PEER_PORTS: HashMap<u32, u32, MAX_REQUESTED_PEERS> = HashMap::new();

/// The sockets that every sample polls: listeners, and busy sockets of focused targets.
#[btf_map]
pub static FOCUSED_SOCKETS: SkStorage<FocusedSocket> = SkStorage::new();

/// The frozen layout. Each field is read where it is used, so that the verifier sees a constant there.
pub fn layout() -> *const Layout {
    &raw const LAYOUT
}

/// Like [`layout`], for the optional helpers.
pub fn helpers() -> *const Helpers {
    &raw const HELPERS
}

/// Like [`layout`], for what depends on the processor.
pub fn processor_values() -> *const Processor {
    &raw const PROCESSOR
}

/// A value that depends on the processor. The verifier sees a constant.
macro_rules! processor {
    ($field:ident) => {
        // SAFETY: PROCESSOR is a live static; the read is volatile because the loader rewrites it.
        unsafe { core::ptr::read_volatile(&raw const (*$crate::kernel::processor_values()).$field) }
    };
}

/// Orders all loads before it before all loads after it. x86-64 does so by itself.
///
/// eBPF has no instruction for it that all kernels know. But `bpf_ktime_get_ns` reads under a sequence counter
/// (`__ktime_get_fast_ns`, kernel/time/timekeeping.c, in 5.10 as in 7.2), and ends with `smp_rmb`, `dmb ishld` on aarch64.
#[inline(always)]
pub fn read_barrier() {
    if processor!(is_aarch64) != 0 {
        // SAFETY: no arguments.
        unsafe { bpf_ktime_get_ns() };
    }
}

/// Whether this kernel has an optional helper. The verifier prunes the branch not taken, and with it any call of a helper
/// that the kernel does not know.
macro_rules! has_helper {
    ($helper:ident) => {
        // SAFETY: HELPERS is a live static; the read is volatile because the loader rewrites it.
        unsafe { core::ptr::read_volatile(&raw const (*$crate::kernel::helpers()).$helper) } != 0
    };
}

/// The offset of a kernel field. The read is volatile: otherwise the compiler would use the value before the override.
macro_rules! offset {
    ($field:ident) => {
        // SAFETY: LAYOUT is a live static; the read is volatile because the loader rewrites it.
        unsafe { core::ptr::read_volatile(&raw const (*$crate::kernel::layout()).$field) }
    };
}

/// Loads a field of type `$ty` through a pointer whose kernel type the verifier knows. It rejects an offset or size that
/// does not fit that type, so a wrong layout cannot read the wrong field.
macro_rules! load {
    ($base:expr, $field:ident, $ty:ty) => {{
        let at = $base
            .wrapping_add($crate::kernel::offset!($field) as usize)
            .cast::<$ty>();
        // SAFETY: a BTF-typed kernel pointer; the kernel handles a fault in such a load.
        unsafe { core::ptr::read_volatile(at) }
    }};
}

/// Like `load!`, but yields `$absent` if this kernel has no such field; the verifier prunes the load.
macro_rules! load_or {
    ($base:expr, $field:ident, $ty:ty, $absent:expr) => {
        if $crate::kernel::offset!($field) == tailback_ebpf::ABSENT {
            $absent
        } else {
            $crate::kernel::load!($base, $field, $ty)
        }
    };
}

/// Reads a field of type `$ty` through an address whose kernel type the verifier does not know: nothing but BTF vouches for
/// the offset. A bad address yields zeroes.
macro_rules! probe {
    ($base:expr, $field:ident, $ty:ty) => {
        $crate::kernel::probe_at::<$ty>($base, u64::from($crate::kernel::offset!($field)))
    };
}

/// Reads a socket field by a typed load, or by a probe read on kernels without typed sockets.
macro_rules! load_sk {
    ($base:expr, $field:ident, $ty:ty) => {
        if $crate::kernel::has_helper!(typed_sockets) {
            $crate::kernel::load!($base, $field, $ty)
        } else {
            $crate::kernel::probe!($base, $field, $ty)
        }
    };
}

/// Like `load_sk!`, but yields `$absent` if this kernel has no such field.
macro_rules! load_sk_or {
    ($base:expr, $field:ident, $ty:ty, $absent:expr) => {
        if $crate::kernel::offset!($field) == tailback_ebpf::ABSENT {
            $absent
        } else {
            $crate::kernel::load_sk!($base, $field, $ty)
        }
    };
}

/// Reads a field of an object that belongs to a `Sock`, through `$base`. Like `load_sk!`, but also falls back to a probe read
/// for a socket whose type the verifier does not know.
macro_rules! read_sk {
    ($sock:expr, $base:expr, $field:ident, $ty:ty) => {
        if $sock.is_typed && $crate::kernel::has_helper!(typed_sockets) {
            $crate::kernel::load!($base, $field, $ty)
        } else {
            $crate::kernel::probe!($base, $field, $ty)
        }
    };
}

/// Like `read_sk!`, but yields `$absent` if this kernel has no such field.
macro_rules! read_sk_or {
    ($sock:expr, $base:expr, $field:ident, $ty:ty, $absent:expr) => {
        if $crate::kernel::offset!($field) == tailback_ebpf::ABSENT {
            $absent
        } else {
            $crate::kernel::read_sk!($sock, $base, $field, $ty)
        }
    };
}

pub(crate) use {
    has_helper, load, load_or, load_sk, load_sk_or, offset, probe, processor, read_sk, read_sk_or,
};

/// Plain old data: every bit pattern is valid.
pub trait Plain: Copy {
    const ZERO: Self;
}

macro_rules! plain {
    ($($ty:ty = $zero:expr),*) => { $(impl Plain for $ty { const ZERO: Self = $zero; })* };
}

plain!(u8 = 0, u16 = 0, u32 = 0, u64 = 0, [u64; 2] = [0; 2], *const u8 = core::ptr::null());

/// Reads a value at `base + offset`; a bad address yields zeroes.
#[inline(always)]
pub fn probe_at<T: Plain>(base: *const u8, offset: u64) -> T {
    let mut value = T::ZERO;
    // SAFETY: the helper checks the address and zero-fills `value` if it is bad; every bit pattern is a valid `T`.
    unsafe {
        bpf_probe_read_kernel(
            (&raw mut value).cast(),
            size_of::<T>() as u32,
            base.wrapping_add(offset as usize).cast(),
        )
    };
    value
}

/// The id of a task in the pid namespace at `level` (0: the initial one).
#[inline(always)]
pub fn pid_at(pid: *const u8, level: u32) -> u32 {
    let at = u64::from(offset!(pid_numbers))
        + u64::from(level & 31) * u64::from(offset!(upid_size))
        + u64::from(offset!(upid_nr));
    // Typed loads need constant offsets, so an array indexed by a run-time value takes a probe read.
    // Before 6.10 the verifier loses the bounds of such a product; the mask restores them.
    probe_at(pid, at & 0xfff)
}

/// The nesting level of the reader's pid namespace: an iterator runs in the task that reads from it.
#[inline(always)]
pub fn reader_level() -> u32 {
    if has_helper!(current_task) {
        // SAFETY: no arguments.
        let reader = unsafe { bpf_get_current_task_btf() }
            .cast::<u8>()
            .cast_const();
        load!(load!(reader, task_thread_pid, *const u8), pid_level, u32)
    } else {
        // SAFETY: no arguments.
        let reader = unsafe { bpf_get_current_task() } as *const u8;
        probe!(probe!(reader, task_thread_pid, *const u8), pid_level, u32)
    }
}

/// `struct bpf_iter_meta`, include/linux/bpf.h: stable since 5.8.
#[repr(C)]
pub struct IterMeta {
    pub seq: *mut seq_file,
}

/// A destination for records.
pub trait Sink: Copy {
    fn write<T: Copy>(self, record: &T);
}

/// Appends to the data that the agent reads. If the buffer is full, the kernel discards what this visit wrote and repeats
/// the visit on the next read, so a record is never cut.
impl Sink for *mut seq_file {
    #[inline(always)]
    fn write<T: Copy>(self, record: &T) {
        // SAFETY: `self` comes from the iterator's context; `record` is a live value without padding.
        unsafe {
            bpf_seq_write(
                self,
                core::ptr::from_ref(record).cast(),
                size_of::<T>() as u32,
            )
        };
    }
}

/// Writes a record.
#[inline(always)]
pub fn emit<T: Copy>(out: impl Sink, record: &T) {
    out.write(record);
}

/// Moves the scan to the process of this task, looking it up if the previous visit was to another one. `None` if it is not
/// watched.
#[inline(always)]
pub fn at_target(task: *const u8, tgid: u32) -> Option<*mut Scan> {
    let scan = SCAN.get_ptr_mut(0)?;
    // SAFETY: an array entry lives as long as its map; only one scan runs at a time.
    unsafe {
        if (*scan).tgid != tgid {
            enter(scan, task, tgid);
        }
        if (*scan).is_watched == 1 {
            Some(scan)
        } else {
            None
        }
    }
}

/// Ends the scan: the next visit looks its process up again.
#[inline(always)]
pub fn end_scan() {
    if let Some(scan) = SCAN.get_ptr_mut(0) {
        // SAFETY: as above.
        unsafe { (*scan).tgid = 0 };
    }
}

#[inline(always)]
fn enter(scan: *mut Scan, task: *const u8, tgid: u32) {
    let mut watched = 0;
    let mut flags = 0;
    // SAFETY: plain integers, which the agent changes between scans only.
    if let Some(entry) = unsafe { TARGETS.get(tgid) } {
        let leader = load!(task, task_group_leader, *const u8);
        let start_ns = load!(leader, task_start_boottime, u64);
        if start_ns == entry.start_ns {
            watched = 1;
            flags = entry.flags;
        } else {
            debug!(
                "pid {} is no longer the target: started at {} ns, expected {}",
                tgid, start_ns, entry.start_ns
            );
        }
    }
    // SAFETY: an array entry lives as long as its map; only one scan runs at a time.
    unsafe {
        (*scan).tgid = tgid;
        (*scan).is_watched = watched;
        (*scan).flags = flags;
        (*scan).limit = 0;
        (*scan).open = 0;
        (*scan).next_fd = 0;
    }
}
