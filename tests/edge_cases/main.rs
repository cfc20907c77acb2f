//! Sockets and threads in unusual states that occur on real machines: passed between processes, shared, of other address
//! families, half-closed, with wrapped sequence numbers, and very many.

mod connections;
mod scale;
mod shared;
mod soak;

use std::{
    io::Write as _,
    net::{SocketAddr, TcpListener, TcpStream},
    process,
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::io::ioctl_fionread;
use tailback_tests::{sample::Sample, wait};

const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");
/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);

/// Samples the test process.
fn sample_this_process() -> Result<Sample> {
    Sample::of_process(process::id())
}

fn connect_all(to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    (0..count)
        .map(|_| TcpStream::connect(to).with_context(|| format!("connect to {to}")))
        .collect()
}

/// Opens a connection with `bytes` unread at the server.
fn unread(listener: &TcpListener, to: SocketAddr, bytes: usize) -> Result<(TcpStream, TcpStream)> {
    let mut client = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
    let (server, _) = listener.accept().context("accept")?;
    client.write_all(&vec![0; bytes]).context("send")?;
    wait_for_unread(&server, bytes as u64)?;
    Ok((client, server))
}

fn wait_for_unread(socket: &TcpStream, bytes: u64) -> Result<()> {
    wait::until(&format!("{bytes} unread bytes"), DEADLINE, || {
        Ok((ioctl_fionread(socket)? == bytes).then_some(()))
    })
}
