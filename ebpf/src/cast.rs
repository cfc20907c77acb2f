//! Gives a plain address a kernel type: `bpf_rdonly_cast` (Linux 6.2),
//! `void *bpf_rdonly_cast(const void *obj, u32 btf_id)`, kernel/bpf/helpers.c.
//!
//! The call compiles to no machine code. The verifier checks each load through the result against the type, as for any
//! typed load; a load through a bad address yields zeroes.
//!
//! It is a kfunc, not a helper, and neither the linker nor aya can emit such a call. The object therefore calls a
//! made-up helper number (`CAST_CALL`), which the agent replaces before loading.

use tailback_ebpf::{CAST_CALL, Types};

/// BTF ids of the types to cast to. The agent overrides it before loading; the kernel then freezes it.
#[unsafe(no_mangle)]
static TYPES: Types = Types::NONE;

/// The frozen ids.
pub fn types() -> *const Types {
    &raw const TYPES
}

/// Casts an address to a pointer to the struct of this name.
macro_rules! cast {
    ($address:expr, $ty:ident) => {{
        // SAFETY: TYPES is a live static; the read is volatile because the loader rewrites it.
        let ty = unsafe { core::ptr::read_volatile(&raw const (*$crate::cast::types()).$ty) };
        $crate::cast::cast_to($address, ty)
    }};
}

pub(crate) use cast;

#[inline(always)]
pub fn cast_to(address: *const u8, ty: u32) -> *const u8 {
    // SAFETY: helpers are called through their number, which the compiler writes into the call instruction.
    let call: unsafe extern "C" fn(*const u8, u32) -> *const u8 =
        unsafe { core::mem::transmute(CAST_CALL as usize) };
    // SAFETY: the address is not dereferenced.
    unsafe { call(address, ty) }
}
