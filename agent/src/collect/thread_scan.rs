//! The scans over threads. Each returns the number of records read, or adds them to the sample.

use anyhow::Result;

use super::{accelerators::RunningThread, convert};
use crate::{
    kernel::scanner::{Record, Scanner},
    sample::{Sample, Wait},
};

/// CPU time and run delay of all threads of all targets.
pub(super) fn scan_threads(scanner: &mut Scanner, sample: &mut Sample) -> Result<u64> {
    let mut records = 0;
    scanner.scan_threads(&mut |record| {
        records += 1;
        if let Record::Thread(thread) = record {
            sample.threads.push(convert::thread(thread));
        }
    })?;
    sample.scans.threads = true;
    Ok(records)
}

/// What every thread of every target waits for. Returns those that run.
pub(super) fn scan_waits(scanner: &mut Scanner, sample: &mut Sample) -> Result<Vec<RunningThread>> {
    let mut running = Vec::new();
    scanner.scan_waits(&mut |record| push_wait(record, &mut sample.waits, &mut running))?;
    sample.scans.waits = true;
    Ok(running)
}

/// What the threads in the focus scope wait for. Returns those that run.
pub(super) fn scan_profile(
    scanner: &mut Scanner,
    sample: &mut Sample,
) -> Result<Vec<RunningThread>> {
    let mut running = Vec::new();
    scanner.scan_profile(&mut |record| push_wait(record, &mut sample.profile, &mut running))?;
    sample.scans.profile = true;
    Ok(running)
}

fn push_wait(record: Record<'_>, waits: &mut Vec<Wait>, running: &mut Vec<RunningThread>) {
    if let Record::Wait(wait) = record {
        waits.push(convert::wait(wait));
        running.extend(convert::running(wait));
    }
}
