//! TARGETS

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
const SOON: Duration = Duration::from_secs(20);
/// Within this, a new process is found.
const FOUND: Duration = Duration::from_secs(1);

/// A service that takes one connection and is then busy for a minute: the rest wait.
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

    fn usual(args: &[&str]) -> Result<Self> {
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

/// Until so many wait at a port.
fn wait_for_depth(port: u16, depth: u64) -> Result<()> {
    ss::wait_for(None, port, &format!("{depth} to wait"), |waiting| {
        waiting == depth
    })
    .map(drop)
}

/// That there is one target of so many processes with this one accept queue, as `ss` sees it.
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
        "ss says {depth}: {}",
        queues[0]
    );
    ensure!(
        number(queues[0], "limit")? == limit,
        "ss says {limit}: {}",
        queues[0]
    );
    ensure!(
        queues[0]["sockets"].as_f64() == Some(sockets as f64),
        "{}",
        queues[0]
    );
    Ok(())
}
