//! Builds the eBPF object and hands it to the crate, which embeds it.

use std::{env, path::PathBuf};

use anyhow::{Context as _, Result};
use aya_build::{Package, Toolchain, build_ebpf};

/// The name under which `cargo xtask setup` links a toolchain that has the source of `core`.
const TOOLCHAIN: &str = "tailback-ebpf";

fn main() -> Result<()> {
    // Building `core` needs `-Z build-std`, which a stable compiler allows under this variable. It is set
    // here, for the child that builds the object, and never for the whole build. The linker is looked for
    // where setup put the pinned version, then on PATH.
    let path = env::var_os("PATH").unwrap_or_default();
    let tools = tools_dir().join("bpf-linker/bin");
    let path = env::join_paths([tools].into_iter().chain(env::split_paths(&path)))
        .context("PATH holds a folder whose name cannot be on a PATH")?;
    println!("cargo:rerun-if-env-changed=XDG_CACHE_HOME");
    // SAFETY: a build script's main has no other threads.
    unsafe {
        env::set_var("RUSTC_BOOTSTRAP", "1");
        env::set_var("CARGO_TERM_QUIET", "true");
        env::set_var("PATH", path);
    }
    build_ebpf(
        [Package {
            name: "tailback-ebpf",
            root_dir: "../ebpf",
            no_default_features: true,
            features: &["object"],
        }],
        Toolchain::Custom(TOOLCHAIN),
    )
    .context("the eBPF object cannot be built; `cargo xtask setup` installs what its build needs")
}

/// As `xtask/src/tools.rs` has it.
fn tools_dir() -> PathBuf {
    env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .unwrap_or_else(|| PathBuf::from("/var/cache"))
        .join("tailback")
}
