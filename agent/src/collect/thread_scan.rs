//! The scans over threads. Each returns the number of records read, or adds them to the sample.

use anyhow::Result;

use super::{accelerators::RunningThread, convert};
use crate::{
    kernel::glance::{Glance, Record},
    sample::{Sample, Wait},
};

/// CPU time and run delay of all threads of all targets.
pub(super) fn scan_threads(glance: &mut Glance, sample: &mut Sample) -> Result<u64> {
    let mut records = 0;
    glance.scan_threads(&mut |record| {
        records += 1;
        if let Record::Thread(thread) = record {
            sample.threads.push(convert::thread(thread));
        }
    })?;
    sample.scans.threads = true;
    Ok(records)
}

/// What every thread of every target waits for. Returns those that run.
pub(super) fn scan_waits(glance: &mut Glance, sample: &mut Sample) -> Result<Vec<RunningThread>> {
    let mut running = Vec::new();
    glance.scan_waits(&mut |record| push_wait(record, &mut sample.waits, &mut running))?;
    sample.scans.waits = true;
    Ok(running)
}

/// What the threads in the focus scope wait for. Returns those that run.
pub(super) fn scan_profile(glance: &mut Glance, sample: &mut Sample) -> Result<Vec<RunningThread>> {
    let mut running = Vec::new();
    glance.scan_profile(&mut |record| push_wait(record, &mut sample.profile, &mut running))?;
    sample.scans.profile = true;
    Ok(running)
}

fn push_wait(record: Record<'_>, waits: &mut Vec<Wait>, running: &mut Vec<RunningThread>) {
    if let Record::Wait(wait) = record {
        waits.push(convert::wait(wait));
        running.extend(convert::running(wait));
    }
}
