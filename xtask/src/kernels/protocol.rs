//! What the first process of a test kernel (`bin/kernel-init`) writes to the console. Both sides are built
//! from this file.
//!
//! The kernel writes there too, whenever it likes: each line says by its first word what it is, and bytes that
//! must come through whole are counted and summed up.

/// The first line, and the sign that the kernel came up.
pub const HELLO: &str = "HELLO from";
/// The last line: what follows is power-off.
pub const BYE: &str = "BYE";
/// The file at the root of the initramfs that holds the command to run, one word a line. Without it the checks
/// are run.
pub const TASK: &str = "task";
/// Begins the lines of checks: `CHECK ok name`, `CHECK failed name: why`.
pub const CHECK: &str = "CHECK";
/// Begins a line of bytes that a command printed, as hexadecimal digits.
pub const BYTES: &str = "BYTES";
/// Begins the line after them: how many they are, their sum, and the command's exit status.
pub const END: &str = "END";

/// The checks, in the order in which they are run.
pub const CHECKS: &[&str] = &["modules", "doctor", "clock steps"];
/// Begins a line of JSON that `tailback doctor` printed.
pub const PLAN: &str = "PLAN";
/// Begins a line of JSON that the program of `tests/accuracy` printed: it is run after the checks.
pub const ACCURACY: &str = "ACCURACY";

/// Kernel modules that the workloads of `tests/accuracy` stand on, each after those that it needs: a link that delays
/// and loses, and TLS in the kernel with its cipher. What a kernel has as a module lies at the root of the initramfs
/// ([`module_file`]); the rest is built in there, or is not there at all.
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

/// A sum that tells a changed or moved byte (FNV-1a).
pub fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| {
        (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}
