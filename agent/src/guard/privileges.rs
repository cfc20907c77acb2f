//! The guard speaks to others, so it holds no more than that takes.

use anyhow::{Context as _, Result};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};

/// Gives up every capability; `writes`: but for the one to write files in directories of others (Envoy's).
pub fn give_up(writes: bool) -> Result<()> {
    let kept = if writes {
        CapabilitySet::DAC_OVERRIDE
    } else {
        CapabilitySet::empty()
    };
    let held =
        rustix::thread::capabilities(None).context("cannot see which privileges there are")?;
    let kept = held.permitted & kept;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).context("cannot give up privileges")?;
    set_no_new_privs(true).context("cannot give up privileges for good")
}
