//! Replaces the placeholder calls of `bpf_rdonly_cast` in the eBPF object: neither the linker nor aya can emit a kfunc call.
#![forbid(unsafe_code)]

use tailback_ebpf::CAST_CALL;

/// Opcode of a call, `BPF_JMP | BPF_CALL` (include/uapi/linux/bpf.h).
const OPCODE_CALL: u8 = 0x85;
/// `BPF_PSEUDO_KFUNC_CALL` in the source register, the upper half of an instruction's second byte.
const PSEUDO_KFUNC_CALL: u8 = 2 << 4;
/// Size of a BPF instruction, bytes; code sections are aligned to it.
const INSTRUCTION_BYTES: usize = 8;

/// Turns each placeholder call into a call of the kfunc with this BTF id.
pub(super) fn resolve_calls(object: &mut [u8], kfunc: u32) {
    let [a, b, c, d] = CAST_CALL.to_le_bytes();
    for instruction in object.chunks_exact_mut(INSTRUCTION_BYTES) {
        if *instruction == [OPCODE_CALL, 0, 0, 0, a, b, c, d] {
            instruction[1] = PSEUDO_KFUNC_CALL;
            instruction[4..].copy_from_slice(&kfunc.to_le_bytes());
        }
    }
}
