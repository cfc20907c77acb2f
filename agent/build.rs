//! Builds the eBPF object, which the crate embeds.

use std::{env, fs, path::PathBuf};

use anyhow::{Context as _, Result};
use aya_build::{Package, Toolchain, build_ebpf};

/// Set to `true`, aya-build does not build the object. Lints and documentation do not need it.
const SKIP: &str = "AYA_BUILD_SKIP";
/// Name of the toolchain that `cargo xtask setup` links; it has the source of `core`.
const TOOLCHAIN: &str = "tailback-ebpf";

fn main() -> Result<()> {
    // Building `core` needs `-Z build-std`, which RUSTC_BOOTSTRAP permits on a stable compiler. It is set for the child
    // that builds the object only, never for the whole build. bpf-linker is searched for where setup installed the pinned
    // version, then on PATH. aya-build forwards the child's output as warnings of this build; CARGO_TERM_QUIET leaves
    // only errors and compiler warnings in it.
    let path = env::var_os("PATH").unwrap_or_default();
    let tools = tools_dir().join("bpf-linker/bin");
    let path = env::join_paths([tools].into_iter().chain(env::split_paths(&path)))
        .context("PATH contains a directory whose name cannot be part of PATH")?;
    println!("cargo:rerun-if-env-changed=XDG_CACHE_HOME");
    if env::var_os(SKIP).is_some() {
        // What the crate embeds must exist. The agent cannot load an empty object, and says so.
        let out = env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?;
        fs::write(PathBuf::from(out).join("scanner"), "").context("write an empty object")?;
    }
    // SAFETY: there are no other threads.
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
    .context("cannot build the eBPF object; `cargo xtask setup` installs the tools that it needs")
}

/// The directory that `xtask/src/tools.rs` installs tools to.
fn tools_dir() -> PathBuf {
    env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .unwrap_or_else(|| PathBuf::from("/var/cache"))
        .join("tailback")
}
