//! Drops privileges: the adapter process talks to the network, so it runs as `nobody`, with only the capabilities that
//! it needs, and with few system calls.

use std::io::Write as _;

use anyhow::{Context as _, Result};
use rustix::{
    process::{Uid, geteuid},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_keep_capabilities,
        set_no_new_privs, set_thread_res_uid,
    },
};

use crate::confinement::{Refusal, allow_only_serving};

/// Environment variable; `kill`: a system call that is not on the list kills the process, instead of failing. For tests.
const REFUSAL: &str = "TAILBACK_ADAPTERS_SECCOMP";
/// The user id of `nobody` on common distributions, and the kernel's overflow uid.
const NOBODY: u32 = 65_534;

/// Becomes `nobody` and drops every capability; with `writes_files`, it keeps CAP_DAC_OVERRIDE to write Envoy's runtime.
/// The group stays, because it grants access to the agent's socket. Must be called before other threads start.
pub fn drop_privileges(writes_files: bool) -> Result<()> {
    let kept = if writes_files {
        CapabilitySet::DAC_OVERRIDE
    } else {
        CapabilitySet::empty()
    };
    let held = capabilities(None).context("cannot read the capabilities")?;
    let kept = held.permitted & kept;
    if geteuid().is_root() {
        let nobody = Uid::from_raw(NOBODY);
        set_keep_capabilities(true).context("cannot keep capabilities across setuid")?;
        set_thread_res_uid(nobody, nobody, nobody).context("cannot switch to the user nobody")?;
    }
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).context("cannot drop capabilities")?;
    set_no_new_privs(true).context("cannot set no_new_privs")
}

/// Refuses the system calls that no adapter needs. Where that is impossible, as in a sandbox that forbids seccomp(2), the process
/// serves without it: its user and capabilities are what protects others from it.
pub fn refuse_system_calls(writes_files: bool) {
    let refusal = match std::env::var_os(REFUSAL) {
        Some(value) if value == "kill" => Refusal::Kills,
        _ => Refusal::Fails,
    };
    if let Err(error) = allow_only_serving(writes_files, refusal) {
        // An error is ignored: standard error may be closed.
        let _ = writeln!(
            std::io::stderr(),
            "tailback adapters: serving without a filter of system calls: {error:#}"
        );
    }
}
