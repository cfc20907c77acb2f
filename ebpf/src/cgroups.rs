//! The control groups of the targets' processes and their limits, from the kernel's own structures.
//!
//! The files of a control group can be out of reach: a container sees its own groups alone, or none, and what is
//! mounted in another container is up to that container's owner. These structures are the same for every reader, on
//! cgroup v1 and v2.

use aya_ebpf::{bindings::seq_file, helpers::generated::bpf_probe_read_kernel_str};
use tailback_ebpf::{
    ABSENT, CGROUP_NAME, CONTROLLER_CPU, CONTROLLER_IO, CONTROLLER_MEMORY, CONTROLLER_NONE,
    CgroupRecord, Controllers, Header, KIND_CGROUP, MAX_CGROUP_LEVELS,
};

use crate::{
    kernel::{at_target, emit, end_scan, load, offset, probe, probe_at},
    task::{TaskContext, task_of},
};

/// The agent overrides it before loading; the kernel then freezes it as read-only data.
#[unsafe(no_mangle)]
static CONTROLLERS: Controllers = Controllers::NONE;

/// Index of each event in `mem_cgroup.memory_events`: `enum memcg_memory_event`, include/linux/memcontrol.h. The first five are
/// the same in 5.10 to 7.2.
const EVENT_HIGH: u64 = 1;
const EVENT_MAX: u64 = 2;
const EVENT_OOM_KILL: u64 = 4;

/// The frozen values.
fn controllers() -> *const Controllers {
    &raw const CONTROLLERS
}

macro_rules! controller {
    ($field:ident) => {
        // SAFETY: CONTROLLERS is a live static; the read is volatile because the loader rewrites it.
        unsafe { core::ptr::read_volatile(&raw const (*controllers()).$field) }
    };
}

/// Writes a record for every control group of each target's processes, and for its parents.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn cgroups(ctx: *const TaskContext) -> i32 {
    let Some((seq, task)) = task_of(ctx) else {
        end_scan();
        return 0;
    };
    let tgid = load!(task, task_tgid, u32);
    if load!(task, task_pid, u32) != tgid
        || offset!(task_cgroups) == ABSENT
        || at_target(task, tgid).is_none()
    {
        return 0;
    }
    let set = probe!(task, task_cgroups, *const u8);
    if set.is_null() {
        return 0;
    }
    chain(seq, tgid, CONTROLLER_CPU, state_of(set, controller!(cpu)));
    let memory = state_of(set, controller!(memory));
    chain(seq, tgid, CONTROLLER_MEMORY, memory);
    chain(seq, tgid, CONTROLLER_IO, state_of(set, controller!(io)));
    let unified = probe!(set, css_set_unified, *const u8);
    if !unified.is_null() {
        let state = unified.wrapping_add(offset!(cgroup_self) as usize);
        chain(seq, tgid, CONTROLLER_NONE, state);
    }
    0
}

/// The `cgroup_subsys_state` of a controller in a `css_set`: that of the process's group, or of its nearest parent that has the
/// controller. Null: the kernel has no such controller.
#[inline(always)]
fn state_of(set: *const u8, index: u32) -> *const u8 {
    if index == ABSENT {
        return core::ptr::null();
    }
    let at = u64::from(offset!(css_set_subsys)) + u64::from(index) * size_of::<u64>() as u64;
    probe_at(set, at)
}

/// Reports a group and its parents.
#[inline(never)]
fn chain(seq: *mut seq_file, tgid: u32, controller: u32, state: *const u8) -> i32 {
    let mut state = state;
    for level in 0..MAX_CGROUP_LEVELS {
        if state.is_null() {
            break;
        }
        let group = probe!(state, css_cgroup, *const u8);
        let node = probe!(group, cgroup_kn, *const u8);
        let root = probe!(group, cgroup_root, *const u8);
        let mut record = CgroupRecord {
            header: Header {
                kind: KIND_CGROUP,
                len: size_of::<CgroupRecord>() as u16,
                tgid,
            },
            id: probe!(node, kn_id, u64),
            controller,
            level,
            hierarchy: probe!(root, root_hierarchy, u32),
            has_values: 0,
            values: [0; 7],
            name: [0; CGROUP_NAME],
        };
        let name = probe!(node, kn_name, *const u8);
        // SAFETY: the helper checks the address, and writes at most this many bytes, with a zero at the end.
        unsafe {
            bpf_probe_read_kernel_str(
                record.name.as_mut_ptr().cast(),
                CGROUP_NAME as u32,
                name.cast(),
            )
        };
        match controller {
            CONTROLLER_CPU => read_cpu(state, &mut record),
            CONTROLLER_MEMORY => read_memory(state, &mut record),
            CONTROLLER_NONE => read_stalls(group, &mut record),
            _ => {}
        }
        emit(seq, &record);
        state = probe!(state, css_parent, *const u8);
    }
    0
}

#[inline(always)]
fn read_cpu(state: *const u8, record: &mut CgroupRecord) {
    if offset!(group_quota) == ABSENT {
        return;
    }
    let group = state.wrapping_sub(offset!(group_css) as usize);
    record.has_values = 1;
    record.values[0] = probe!(group, group_quota, u64);
    record.values[1] = probe!(group, group_period, u64);
    // An int.
    record.values[2] = u64::from(probe!(group, group_nr_throttled, u32));
    record.values[3] = probe!(group, group_throttled_time, u64);
}

#[inline(always)]
fn read_memory(state: *const u8, record: &mut CgroupRecord) {
    if offset!(memcg_max) == ABSENT {
        return;
    }
    let group = state.wrapping_sub(offset!(memcg_css) as usize);
    let event = |index: u64| probe_at(group, u64::from(offset!(memcg_events)) + index * 8);
    record.has_values = 1;
    record.values = [
        probe!(group, memcg_usage, u64),
        probe!(group, memcg_max, u64),
        probe!(group, memcg_high, u64),
        probe!(group, memcg_failcnt, u64),
        event(EVENT_HIGH),
        event(EVENT_MAX),
        event(EVENT_OOM_KILL),
    ];
}

#[inline(always)]
fn read_stalls(group: *const u8, record: &mut CgroupRecord) {
    if offset!(psi_total) == ABSENT {
        return;
    }
    let psi = if controller!(psi_is_pointer) == 1 {
        probe!(group, cgroup_psi, *const u8)
    } else {
        group.wrapping_add(offset!(cgroup_psi) as usize)
    };
    // The root has no PSI. With PSI off, no group has it since 6.1; before, each has it, and its counters are 0.
    if psi.is_null() {
        return;
    }
    record.has_values = 1;
    let total = u64::from(offset!(psi_total));
    for index in 0..5 {
        record.values[index] = probe_at(psi, total + index as u64 * 8);
    }
    // Before 5.13 another counter follows.
    if controller!(has_cpu_full) == 1 {
        record.values[5] = probe_at(psi, total + 5 * 8);
    }
}
