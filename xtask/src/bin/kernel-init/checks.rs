//! What must hold on every kernel: the agent says that it can work here, and measures queues of a known state
//! right.
//!
//! The queues are this process's own. Each check makes one, asks `tailback sample` about it, and compares.

use std::{
    io::{self, Write as _},
    net::{TcpListener, TcpStream},
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::protocol::CHECKS;

type Check = fn() -> Result<()>;

/// The checks by name, as `protocol` lists them.
pub fn all() -> impl Iterator<Item = (&'static str, Check)> {
    let checks: [Check; CHECKS.len()] = [doctor, accept, pipe, recv];
    CHECKS.iter().copied().zip(checks)
}

/// `tailback doctor` finds nothing in the way.
fn doctor() -> Result<()> {
    agent(&["doctor"]).map(drop)
}

/// Five connections that nobody accepts: how many, of how many, and since when.
fn accept() -> Result<()> {
    const BACKLOG: i32 = 16;
    const CONNECTIONS: u64 = 5;
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    // A second listen changes the backlog.
    rustix::net::listen(&listener, BACKLOG).context("set the backlog")?;
    let first = SystemTime::now();
    let address = listener.local_addr()?;
    let clients: Vec<TcpStream> = (0..CONNECTIONS)
        .map(|_| TcpStream::connect(address))
        .collect::<io::Result<_>>()
        .context("connect")?;

    let queue = queue("accept", CONNECTIONS)?;
    ensure!(
        queue["limit"] == BACKLOG,
        "the limit is not {BACKLOG}: {queue}"
    );
    let oldest = Duration::from_nanos(
        queue["oldest_ns"]
            .as_u64()
            .context("the sample has no oldest_ns")?,
    );
    let sampled = UNIX_EPOCH
        + Duration::from_nanos(
            queue["time_unix_ns"]
                .as_u64()
                .context("the sample has no time")?,
        );
    let waited = sampled
        .duration_since(first)
        .context("the sample was taken before the first connection")?;
    ensure!(
        oldest.abs_diff(waited) <= Duration::from_millis(150),
        "the oldest connection has waited for {waited:?}, and the sample says {oldest:?}"
    );
    drop(clients);
    Ok(())
}

/// Three pages in a pipe that nobody reads.
fn pipe() -> Result<()> {
    const PAGES: u64 = 3;
    let (reader, mut writer) = io::pipe().context("make a pipe")?;
    for _ in 0..PAGES {
        writer.write_all(&[0; 4096]).context("write to the pipe")?;
    }
    queue("pipe", PAGES)?;
    drop(reader);
    Ok(())
}

/// A thousand bytes that nobody reads.
fn recv() -> Result<()> {
    const BYTES: u64 = 1000;
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let mut client = TcpStream::connect(listener.local_addr()?).context("connect")?;
    let (server, _) = listener.accept().context("accept")?;
    client.write_all(&[0; BYTES as usize]).context("send")?;
    queue("recv", BYTES)?;
    drop(server);
    Ok(())
}

/// The queue of this kind and depth in a sample of this process.
fn queue(kind: &str, depth: u64) -> Result<Value> {
    let sample = agent(&["sample", "--pid", "1", "--json"])?;
    let lines: Result<Vec<Value>, _> = sample.lines().map(serde_json::from_str).collect();
    let queues = lines.with_context(|| format!("the sample is not JSON: {sample}"))?;
    let mut fitting = queues
        .into_iter()
        .filter(|queue| queue["kind"] == kind && queue["depth"] == depth);
    fitting
        .next()
        .with_context(|| format!("no {kind} queue of depth {depth} is in the sample: {sample}"))
}

/// Runs the agent, and returns what it printed. What it says when it fails, a verifier's log perhaps, goes to
/// the console in full, and into the error in short.
fn agent(args: &[&str]) -> Result<String> {
    let what = || format!("tailback {}", args.join(" "));
    let output = Command::new("/tailback")
        .args(args)
        .output()
        .with_context(what)?;
    if output.status.success() {
        return String::from_utf8(output.stdout).with_context(what);
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    said.lines().for_each(|line| println!("  {line}"));
    let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    let (first, last) = (
        lines.next().unwrap_or_default(),
        lines.next_back().unwrap_or_default(),
    );
    bail!("{}: {}: {first} ... {last}", what(), output.status)
}
