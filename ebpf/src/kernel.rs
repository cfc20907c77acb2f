//! Reading kernel objects, and what all programs share: the layout and the maps.

use aya_ebpf::{
    bindings::seq_file,
    btf_maps::{Array, HashMap, SkStorage},
    helpers::generated::{
        bpf_get_current_task, bpf_get_current_task_btf, bpf_probe_read_kernel, bpf_seq_write,
    },
    macros::btf_map,
};
use tailback_ebpf::{Layout, MAX_WANTED, Mark, TargetEntry, Walk, Ways};

/// Overridden by the agent before the object is loaded, then frozen by the kernel.
#[unsafe(no_mangle)]
static LAYOUT: Layout = Layout::EMPTY;

/// Overridden and frozen likewise. With all of them 0 nothing is assumed.
#[unsafe(no_mangle)]
static WAYS: Ways = Ways {
    typed_sockets: 0,
    cookies: 0,
    marks: 0,
    current_task: 0,
    task_registers: 0,
    user_memory: 0,
    bpf_loop: 0,
};

/// Watched processes, by tgid in the initial pid namespace.
#[btf_map]
pub static TARGETS: HashMap<u32, TargetEntry, 16384> = HashMap::new();

/// Settings of the next walk.
#[btf_map]
pub static WALK: Array<Walk, 1> = Array::new();

/// Connections whose holders are asked for, by their ports (`wanted_key`); the values say nothing.
#[btf_map]
pub static WANTED: HashMap<u32, u32, MAX_WANTED> = HashMap::new();

/// The sockets that are looked at on every tick.
#[btf_map]
pub static MARKS: SkStorage<Mark> = SkStorage::new();

/// The layout as the kernel froze it. Each field is read where it is used, so that the verifier sees a constant there.
pub fn layout() -> *const Layout {
    &raw const LAYOUT
}

/// As [`layout`].
pub fn ways() -> *const Ways {
    &raw const WAYS
}

/// Whether this kernel has the better way to a fact. The verifier prunes the other one, and with it helpers that the
/// kernel does not know.
macro_rules! way {
    ($way:ident) => {
        // SAFETY: WAYS is a live static; the read is volatile because the loader rewrites it.
        unsafe { core::ptr::read_volatile(&raw const (*$crate::kernel::ways()).$way) } != 0
    };
}

/// The offset of a kernel field. Volatile, or the compiler would use the value from before the override.
macro_rules! offset {
    ($field:ident) => {
        // SAFETY: LAYOUT is a live static; the read is volatile because the loader rewrites it.
        unsafe { core::ptr::read_volatile(&raw const (*$crate::kernel::layout()).$field) }
    };
}

/// Loads a field of type `$ty` through a pointer whose kernel type the verifier knows: it refuses
/// an offset or a size that does not fit that type, so a wrong layout cannot read the wrong thing.
macro_rules! load {
    ($base:expr, $field:ident, $ty:ty) => {{
        let at = $base
            .wrapping_add($crate::kernel::offset!($field) as usize)
            .cast::<$ty>();
        // SAFETY: a BTF-typed kernel pointer; the kernel handles a fault in such a load.
        unsafe { core::ptr::read_volatile(at) }
    }};
}

/// As `load!`, but `$absent` where this kernel has no such field; the verifier prunes the load.
macro_rules! load_or {
    ($base:expr, $field:ident, $ty:ty, $absent:expr) => {
        if $crate::kernel::offset!($field) == tailback_ebpf::ABSENT {
            $absent
        } else {
            $crate::kernel::load!($base, $field, $ty)
        }
    };
}

/// Reads a field of type `$ty` through an address whose kernel type the verifier does not know: its offset comes from
/// BTF alone. A bad address yields zeroes.
macro_rules! probe {
    ($base:expr, $field:ident, $ty:ty) => {
        $crate::kernel::probe_at::<$ty>($base, u64::from($crate::kernel::offset!($field)))
    };
}

/// A field of a socket: a typed load, or where the kernel gives no typed sockets a probe read.
macro_rules! load_sk {
    ($base:expr, $field:ident, $ty:ty) => {
        if $crate::kernel::way!(typed_sockets) {
            $crate::kernel::load!($base, $field, $ty)
        } else {
            $crate::kernel::probe!($base, $field, $ty)
        }
    };
}

/// As `load_sk!`, but `$absent` where this kernel has no such field.
macro_rules! load_sk_or {
    ($base:expr, $field:ident, $ty:ty, $absent:expr) => {
        if $crate::kernel::offset!($field) == tailback_ebpf::ABSENT {
            $absent
        } else {
            $crate::kernel::load_sk!($base, $field, $ty)
        }
    };
}

/// A field of what belongs to a socket (`Sock`), through `$base`: as `load_sk!`, but for the one whose type the verifier
/// does not know.
macro_rules! read_sk {
    ($sock:expr, $base:expr, $field:ident, $ty:ty) => {
        if $sock.is_typed && $crate::kernel::way!(typed_sockets) {
            $crate::kernel::load!($base, $field, $ty)
        } else {
            $crate::kernel::probe!($base, $field, $ty)
        }
    };
}

/// As `read_sk!`, but `$absent` where this kernel has no such field.
macro_rules! read_sk_or {
    ($sock:expr, $base:expr, $field:ident, $ty:ty, $absent:expr) => {
        if $crate::kernel::offset!($field) == tailback_ebpf::ABSENT {
            $absent
        } else {
            $crate::kernel::read_sk!($sock, $base, $field, $ty)
        }
    };
}

pub(crate) use {load, load_or, load_sk, load_sk_or, offset, probe, read_sk, read_sk_or, way};

/// A value that any bytes are.
pub trait Plain: Copy {
    const ZERO: Self;
}

macro_rules! plain {
    ($($ty:ty = $zero:expr),*) => { $(impl Plain for $ty { const ZERO: Self = $zero; })* };
}

plain!(u8 = 0, u16 = 0, u32 = 0, u64 = 0, [u64; 2] = [0; 2], *const u8 = core::ptr::null());

/// Reads a value at `base + offset`; zeroes where the address is bad.
#[inline(always)]
pub fn probe_at<T: Plain>(base: *const u8, offset: u64) -> T {
    let mut value = T::ZERO;
    // SAFETY: the helper checks the address, and fills `value` with zeroes when it is bad; any bytes are a `T`.
    unsafe {
        bpf_probe_read_kernel(
            (&raw mut value).cast(),
            size_of::<T>() as u32,
            base.wrapping_add(offset as usize).cast(),
        )
    };
    value
}

/// The number of a task in the pid namespace at `level`, counted from the initial one (0).
#[inline(always)]
pub fn pid_at(pid: *const u8, level: u32) -> u32 {
    let at = u64::from(offset!(pid_numbers))
        + u64::from(level & 31) * u64::from(offset!(upid_size))
        + u64::from(offset!(upid_nr));
    // An array indexed by a value that only the running kernel knows: typed loads cannot, a probe read can.
    // Before 6.10 the verifier forgets the bounds of such a product, and wants them said again.
    probe_at(pid, at & 0xfff)
}

/// The depth of the reader's own pid namespace: an iterator runs in the task that reads it.
#[inline(always)]
pub fn reader_level() -> u32 {
    if way!(current_task) {
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

/// What records are written to.
pub trait Sink: Copy {
    fn write<T: Copy>(self, record: &T);
}

/// Appends to what the agent reads. When the buffer is full the kernel drops what this visit
/// wrote and visits the object again on the next read, so a record is never cut.
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

/// Where the walk is: at the process of this task, looked up if it is another one than that of the visit before. `None`
/// where it is not watched.
#[inline(always)]
pub fn at_target(task: *const u8, tgid: u32) -> Option<*mut Walk> {
    let walk = WALK.get_ptr_mut(0)?;
    // SAFETY: an array entry lives as long as its map; only one walk runs at a time.
    unsafe {
        if (*walk).tgid != tgid {
            enter(walk, task, tgid);
        }
        if (*walk).is_watched == 1 {
            Some(walk)
        } else {
            None
        }
    }
}

/// The walk is over.
#[inline(always)]
pub fn end_of_walk() {
    if let Some(walk) = WALK.get_ptr_mut(0) {
        // SAFETY: as above.
        unsafe { (*walk).tgid = 0 };
    }
}

#[inline(always)]
fn enter(walk: *mut Walk, task: *const u8, tgid: u32) {
    let mut watched = 0;
    let mut flags = 0;
    // SAFETY: plain numbers; the agent changes them between walks.
    if let Some(entry) = unsafe { TARGETS.get(tgid) } {
        let leader = load!(task, task_group_leader, *const u8);
        if load!(leader, task_start_boottime, u64) == entry.start_ns {
            watched = 1;
            flags = entry.flags;
        }
    }
    // SAFETY: an array entry lives as long as its map; only one walk runs at a time.
    unsafe {
        (*walk).tgid = tgid;
        (*walk).is_watched = watched;
        (*walk).flags = flags;
        (*walk).limit = 0;
        (*walk).open = 0;
        (*walk).next_fd = 0;
    }
}
