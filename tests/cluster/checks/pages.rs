//! The page of a pod, as its own container reads it.

use anyhow::{Result, ensure};
use tailback_tests::wait;

use crate::stage::{DEADLINE, Stage};

pub fn in_the_pod(stage: &Stage) -> Result<()> {
    for (pod, is_healthy) in [("throttled", false), ("jammed", false), ("healthy", true)] {
        wait::until_ok("the level of the page", DEADLINE, || {
            let page = stage.page(pod)?;
            let is_ok = page["level"] == "ok" && page["admit_ratio"] == 1.0;
            ensure!(
                page["alive"] == true && is_ok == is_healthy,
                "{pod}: {page}"
            );
            eprintln!("    {pod}: {page}");
            Ok(())
        })?;
    }
    Ok(())
}
