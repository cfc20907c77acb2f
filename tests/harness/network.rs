//! Network namespaces: all ports are free, and the counters contain only the test's own traffic.

use std::{
    collections::BTreeMap, fs::File, net::IpAddr, os::fd::AsFd as _, process::Command, thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

use crate::{process::Process, program};

/// A network namespace that exists until drop.
pub struct Network {
    holder: Process,
}

impl Network {
    /// Creates a namespace with its loopback interface up.
    pub fn new() -> Result<Self> {
        let script = "ip link set lo up && echo up && exec sleep infinity";
        let mut command = Command::new(program::need(&["unshare"])?);
        command.args(["--net", "sh", "-c", script]);
        let holder = Process::start("a network namespace", &mut command)?;
        holder.wait_line("up", Duration::from_secs(30))?;
        Ok(Self { holder })
    }

    /// A command that runs a program inside.
    pub fn command(&self, inside: &str) -> Result<Command> {
        let mut command = Command::new(program::need(&["nsenter"])?);
        command
            .arg(format!("--net={}", self.link()))
            .args(["--", inside]);
        Ok(command)
    }

    /// Runs `work` on a thread inside the namespace. Threads and processes that it starts are inside too.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let link = self.link();
        let link = File::open(&link).with_context(|| format!("open {link}"))?;
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                move_into_link_name_space(link.as_fd(), Some(LinkNameSpaceType::Network))
                    .context("enter a network namespace")?;
                work()
            });
            inside
                .join()
                .map_err(|_| anyhow!("the thread in the network namespace panicked"))?
        })
    }

    /// Connects two namespaces with a veth pair, once per pair. Returns the addresses of both ends, ours first.
    pub fn wire(&self, other: &Self) -> Result<(IpAddr, IpAddr)> {
        let peer = other.holder.pid().to_string();
        let wire: [&[&str]; 3] = [
            &[
                "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", &peer,
            ],
            &["addr", "add", "10.77.0.1/24", "dev", "wire"],
            &["link", "set", "wire", "up"],
        ];
        for words in wire {
            self.run("ip", words)?;
        }
        other.run("ip", &["addr", "add", "10.77.0.2/24", "dev", "wire"])?;
        other.run("ip", &["link", "set", "wire", "up"])?;
        Ok(([10, 77, 0, 1].into(), [10, 77, 0, 2].into()))
    }

    /// Limits what this end sends over the veth pair (for example `3mbit`), or removes the limit.
    pub fn limit_wire(&self, rate: Option<&str>) -> Result<()> {
        match rate {
            Some(rate) => self.run(
                "tc",
                &[
                    "qdisc", "replace", "dev", "wire", "root", "tbf", "rate", rate, "burst",
                    "32kb", "latency", "200ms",
                ],
            ),
            None => self.run("tc", &["qdisc", "del", "dev", "wire", "root"]),
        }
    }

    fn run(&self, program: &str, words: &[&str]) -> Result<()> {
        let path = program::need(&[program])?.display().to_string();
        let output = self.command(&path)?.args(words).output();
        let output = output.with_context(|| format!("start {program}"))?;
        ensure!(
            output.status.success(),
            "{program} {}: {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Kernel counters of the namespace by their `nstat` names.
    pub fn counters(&self) -> Result<BTreeMap<String, u64>> {
        let output = self
            .command("nstat")?
            .args(["--ignore", "--noupdate", "--zeros", "--json"])
            .output()
            .context("run nstat")?;
        let output_text = || String::from_utf8_lossy(&output.stdout).into_owned();
        let counters: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("parse the output of nstat: {:?}", output_text()))?;
        let counters = counters["kernel"]
            .as_object()
            .with_context(|| format!("no counters in the output of nstat: {:?}", output_text()))?;
        let known = counters
            .iter()
            .filter_map(|(name, count)| Some((name.clone(), count.as_u64()?)));
        Ok(known.collect())
    }

    fn link(&self) -> String {
        format!("/proc/{}/ns/net", self.holder.pid())
    }
}
