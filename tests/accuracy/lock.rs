//! A mutex of the C library that one thread has and others want.

use std::{cell::UnsafeCell, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::thread::gettid;
use std::sync::mpsc::channel;
use tailback_tests::lines::unix_ns;

use crate::{
    look::{self, SETTLED_NS, age, standing},
    pipe::names,
    report::Report,
};

const WANT_IT: usize = 5;

struct Mutex(UnsafeCell<libc::pthread_mutex_t>);

// SAFETY: a pthread mutex is made to be shared; it is reached through pthread calls alone.
unsafe impl Sync for Mutex {}

static MUTEX: Mutex = Mutex(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER));

impl Mutex {
    fn lock(&self) {
        // SAFETY: the mutex was made by its static initialiser and is never destroyed.
        unsafe { libc::pthread_mutex_lock(self.0.get()) };
    }

    fn unlock(&self) {
        // SAFETY: as above; whoever calls this has it.
        unsafe { libc::pthread_mutex_unlock(self.0.get()) };
    }

    /// As the agent writes it.
    fn address(&self) -> String {
        format!("{:#x}", self.0.get() as usize)
    }
}

pub fn measure(report: &mut Report) -> Result<()> {
    let (give_back, keep) = channel::<()>();
    let (tell, told) = channel();
    let holder = thread::Builder::new()
        .name("holder".to_owned())
        .spawn(move || {
            MUTEX.lock();
            let _ = tell.send(gettid());
            // Until the other end is gone.
            let _ = keep.recv();
            MUTEX.unlock();
        });
    let holder = holder.context("start a thread")?;
    let tid = told.recv().context("wait for the lock to be taken")?;
    let (looks, (since_ns, waiters)) = look::during(Duration::from_millis(2200), || {
        let since_ns = unix_ns();
        let waiters: Vec<_> = (0..WANT_IT)
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
    drop(give_back);
    for thread in waiters.into_iter().chain([holder]) {
        ensure!(thread.join().is_ok(), "a thread panicked");
    }
    let queue = looks.queue("lock", |name| name.contains(&MUTEX.address()));
    let settled_ns = since_ns + SETTLED_NS;
    standing(
        report,
        &queue,
        settled_ns,
        &[("depth", "depth", WANT_IT as f64)],
    );
    age(report, &queue, (since_ns, until_ns), "oldest");
    let tid = tid.as_raw_nonzero().to_string();
    names(report, "holder", &queue, settled_ns, &tid);
    Ok(())
}
