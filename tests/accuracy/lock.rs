//! A pthread mutex that one thread holds while others wait.

use std::{cell::UnsafeCell, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::thread::gettid;
use std::sync::mpsc::channel;
use tailback_tests::lines::unix_ns;

use crate::{
    pipe::compare_holder,
    report::Report,
    sampling::{self, SETTLED_NS, compare_age, compare_steady},
};

const WAITERS: usize = 5;

struct Mutex(UnsafeCell<libc::pthread_mutex_t>);

// SAFETY: a pthread mutex is designed for sharing; all access goes through pthread calls.
unsafe impl Sync for Mutex {}

static MUTEX: Mutex = Mutex(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER));

impl Mutex {
    fn lock(&self) {
        // SAFETY: the mutex is statically initialized and never destroyed.
        unsafe { libc::pthread_mutex_lock(self.0.get()) };
    }

    fn unlock(&self) {
        // SAFETY: as above; the caller holds the mutex.
        unsafe { libc::pthread_mutex_unlock(self.0.get()) };
    }

    /// The name that the agent gives it.
    fn address(&self) -> String {
        format!("{:#x}", self.0.get() as usize)
    }
}

pub fn measure(report: &mut Report) -> Result<()> {
    let (release, released) = channel::<()>();
    let (send_tid, holder_tid) = channel();
    let holder = thread::Builder::new()
        .name("holder".to_owned())
        .spawn(move || {
            MUTEX.lock();
            let _ = send_tid.send(gettid());
            // Returns when `release` is dropped.
            let _ = released.recv();
            MUTEX.unlock();
        });
    let holder = holder.context("start a thread")?;
    let tid = holder_tid.recv().context("wait for the lock to be taken")?;
    let (samples, (since_ns, waiters)) = sampling::during(Duration::from_millis(2200), || {
        let since_ns = unix_ns();
        let waiters: Vec<_> = (0..WAITERS)
            .map(|_| {
                thread::spawn(|| {
                    MUTEX.lock();
                    MUTEX.unlock();
                })
            })
            .collect();
        Ok((since_ns, waiters))
    })?;
    let until_ns = unix_ns();
    drop(release);
    for thread in waiters.into_iter().chain([holder]) {
        ensure!(thread.join().is_ok(), "a thread panicked");
    }
    let queue = samples.queue("lock", |name| name.contains(&MUTEX.address()));
    let settled_ns = since_ns + SETTLED_NS;
    compare_steady(
        report,
        &queue,
        settled_ns,
        &[("depth", "depth", WAITERS as f64)],
    );
    compare_age(report, &queue, (since_ns, until_ns), "oldest");
    let tid = tid.as_raw_nonzero().to_string();
    compare_holder(report, "holder", &queue, settled_ns, &tid);
    Ok(())
}
