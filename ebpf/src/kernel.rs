//! Reading kernel objects, and what all programs share: the layout and the maps.

use aya_ebpf::{
    bindings::seq_file,
    btf_maps::{Array, HashMap, SkStorage},
    helpers::generated::bpf_seq_write,
    macros::btf_map,
};
use tailback_ebpf::{Layout, Mark, TargetEntry, Walk};

/// Overridden by the agent before the object is loaded, then frozen by the kernel.
#[unsafe(no_mangle)]
static LAYOUT: Layout = Layout::EMPTY;

/// Watched processes, by tgid in the initial pid namespace.
#[btf_map]
pub static TARGETS: HashMap<u32, TargetEntry, 16384> = HashMap::new();

/// Settings of the next walk.
#[btf_map]
pub static WALK: Array<Walk, 1> = Array::new();

/// The sockets that are looked at on every tick.
#[btf_map]
pub static MARKS: SkStorage<Mark> = SkStorage::new();

/// The layout as the kernel froze it. Each field is read where it is used, so that the verifier sees a constant there.
pub fn layout() -> *const Layout {
    &raw const LAYOUT
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

pub(crate) use {load, load_or, offset};

/// `struct bpf_iter_meta`, include/linux/bpf.h: stable since 5.8.
#[repr(C)]
pub struct IterMeta {
    pub seq: *mut seq_file,
}

/// Appends a record to what the agent reads. When the buffer is full the kernel drops what this visit
/// wrote and visits the object again on the next read, so a record is never cut.
#[inline(always)]
pub fn emit<T>(seq: *mut seq_file, record: &T) {
    // SAFETY: `seq` comes from the iterator's context; `record` is a live value without padding.
    unsafe {
        bpf_seq_write(
            seq,
            core::ptr::from_ref(record).cast(),
            size_of::<T>() as u32,
        )
    };
}

/// `TARGET_` flags of a task's process, `None` where it is not watched.
#[inline(always)]
pub fn target_flags(task: *const u8, tgid: u32) -> Option<u32> {
    // SAFETY: plain numbers; an update in between shows one value or the other, and the next walk the new one.
    let entry = unsafe { TARGETS.get(tgid) }?;
    let leader = load!(task, task_group_leader, *const u8);
    if load!(leader, task_start_boottime, u64) == entry.start_ns {
        Some(entry.flags)
    } else {
        None
    }
}
