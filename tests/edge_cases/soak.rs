//! A short run of `cargo xtask soak`.

use std::{path::Path, time::Duration};

use anyhow::{Result, ensure};
use tailback_tests::{
    agent, needs,
    soak::{self, Plan},
};

use crate::SUBJECT;

#[test]
fn memory_and_descriptors_stay_flat_while_processes_and_connections_come_and_go() -> Result<()> {
    const TEST: &str =
        "memory_and_descriptors_stay_flat_while_processes_and_connections_come_and_go";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let outcome = soak::run(
        &Plan {
            agent: &agent::binary()?,
            subject: Path::new(SUBJECT),
            length: Duration::from_secs(24),
            // A third of the rates of `cargo xtask soak`: machines that run tests may have two CPUs, and be busy.
            processes_per_s: 15,
            connections_per_s: 150,
            max_late: 0.2,
        },
        |line| println!("{line}"),
    )?;
    println!("{}", outcome.text);
    ensure!(outcome.faults.is_empty(), "{:#?}", outcome.faults);
    Ok(())
}
