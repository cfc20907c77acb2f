//! Samples this process with `tailback sample --json` and compares each sample with the known truth.

use std::{
    process::{self, Command},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tailback_tests::{
    agent::{self, Agent},
    lines::unix_ns,
    process::End,
};

use crate::{course::Course, report::Report};

/// Deadline for the agent to start and to exit. Long, because emulated machines are slow.
const AGENT_DEADLINE: Duration = Duration::from_secs(60);
/// Minimum age, ns, before ages are compared: a sampling interval (100 ms) is then a small part of it.
pub const SETTLED_NS: u64 = 500_000_000;

/// Key added to each line: when it was received, ns since 1970. The agent read the queue between the line's own time and
/// this.
const RECEIVED: &str = "received_unix_ns";

/// All samples of one run of the agent.
pub struct Samples {
    /// Times of the samples, ns since 1970. The first reports no queues.
    times: Vec<u64>,
    queues: Vec<Value>,
}

/// Lets the agent sample this process every 100 ms for `duration`, and runs `action` once it has begun.
pub fn during<T>(duration: Duration, action: impl FnOnce() -> Result<T>) -> Result<(Samples, T)> {
    let pid = process::id().to_string();
    let duration = format!("{}ms", duration.as_millis());
    let mut command = Command::new(agent::binary()?);
    command.args(["sample", "--json", "--pid", &pid, "--duration", &duration]);
    let agent = Agent::start(&mut command)?;
    let began = agent.wait_for("its target", AGENT_DEADLINE, |event| event.is("target"));
    let began = began.map_err(|error| anyhow::anyhow!("{error:#}: {}", last_lines(&agent)))?;
    let done = action()?;
    let end = agent.process().wait_end(AGENT_DEADLINE)?;
    // The process may end before its last line is read.
    let lines = agent.process().lines();
    let second = Duration::from_secs(1);
    let _ = lines.wait("the end of the output", usize::MAX, second, |_| None::<()>);
    if end != End::Code(0) {
        bail!("tailback ended with {end:?}: {}", last_lines(&agent));
    }
    let began_ns = began.value["time_unix_ns"].as_u64();
    let mut times = vec![began_ns.context("the target line has no time")?];
    let events = agent.events()?.into_iter();
    let queues = events.filter(|event| event.is("queue"));
    let queues: Vec<Value> = queues
        .map(|event| {
            let mut value = event.value;
            value[RECEIVED] = event.unix_ns.into();
            value
        })
        .collect();
    times.extend(queues.iter().map(time_ns));
    times.dedup();
    let samples = Samples { times, queues };
    Ok((samples, done))
}

/// Lets the agent sample a state that does not change.
pub fn steady(duration: Duration) -> Result<Samples> {
    during(duration, || Ok(())).map(|(samples, ())| samples)
}

fn last_lines(agent: &Agent) -> String {
    let lines = agent.process().lines().all();
    let last: Vec<String> = lines.into_iter().map(|line| line.text).collect();
    last[last.len().saturating_sub(3)..].join("; ")
}

impl Samples {
    /// Time of the first sample, ns since 1970.
    pub fn began_ns(&self) -> u64 {
        self.times.first().copied().unwrap_or(0)
    }

    /// One queue in every sample: the deepest of this kind with a `wanted` name. The error lists the names that exist.
    pub fn queue(&self, kind: &str, wanted: impl Fn(&str) -> bool) -> Result<Queue<'_>, String> {
        let mut of_kind: Vec<&Value> = self
            .queues
            .iter()
            .filter(|line| line["kind"] == kind)
            .collect();
        let mut names: Vec<&str> = of_kind
            .iter()
            .filter_map(|line| line["name"].as_str())
            .collect();
        names.sort_unstable();
        names.dedup();
        let names = format!("no such queue; {kind} queues: {names:?}");
        of_kind.retain(|line| line["name"].as_str().is_some_and(&wanted));
        let mut samples: Vec<&Value> = Vec::new();
        for line in of_kind {
            match samples.last_mut() {
                Some(last) if time_ns(last) == time_ns(line) => {
                    if line["depth"].as_u64() > last["depth"].as_u64() {
                        *last = line;
                    }
                }
                _ => samples.push(line),
            }
        }
        if samples.is_empty() {
            return Err(names);
        }
        Ok(Queue {
            times: &self.times,
            samples,
        })
    }
}

/// When a line was received, ns since 1970.
pub fn received_ns(line: &Value) -> u64 {
    line[RECEIVED].as_u64().unwrap_or(u64::MAX)
}

/// One queue, sample by sample.
#[derive(Clone)]
pub struct Queue<'a> {
    /// Times of all samples, including those without this queue.
    times: &'a [u64],
    pub samples: Vec<&'a Value>,
}

/// Time of a sample, ns since 1970.
pub fn time_ns(line: &Value) -> u64 {
    line["time_unix_ns"].as_u64().unwrap_or(0)
}

impl<'a> Queue<'a> {
    /// Samples of the queue between the two moments.
    pub fn within(&self, from_ns: u64, to_ns: u64) -> Vec<&'a Value> {
        let within = |line: &&&Value| (from_ns..=to_ns).contains(&time_ns(line));
        self.samples.iter().filter(within).copied().collect()
    }

    /// Each sample with the time of the sample before and its own.
    pub fn windows(&self) -> impl Iterator<Item = (&'a Value, u64, u64)> {
        self.samples.iter().map(|line| {
            let at_ns = time_ns(line);
            (*line, self.last_before(at_ns), at_ns)
        })
    }

    /// Time of the last sample before a moment, else of the first.
    fn last_before(&self, at_ns: u64) -> u64 {
        let before = self.times.iter().rev().find(|time| **time < at_ns);
        before.or(self.times.first()).copied().unwrap_or(0)
    }

    /// Interval between the samples around a moment, ns.
    pub fn interval_ns(&self, at_ns: u64) -> u64 {
        let after = self.times.iter().find(|time| **time >= at_ns);
        after.map_or(0, |after| after - self.last_before(*after))
    }

    /// Start of the window of a rate reported at `at_ns`: rates cover the last second, in whole sampling intervals.
    fn rate_since_ns(&self, at_ns: u64) -> u64 {
        const SECOND_NS: u64 = 1_000_000_000;
        self.last_before(at_ns - SECOND_NS + 1)
    }
}

/// The queue, or the reason why there is none.
pub type Sampled<'a> = Result<Queue<'a>, String>;

/// Compares a queue that has not changed since `since_ns`, at every sample until now. `keys` holds (quantity of the report,
/// key of the line, truth).
pub fn compare_steady(
    report: &mut Report,
    queue: &Sampled<'_>,
    since_ns: u64,
    keys: &[(&str, &str, f64)],
) {
    let samples = within(queue, since_ns, unix_ns());
    for (quantity, key, truth) in keys {
        compare_each(report, &samples, quantity, |_| *truth, key);
    }
}

/// Compares the age of an item that waits from `waits_since_ns` until `until_ns`.
pub fn compare_age(
    report: &mut Report,
    queue: &Sampled<'_>,
    (waits_since_ns, until_ns): (u64, u64),
    quantity: &str,
) {
    let interval_ns = queue
        .as_ref()
        .map_or(0, |queue| queue.interval_ns(waits_since_ns));
    match within(queue, waits_since_ns + SETTLED_NS, until_ns) {
        Ok(samples) => {
            for line in samples {
                let truth = time_ns(line).saturating_sub(waits_since_ns) as f64;
                report.key(quantity, truth, line, "oldest_age_ns", interval_ns);
            }
        }
        Err(reason) => report.absent(quantity, &reason),
    }
}

/// Compares a rate with a count, at every sample whose whole window the count covers.
pub fn compare_rate(
    report: &mut Report,
    queue: &Sampled<'_>,
    course: &Course,
    (quantity, key): (&str, &str),
) {
    let (from, to) = course.range_ns();
    let selected = match queue {
        Ok(queue) => within(&Ok(queue.clone()), from, to).map(|samples| (queue, samples)),
        Err(reason) => Err(reason.clone()),
    };
    let mut compared = false;
    if let Ok((queue, samples)) = &selected {
        for line in samples {
            let (since_ns, at_ns) = (queue.rate_since_ns(time_ns(line)), time_ns(line));
            // The window is a second, or longer after late samples. The first, shorter windows are skipped: their edges weigh
            // too much.
            if since_ns >= from {
                let truth = course.per_second(since_ns, at_ns);
                report.key(quantity, truth, line, key, 0);
                compared = true;
            }
        }
    }
    if !compared {
        let reason = selected.err();
        let reason = reason.unwrap_or_else(|| "no sample whose window the count covers".to_owned());
        report.compare(quantity, course.per_second(from, to), None, &reason);
    }
}

/// Samples of the queue between the two moments; an error if there are none.
pub fn within<'a>(queue: &Sampled<'a>, from_ns: u64, to_ns: u64) -> Result<Vec<&'a Value>, String> {
    let samples = queue.as_ref().map_err(Clone::clone)?.within(from_ns, to_ns);
    if samples.is_empty() {
        return Err("no sample of this queue in that time".to_owned());
    }
    Ok(samples)
}

/// Compares a key in each of these samples.
pub fn compare_each(
    report: &mut Report,
    samples: &Result<Vec<&Value>, String>,
    quantity: &str,
    truth: impl Fn(&Value) -> f64,
    key: &str,
) {
    match samples {
        Ok(samples) => {
            for line in samples {
                report.key(quantity, truth(line), line, key, 0);
            }
        }
        // `Null` asks for the truth without a sample.
        Err(reason) => report.compare(quantity, truth(&Value::Null), None, reason),
    }
}
