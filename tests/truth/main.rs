//! Compares what the agent measures with a truth independent of it: `ss`, the client's own clock, the sockets' ioctls,
//! `/proc`, `nstat`. Every test prints its error.

mod accept;
mod accept_counts;
mod app;
mod eventloop;
mod exact_waits;
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
/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);

/// Serializes tests that measure time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Samples every queue of the test process.
fn sample_this_process() -> Result<Sample> {
    Sample::of_process(process::id())
}

/// Opens `count` connections, each complete from the client's view.
fn connect(to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    (0..count)
        .map(|_| TcpStream::connect(to).with_context(|| format!("connect to {to}")))
        .collect()
}
