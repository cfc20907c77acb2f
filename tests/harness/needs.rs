//! Requirements of a test on the machine.

use rustix::process::geteuid;

use crate::{program, skip::skip};

/// Whether the agent and these programs can run here. If not, the test is reported as skipped.
pub fn met(test: &str, programs: &[&str]) -> bool {
    if !geteuid().is_root() {
        skip(test, "only root may load eBPF programs");
        return false;
    }
    for name in programs {
        if let Err(missing) = program::need(&[name]) {
            skip(test, &missing.to_string());
            return false;
        }
    }
    true
}
