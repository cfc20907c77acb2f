//! A node agent under churn, for a while: processes and connections that come and go, services whose queues fill and
//! drain, a collector that goes away and comes back. Memory and descriptors stay flat, samples are on time, and what is
//! lost is counted.

use std::{
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use crate::{
    agent::Agent,
    collector::Collector,
    ports,
    process::{End, Process, children_of},
    service::Service,
    temp::TempDir,
    wait,
};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(60);
/// How often memory and descriptors are read.
const READ_INTERVAL: Duration = Duration::from_secs(1);
/// Connections that wait at a service that jams: its accept queue is full.
const JAMMED: u32 = 21;
/// A service jams for this long, and the next one jams after the same time.
const JAM: Duration = Duration::from_secs(4);
/// Growth of memory that is allowed from the second to the last third, as a share and in bytes: the allocator's own, and queues that are
/// known at one time and not at another.
const MEMORY_GROWTH: f64 = 0.05;
const MEMORY_SLACK_BYTES: u64 = 2 << 20;
/// Descriptors that may be open in the last third beyond those of the second: files of control groups, and clients.
const DESCRIPTOR_SLACK: usize = 16;

/// What to do, and what is allowed.
pub struct Plan<'a> {
    pub agent: &'a Path,
    /// The program `tailback-subject`.
    pub subject: &'a Path,
    pub length: Duration,
    /// Processes that exit at once, per second.
    pub processes_per_s: u32,
    /// Connections, each with a listener, a thread and a pipe of its own, per second.
    pub connections_per_s: u32,
    /// Share of samples that may be late.
    pub max_late: f64,
}

/// One process of the agent at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Use {
    memory_bytes: u64,
    descriptors: usize,
}

/// What was measured. `text` is for people.
#[derive(Debug)]
pub struct Outcome {
    pub text: String,
    /// Each bound that was exceeded.
    pub faults: Vec<String>,
}

/// Runs it. `progress` gets a line now and then.
pub fn run(plan: &Plan<'_>, progress: impl Fn(&str)) -> Result<Outcome> {
    let temp = TempDir::new("soak")?;
    let mut collector = Collector::start(ports::free()?)?;
    let config = format!(
        "otlp = \"{}\"\n[signal.http]\nlisten = \"127.0.0.1:{}\"\n",
        collector.url(),
        ports::free()?
    );
    let config = temp.write("tailback.toml", &config)?.display().to_string();
    let mut command = Command::new(plan.agent);
    let agent = Agent::start(command.args(["run", "--all", "--json", "--config", &config]))?;
    // The first report about itself: the agent samples, and its helper and adapter process run.
    agent.wait_for("its own cost", DEADLINE, |event| event.is("agent"))?;
    let pid = agent.process().pid();
    let family: Vec<(String, u32)> = family(pid)?;
    ensure!(
        family.len() >= 3,
        "agent, helper and adapter process: {family:?}"
    );

    let churn = Churn::start(plan)?;
    let begun = Instant::now();
    let mut uses: Vec<Vec<Use>> = Vec::new();
    let mut jam: Option<Service> = None;
    let (mut jams, mut changed) = (0, Instant::now());
    let (mut is_away, mut was_away) = (false, false);
    while begun.elapsed() < plan.length {
        thread::sleep(READ_INTERVAL);
        agent.process().check_running()?;
        churn.check()?;
        uses.push(
            family
                .iter()
                .map(|(_, pid)| of_process(*pid))
                .collect::<Result<_>>()?,
        );
        if changed.elapsed() >= JAM {
            changed = Instant::now();
            jam = match jam {
                Some(_) => None,
                None => {
                    jams += 1;
                    Some(Service::jammed(&mut Command::new(plan.subject), JAMMED)?)
                }
            };
        }
        // Away from a quarter to a half of the time.
        let passed = begun.elapsed().as_secs_f64() / plan.length.as_secs_f64();
        let should_be_away = (0.25..0.5).contains(&passed);
        if should_be_away != is_away {
            progress(if should_be_away {
                "the collector goes away"
            } else {
                "the collector comes back"
            });
            if should_be_away {
                collector.go_away();
            } else {
                collector.come_back()?;
            }
            is_away = should_be_away;
            was_away = true;
        }
        if uses.len().is_multiple_of(60) {
            progress(&format!(
                "{} s: {:?}",
                begun.elapsed().as_secs(),
                uses.last()
            ));
        }
    }
    ensure!(was_away, "too short for the collector to go away");
    let made = churn.end()?;
    drop(jam);
    if is_away {
        collector.come_back()?;
    }

    let mut faults = Vec::new();
    // Every span is delivered or counted as dropped, once the collector answers and the last episodes have ended.
    let last = wait::until_ok("all spans to be accounted for", DEADLINE, || {
        let events = agent.events()?;
        let report = events.iter().rfind(|event| event.is("agent"));
        let report = report.context("no report")?.clone();
        let of = |key: &str| report.number(key).unwrap_or(f64::NAN);
        ensure!(
            of("spans") == of("spans_delivered") + of("spans_dropped") && of("spans") > 0.0,
            "{}",
            report.value
        );
        Ok(report)
    });
    let mut text = format!(
        "{:.0} s: {made}, {jams} jams\n",
        begun.elapsed().as_secs_f64()
    );
    match last {
        Ok(report) => {
            let of = |key: &str| report.number(key).unwrap_or(f64::NAN);
            text += &format!(
                "spans: {} exported, {} delivered, {} dropped and counted; the collector received {}\n",
                of("spans"),
                of("spans_delivered"),
                of("spans_dropped"),
                collector.spans()
            );
            if (collector.spans() as f64) < of("spans_delivered") {
                faults.push("fewer spans were received than are counted as delivered".to_owned());
            }
            let late = of("late_samples") / of("samples").max(1.0);
            text += &format!(
                "samples: {}, {:.2}% late (at most {:.0}%); {:.2}% of a core over the last 10 s\n",
                of("samples"),
                100.0 * late,
                100.0 * plan.max_late,
                100.0 * of("cpu_share")
            );
            if late > plan.max_late {
                faults.push(format!("{:.1}% of the samples are late", 100.0 * late));
            }
        }
        Err(error) => faults.push(format!("{error:#}")),
    }
    for (index, (name, _)) in family.iter().enumerate() {
        let of: Vec<Use> = uses
            .iter()
            .filter_map(|all| all.get(index).copied())
            .collect();
        let (line, fault) = growth(name, &of);
        text += &line;
        faults.extend(fault);
    }
    agent.process().signal(Signal::TERM)?;
    let end = agent.process().wait_end(DEADLINE)?;
    if end != End::Code(0) {
        faults.push(format!("the agent ended with {end:?}"));
    }
    Ok(Outcome { text, faults })
}

/// Compares the second third with the last one; in the first the agent meets everything for the first time.
fn growth(name: &str, uses: &[Use]) -> (String, Vec<String>) {
    let third = uses.len() / 3;
    let most = |part: &[Use]| Use {
        memory_bytes: part.iter().map(|one| one.memory_bytes).max().unwrap_or(0),
        descriptors: part.iter().map(|one| one.descriptors).max().unwrap_or(0),
    };
    let before = most(uses.get(third..2 * third).unwrap_or_default());
    let after = most(uses.get(2 * third..).unwrap_or_default());
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let line = format!(
        "{name}: memory {:.1} MB, then {:.1} MB; descriptors {}, then {}\n",
        mb(before.memory_bytes),
        mb(after.memory_bytes),
        before.descriptors,
        after.descriptors
    );
    let mut faults = Vec::new();
    let allowed = (before.memory_bytes as f64 * (1.0 + MEMORY_GROWTH)) as u64 + MEMORY_SLACK_BYTES;
    if after.memory_bytes > allowed {
        faults.push(format!("the memory of {name} grows: {line}"));
    }
    if after.descriptors > before.descriptors + DESCRIPTOR_SLACK {
        faults.push(format!("the descriptors of {name} grow: {line}"));
    }
    (line, faults)
}

/// The agent, its helper, and the adapter process.
fn family(pid: u32) -> Result<Vec<(String, u32)>> {
    let mut all = vec![("agent".to_owned(), pid)];
    let mut next = vec![pid];
    while let Some(parent) = next.pop() {
        for child in children_of(parent)? {
            let command =
                fs::read(format!("/proc/{child}/cmdline")).context("read a command line")?;
            let second = command.split(|byte| *byte == 0).nth(1).unwrap_or_default();
            all.push((String::from_utf8_lossy(second).into_owned(), child));
            next.push(child);
        }
    }
    Ok(all)
}

fn of_process(pid: u32) -> Result<Use> {
    let path = format!("/proc/{pid}/statm");
    let statm = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let pages: u64 = statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .with_context(|| format!("parse {path}"))?;
    let path = format!("/proc/{pid}/fd");
    let descriptors = fs::read_dir(&path).with_context(|| format!("read {path}"))?;
    Ok(Use {
        memory_bytes: pages * rustix::param::page_size() as u64,
        descriptors: descriptors.count(),
    })
}

/// Processes and connections that come and go.
struct Churn {
    processes: Process,
    connections: Process,
}

impl Churn {
    fn start(plan: &Plan<'_>) -> Result<Self> {
        let start = |name: &str, role: &str, per_s: u32| {
            let per_s = per_s.to_string();
            Process::start(
                name,
                Command::new(plan.subject).args([role, "--per-s", &per_s]),
            )
        };
        Ok(Self {
            processes: start("processes", "short-lived", plan.processes_per_s)?,
            connections: start("connections", "churn", plan.connections_per_s)?,
        })
    }

    fn check(&self) -> Result<()> {
        self.processes.check_running()?;
        self.connections.check_running()
    }

    /// What was made.
    fn end(self) -> Result<String> {
        let last = |process: &Process, word: &str| -> Result<String> {
            let lines = process.lines().all();
            let line = lines.iter().rfind(|line| line.text.contains(word));
            let line = line.with_context(|| format!("{} has made too little", process.name()))?;
            Ok(line.text.split(' ').next().unwrap_or_default().to_owned())
        };
        let (processes, connections) = (
            last(&self.processes, "died")?,
            last(&self.connections, "rounds")?,
        );
        Ok(format!("{processes} processes, {connections} connections"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_in_the_last_third_is_a_fault() {
        let of = |memory_mb: u64, descriptors| Use {
            memory_bytes: memory_mb << 20,
            descriptors,
        };
        let flat = [of(10, 30), of(20, 40), of(21, 45)];
        assert!(growth("agent", &flat).1.is_empty());
        let memory = [of(10, 30), of(20, 40), of(30, 40)];
        assert_eq!(growth("agent", &memory).1.len(), 1);
        let descriptors = [of(10, 30), of(20, 40), of(20, 60)];
        assert_eq!(growth("agent", &descriptors).1.len(), 1);
    }

    #[test]
    fn this_process_has_memory_and_descriptors() {
        let own = of_process(std::process::id()).unwrap();
        assert!(
            own.memory_bytes > 100_000 && own.descriptors >= 3,
            "{own:?}"
        );
    }
}
