//! TRUTHDOC

mod accept;
mod accept_counts;
mod forecast;
mod pipe;
mod runqueue;
mod stream;
mod watched;

use std::{
    net::{SocketAddr, TcpStream},
    process,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tailback_tests::sample::Sample;

const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");
const SOON: Duration = Duration::from_secs(20);

/// Tests that measure time must not disturb each other.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Every queue of the test itself.
fn sample_this_process() -> Result<Sample> {
    Sample::of_process(process::id())
}

/// `count` connections, each complete as far as the client can tell.
fn connect(to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    (0..count)
        .map(|_| TcpStream::connect(to).with_context(|| format!("connect to {to}")))
        .collect()
}
