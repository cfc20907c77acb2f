//! Drops privileges: the adapter process talks to the network, so it runs as `nobody`, with only the capabilities that
//! it needs.

use anyhow::{Context as _, Result};
use rustix::{
    process::{Uid, geteuid},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_keep_capabilities,
        set_no_new_privs, set_thread_res_uid,
    },
};

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
