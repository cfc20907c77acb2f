//! Target discovery: services of several processes, in namespaces and cgroups, that start, change and exit.

mod lifecycle;
mod namespaces;
mod selection;

use std::{
    net::{SocketAddr, TcpStream},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{
    sample::{Sample, number},
    service::{Pace, Service},
    ss,
};

const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");
/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);
/// Maximum time to discover a new process.
const DISCOVERY_TIME: Duration = Duration::from_secs(1);

/// A service that accepts one connection and is then busy for a minute, so that further connections wait.
struct Busy {
    service: Service,
    _pace: Pace,
}

impl Busy {
    fn start(command: &mut Command, address: &str, args: &[&str]) -> Result<Self> {
        let pace = Pace::new(Duration::from_secs(60))?;
        let file = pace.file().display().to_string();
        let mut words = vec!["take", "--listen", address, "--pace", &file];
        words.extend(args);
        Ok(Self {
            service: Service::start(command, &words)?,
            _pace: pace,
        })
    }

    /// Listens on any port of the loopback address.
    fn on_any_port(args: &[&str]) -> Result<Self> {
        Self::start(&mut Command::new(SUBJECT), "127.0.0.1:0", args)
    }

    fn address(&self) -> SocketAddr {
        self.service.address()
    }

    fn pid(&self) -> u32 {
        self.service.pid()
    }
}

fn connect(to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    let one = |_| TcpStream::connect(to).with_context(|| format!("connect to {to}"));
    (0..count).map(one).collect()
}

/// Waits until `depth` connections are queued at a port.
fn wait_for_depth(port: u16, depth: u64) -> Result<()> {
    ss::wait_for(
        None,
        port,
        &format!("{depth} waiting connections"),
        |waiting| waiting == depth,
    )
    .map(drop)
}

/// Checks that there is one target of `processes` processes with one accept queue of `sockets` sockets, and that depth and
/// limit match `ss`.
fn check_one_target(
    sample: &Sample,
    address: SocketAddr,
    processes: u64,
    sockets: u64,
) -> Result<()> {
    let targets: Vec<&Value> = sample.targets().collect();
    let queues: Vec<&Value> = sample.queues("accept").collect();
    println!(
        "{} target(s), processes {:?}, accept queues {:?}",
        targets.len(),
        targets
            .iter()
            .map(|target| &target["processes"])
            .collect::<Vec<_>>(),
        queues
            .iter()
            .map(|queue| format!("{} {} of {}", queue["name"], queue["depth"], queue["limit"]))
            .collect::<Vec<_>>(),
    );
    ensure!(targets.len() == 1, "{targets:?}");
    ensure!(
        number(targets[0], "processes")? == processes,
        "{}",
        targets[0]
    );
    ensure!(queues.len() == 1, "{queues:?}");
    ensure!(queues[0]["name"] == address.to_string(), "{}", queues[0]);
    let (depth, limit) = ss::sums(None, address.port())?;
    ensure!(
        number(queues[0], "depth")? == depth,
        "depth {depth} in ss: {}",
        queues[0]
    );
    ensure!(
        number(queues[0], "limit")? == limit,
        "limit {limit} in ss: {}",
        queues[0]
    );
    ensure!(
        queues[0]["sockets"].as_f64() == Some(sockets as f64),
        "{}",
        queues[0]
    );
    Ok(())
}
