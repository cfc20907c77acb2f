//! A pool of threads, some of which were given work.

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
    look::{self, standing},
    report::Report,
};

const SIZE: usize = 6;
const BUSY: usize = 2;

pub fn measure(report: &mut Report) -> Result<()> {
    let done = AtomicBool::new(false);
    let (lock, work_came) = (Mutex::new(()), Condvar::new());
    thread::scope(|scope| {
        for number in 0..SIZE {
            let (done, lock, work_came) = (&done, &lock, &work_came);
            let work = move || {
                if number < BUSY {
                    while !done.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                    return;
                }
                let mut waiting = lock.lock().unwrap_or_else(PoisonError::into_inner);
                while !done.load(Ordering::Relaxed) {
                    waiting = work_came
                        .wait(waiting)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            };
            let named = thread::Builder::new().name(format!("poolwork-{number}"));
            named.spawn_scoped(scope, work).context("start a worker")?;
        }
        let since_ns = unix_ns();
        let looks = look::at(Duration::from_millis(1500));
        let held = lock.lock();
        done.store(true, Ordering::Relaxed);
        drop(held);
        work_came.notify_all();
        let looks = looks?;
        let queue = looks.queue("workers", |name| name.starts_with("poolwork"));
        let keys = [
            ("depth", "depth", BUSY as f64),
            ("limit", "limit", SIZE as f64),
        ];
        standing(report, &queue, since_ns + look::SETTLED_NS, &keys);
        Ok(())
    })
}
