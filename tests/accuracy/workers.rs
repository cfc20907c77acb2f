//! A thread pool in which some threads have work.

use std::{
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use tailback_tests::lines::unix_ns;

use crate::{
    report::Report,
    sampling::{self, compare_steady},
};

/// Threads in the pool.
const POOL_SIZE: usize = 6;
/// Threads with work.
const BUSY: usize = 2;

pub fn measure(report: &mut Report) -> Result<()> {
    let done = AtomicBool::new(false);
    let (lock, work_arrived) = (Mutex::new(()), Condvar::new());
    thread::scope(|scope| {
        for number in 0..POOL_SIZE {
            let (done, lock, work_arrived) = (&done, &lock, &work_arrived);
            let work = move || {
                if number < BUSY {
                    while !done.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                    return;
                }
                let mut waiting = lock.lock().unwrap_or_else(PoisonError::into_inner);
                while !done.load(Ordering::Relaxed) {
                    waiting = work_arrived
                        .wait(waiting)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            };
            let named = thread::Builder::new().name(format!("poolwork-{number}"));
            named.spawn_scoped(scope, work).context("start a worker")?;
        }
        let since_ns = unix_ns();
        let samples = sampling::steady(Duration::from_millis(1500));
        let held = lock.lock();
        done.store(true, Ordering::Relaxed);
        drop(held);
        work_arrived.notify_all();
        let samples = samples?;
        let queue = samples.queue("workers", |name| name.starts_with("poolwork"));
        let keys = [
            ("depth", "depth", BUSY as f64),
            ("limit", "limit", POOL_SIZE as f64),
        ];
        compare_steady(report, &queue, since_ns + sampling::SETTLED_NS, &keys);
        Ok(())
    })
}
