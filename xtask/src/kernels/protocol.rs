//! The lines that the first process of a test kernel (`bin/kernel-init`) writes to the console. Both sides are built from
//! this file.
//!
//! The kernel writes to the same console at any time. So the first word of each line gives its type, and binary output has
//! a length and a checksum.

/// The first line: the kernel is up.
pub const HELLO: &str = "HELLO from";
/// The last line before power-off.
pub const BYE: &str = "BYE";
/// The file at the root of the initramfs that holds the command, one word a line. Without it, the checks run.
pub const TASK: &str = "task";
/// Begins the lines of checks: `CHECK ok name`, `CHECK failed name: why`.
pub const CHECK: &str = "CHECK";
/// Begins a line of a command's output, in hexadecimal.
pub const BYTES: &str = "BYTES";
/// Begins the line after the output: its length, its checksum, and the exit status.
pub const END: &str = "END";

/// The checks, in the order in which they are run.
pub const CHECKS: &[&str] = &["modules", "doctor", "clock steps", "hidden control groups"];
/// Begins a line of JSON that `tailback doctor` printed.
pub const PLAN: &str = "PLAN";
/// Begins a line of JSON of the program in `tests/accuracy`, which runs after the checks.
pub const ACCURACY: &str = "ACCURACY";

/// Kernel modules that the workloads of `tests/accuracy` need, in load order: netem for delay and loss, and kernel TLS with
/// its cipher. Modules are at the root of the initramfs ([`module_file`]); the rest is built in or missing.
pub const MODULES: &[&str] = &[
    "sch_netem",
    "gf128mul",
    "crypto_null",
    "ctr",
    "ghash-generic",
    "gcm",
    "tls",
];

pub fn module_file(module: &str) -> String {
    format!("{module}.ko")
}

/// A checksum (FNV-1a) that detects changed and moved bytes.
pub fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| {
        (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}
