//! Calls of `bpf_rdonly_cast` in the eBPF object, which neither the linker nor aya can write.
#![forbid(unsafe_code)]

use tailback_ebpf::CAST_CALL;

/// `BPF_JMP | BPF_CALL`, include/uapi/linux/bpf.h.
const CALL: u8 = 0x85;
/// The source register of such a call, in the upper half of the byte: `BPF_PSEUDO_KFUNC_CALL`.
const OF_KERNEL_FUNCTION: u8 = 2 << 4;
/// An instruction; the sections that hold them begin at a multiple of it.
const BYTES: usize = 8;

/// The object with each call that stands for the cast calling the kernel's function of this number in its BTF.
pub(super) fn resolve_calls(object: &mut [u8], function: u32) {
    let [a, b, c, d] = CAST_CALL.to_le_bytes();
    for instruction in object.chunks_exact_mut(BYTES) {
        if *instruction == [CALL, 0, 0, 0, a, b, c, d] {
            instruction[1] = OF_KERNEL_FUNCTION;
            instruction[4..].copy_from_slice(&function.to_le_bytes());
        }
    }
}
