//! The guard speaks to others, so it is nobody, and may do nothing more than that takes.

use anyhow::{Context as _, Result};
use rustix::{
    process::{Uid, geteuid},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_keep_capabilities,
        set_no_new_privs, set_thread_res_uid,
    },
};

/// `nobody`, everywhere.
const NOBODY: u32 = 65_534;

/// Gives up the user and every capability; `writes`: but for the one to write files in directories of others (Envoy's). The
/// group stays: the agent's socket is for it. There must be no other thread yet.
pub fn give_up(writes: bool) -> Result<()> {
    let kept = if writes {
        CapabilitySet::DAC_OVERRIDE
    } else {
        CapabilitySet::empty()
    };
    let held = capabilities(None).context("cannot see which privileges there are")?;
    let kept = held.permitted & kept;
    if geteuid().is_root() {
        let nobody = Uid::from_raw(NOBODY);
        set_keep_capabilities(true).context("cannot keep a privilege")?;
        set_thread_res_uid(nobody, nobody, nobody).context("cannot become nobody")?;
    }
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).context("cannot give up privileges")?;
    set_no_new_privs(true).context("cannot give up privileges for good")
}
