//! A kernel type for a plain address: `bpf_rdonly_cast` (6.2), `void *bpf_rdonly_cast(const void *obj, u32 btf_id)`,
//! kernel/bpf/helpers.c. The kernel makes no code of it. What is loaded through the answer is checked against the type
//! as any typed load is, and a bad address yields zeroes.
//!
//! It is a function of the kernel's, not one of its helpers, and neither the linker nor aya knows how such a call is
//! written: the agent replaces the call of a helper with a number of our own (`CAST_CALL`).

use tailback_ebpf::{CAST_CALL, Types};

/// Overridden by the agent before the object is loaded, then frozen by the kernel.
#[unsafe(no_mangle)]
static TYPES: Types = Types::NONE;

/// As the kernel froze them.
pub fn types() -> *const Types {
    &raw const TYPES
}

/// The address as a pointer to a struct of this name.
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
    // SAFETY: as helpers are called: the number is what the compiler writes into the call.
    let call: unsafe extern "C" fn(*const u8, u32) -> *const u8 =
        unsafe { core::mem::transmute(CAST_CALL as usize) };
    // SAFETY: the address is not read.
    unsafe { call(address, ty) }
}
