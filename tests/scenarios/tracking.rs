//! Scenarios of connection tracking.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpStream},
    os::fd::AsFd as _,
    process::Command,
    thread,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::{
    process::{Signal, getppid},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tailback_tests::{cleanup, ports, program, redis::Redis};

use crate::{
    play::{Culprit, Play},
    programs::load,
    shared,
};

/// Maximum number of connections in the table of every network namespace of the machine. It can be set only in the first one.
const LIMIT: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// More than these fit into the table until the fault is planted.
const IDLE_CONNECTIONS: usize = 200;

/// A neighbour's idle connections fill the table, so that new ones to Redis find no room.
pub fn table_full(play: &mut Play) -> Result<()> {
    let redis = Redis::start()?;
    let (server, address) = shared::workers("redis", &redis.port().to_string())?;
    track_all_but(address)?;
    let neighbours = idle(ports::local(redis.port()))?;
    let load = load(address, "/", 30.0)?;
    play.watch_pid(server.process.pid())?;
    play.healthy()?;
    play.planted(Culprit::default().or("connection tracking table"));
    let limit = Limit::set(neighbours.len() / 2)?;
    server.process.signal(Signal::USR1)?;
    play.hold()?;
    play.removing(Some(&load));
    drop(limit);
    server.process.signal(Signal::USR2)?;
    play.recover()
}

/// Tracks the connections of this network namespace, but not those to this address.
fn track_all_but(address: SocketAddr) -> Result<()> {
    let port = address.port().to_string();
    let rules: [&[&str]; 3] = [
        &[
            "-t", "raw", "-A", "OUTPUT", "-p", "tcp", "--dport", &port, "-j", "NOTRACK",
        ],
        &[
            "-t", "raw", "-A", "OUTPUT", "-p", "tcp", "--sport", &port, "-j", "NOTRACK",
        ],
        &[
            "-A",
            "OUTPUT",
            "-m",
            "conntrack",
            "--ctstate",
            "INVALID",
            "-j",
            "ACCEPT",
        ],
    ];
    for rule in rules {
        let status = Command::new(program::need(&["iptables"])?)
            .args(rule)
            .status();
        let is_set = status.context("run iptables")?.success();
        ensure!(is_set, "iptables {} failed", rule.join(" "));
    }
    Ok(())
}

fn idle(address: SocketAddr) -> Result<Vec<TcpStream>> {
    let connect = |_| TcpStream::connect(address).context("connect to Redis");
    (0..IDLE_CONNECTIONS).map(connect).collect()
}

/// A limit of all tables of the machine, until drop.
struct Limit {
    before: String,
}

impl Limit {
    fn set(limit: usize) -> Result<Self> {
        let before = write(None)?;
        let set = Self {
            before: before.clone(),
        };
        // A signal ends this process without drop.
        cleanup::on_interrupt(move || drop(Self { before }));
        write(Some(&limit.to_string()))?;
        Ok(set)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        if let Err(error) = write(Some(self.before.trim())) {
            eprintln!("{LIMIT} was {}: {error:#}", self.before);
        }
    }
}

/// Reads the limit, and sets it, in the network namespace of the process that started this one.
fn write(limit: Option<&str>) -> Result<String> {
    let limit = limit.map(str::to_owned);
    let parent = getppid().context("no parent")?;
    let link = format!("/proc/{}/ns/net", parent.as_raw_nonzero());
    let link = File::open(&link).with_context(|| format!("open {link}"))?;
    let outside = thread::spawn(move || {
        move_into_link_name_space(link.as_fd(), Some(LinkNameSpaceType::Network))
            .context("enter the network namespace of the parent")?;
        if let Some(limit) = limit {
            fs::write(LIMIT, limit).with_context(|| format!("write {LIMIT}"))?;
        }
        fs::read_to_string(LIMIT).with_context(|| format!("read {LIMIT}"))
    });
    outside.join().map_err(|_| anyhow!("the thread panicked"))?
}
