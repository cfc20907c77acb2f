//! Memory and CPU use of the agent according to the kernel, independent of what the agent reports about itself.

use std::{
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::json;
use tailback_tests::agent::Agent;

use super::{
    cpu,
    figure::{Figure, Goal, Report},
    hold,
    statistics::{Spread, quartiles},
};

/// (sockets, goal for resident memory in MB, goal for CPU use in percent of one core).
const SIZES: [(usize, f64, Option<f64>); 2] = [(1_000, 25.0, Some(1.0)), (20_000, 60.0, None)];
/// CPU use is measured in intervals of this length.
const INTERVAL: Duration = Duration::from_secs(2);
/// Meaning of the spread.
pub const INTERVALS: &str = "over the whole time, and quartiles of 2 s intervals";

#[derive(clap::Args)]
pub struct Args {
    /// Duration of the measurement at each size, in seconds
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(20..))]
    seconds: u32,
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let program = super::agent()?;
    for (sockets, memory_goal, cpu_goal) in SIZES {
        report.progress(&format!("{sockets} sockets, {} s …", args.seconds));
        let holders = hold::sockets(sockets)?;
        let mut command = Command::new(&program);
        command
            .args(["run", "--json"])
            .args(hold::targets(&holders));
        let agent = Agent::start(&mut command)?;
        super::pairs::wait_for_first_line(&agent)?;

        let pid = agent.process().pid();
        let cpu = cpu_share(&agent, Duration::from_secs(u64::from(args.seconds)))?;
        let keys = |measured: &str| json!({"bench": "footprint", "measured": measured, "sockets": sockets});
        let thousands = format!("{},000 sockets", sockets / 1000);
        report.add(Figure {
            what: format!("{thousands}: CPU, share of one core"),
            keys: keys("cpu"),
            unit: "%",
            value: cpu,
            spread: INTERVALS,
            goal: cpu_goal.map(|goal| Goal::at_most(goal, &cpu)),
        });
        for (name, field, goal) in [
            ("resident", "VmRSS", Some(memory_goal)),
            ("peak resident", "VmHWM", None),
        ] {
            let mb = status_kb(pid, field)? * 1024.0 / 1e6;
            let value = Spread {
                low: mb,
                median: mb,
                high: mb,
            };
            report.add(Figure {
                what: format!("{thousands}: memory, {name}"),
                keys: keys(field),
                unit: "MB",
                value,
                spread: "",
                goal: goal.map(|goal| Goal::at_most(goal, &value)),
            });
        }
    }
    Ok(())
}

/// CPU use in percent of one core: over the whole time, with the quartiles of intervals as spread.
pub fn cpu_share(agent: &Agent, length: Duration) -> Result<Spread> {
    let pid = agent.process().pid();
    let mut shares = Vec::new();
    let end = Instant::now() + length;
    let first = (Instant::now(), cpu::of_process(pid)?);
    while Instant::now() < end {
        let (before, used) = (Instant::now(), cpu::of_process(pid)?);
        thread::sleep(INTERVAL);
        agent.process().check_running()?;
        shares.push(percent(cpu::of_process(pid)? - used, before.elapsed()));
    }
    let whole = percent(cpu::of_process(pid)? - first.1, first.0.elapsed());
    let spread = quartiles(&shares).context("nothing was measured")?;
    Ok(Spread {
        median: whole,
        low: spread.low.min(whole),
        high: spread.high.max(whole),
    })
}

fn percent(used: Duration, of: Duration) -> f64 {
    100.0 * used.as_secs_f64() / of.as_secs_f64()
}

/// A field of /proc/PID/status that is in kB.
pub fn status_kb(pid: u32, field: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    number.with_context(|| format!("read {field} in {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory() {
        assert!(status_kb(std::process::id(), "VmRSS").unwrap() > 100.0);
    }
}
