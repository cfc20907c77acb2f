//! The processor architecture of the machine that a sample was taken on.

use serde::{Deserialize, Serialize};

/// A processor architecture. The numbers of system calls depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Architecture {
    /// Also that of recordings which do not say.
    #[default]
    X86_64,
    /// 64-bit ARM.
    Aarch64,
}

impl Architecture {
    /// The one that this program is built for.
    #[cfg(target_arch = "x86_64")]
    pub const OWN: Self = Self::X86_64;
    /// The one that this program is built for.
    #[cfg(target_arch = "aarch64")]
    pub const OWN: Self = Self::Aarch64;
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!(
    "the numbers of this architecture's system calls are not in agent/src/queue/syscalls/table.rs"
);
