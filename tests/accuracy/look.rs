//! What the agent says of this process: `tailback sample --json`, look by look.

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

/// How long the agent may take to start on an emulated machine, and to end.
const SOON: Duration = Duration::from_secs(60);
/// A queue must have stood for so long before its age is compared: a tick is a small part of it then.
pub const SETTLED_NS: u64 = 500_000_000;

/// When a line came from the agent, ns since 1970: what it tells was looked at between its own time and this.
const HEARD: &str = "heard_unix_ns";

/// The looks of a while.
pub struct Looks {
    /// When they were, ns since 1970. The first tells no queues.
    times: Vec<u64>,
    queues: Vec<Value>,
}

/// The agent looks for this long, every 100 ms; once it has begun, `action` is done.
pub fn during<T>(duration: Duration, action: impl FnOnce() -> Result<T>) -> Result<(Looks, T)> {
    let pid = process::id().to_string();
    let duration = format!("{}ms", duration.as_millis());
    let mut command = Command::new(agent::binary()?);
    command.args(["sample", "--json", "--pid", &pid, "--duration", &duration]);
    let agent = Agent::start(&mut command)?;
    let began = agent.wait_for("whom it watches", SOON, |event| event.is("target"));
    let began = began.map_err(|error| anyhow::anyhow!("{error:#}: {}", said(&agent)))?;
    let done = action()?;
    let end = agent.process().wait_end(SOON)?;
    // The end of the process may be seen before its last line.
    let lines = agent.process().lines();
    let second = Duration::from_secs(1);
    let _ = lines.wait("the end of the output", usize::MAX, second, |_| None::<()>);
    if end != End::Code(0) {
        bail!("tailback ended with {end:?}: {}", said(&agent));
    }
    let began_ns = began.value["time_unix_ns"].as_u64();
    let mut times = vec![began_ns.context("the target has no time")?];
    let events = agent.events()?.into_iter();
    let queues = events.filter(|event| event.is("queue"));
    let queues: Vec<Value> = queues
        .map(|event| {
            let mut value = event.value;
            value[HEARD] = event.unix_ns.into();
            value
        })
        .collect();
    times.extend(queues.iter().map(time_ns));
    times.dedup();
    let looks = Looks { times, queues };
    Ok((looks, done))
}

/// The agent looks for this long at what stands already.
pub fn at(duration: Duration) -> Result<Looks> {
    during(duration, || Ok(())).map(|(looks, ())| looks)
}

fn said(agent: &Agent) -> String {
    let lines = agent.process().lines().all();
    let last: Vec<String> = lines.into_iter().map(|line| line.text).collect();
    last[last.len().saturating_sub(3)..].join("; ")
}

impl Looks {
    /// When the first was.
    pub fn began_ns(&self) -> u64 {
        self.times.first().copied().unwrap_or(0)
    }

    /// One queue at every look: of those of this kind whose name is `wanted` the deepest. Where no look has it, why.
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
        let mut looks: Vec<&Value> = Vec::new();
        for line in of_kind {
            match looks.last_mut() {
                Some(last) if time_ns(last) == time_ns(line) => {
                    if line["depth"].as_u64() > last["depth"].as_u64() {
                        *last = line;
                    }
                }
                _ => looks.push(line),
            }
        }
        if looks.is_empty() {
            return Err(names);
        }
        Ok(Queue {
            times: &self.times,
            looks,
        })
    }
}

pub fn heard_ns(line: &Value) -> u64 {
    line[HEARD].as_u64().unwrap_or(u64::MAX)
}

/// One queue, look by look.
#[derive(Clone)]
pub struct Queue<'a> {
    /// Of all looks, also those that did not see it.
    times: &'a [u64],
    pub looks: Vec<&'a Value>,
}

pub fn time_ns(line: &Value) -> u64 {
    line["time_unix_ns"].as_u64().unwrap_or(0)
}

impl<'a> Queue<'a> {
    /// The looks within this time.
    pub fn within(&self, from_ns: u64, to_ns: u64) -> Vec<&'a Value> {
        let within = |line: &&&Value| (from_ns..=to_ns).contains(&time_ns(line));
        self.looks.iter().filter(within).copied().collect()
    }

    /// Each look with its time and that of the look before.
    pub fn windows(&self) -> impl Iterator<Item = (&'a Value, u64, u64)> {
        self.looks.iter().map(|line| {
            let at_ns = time_ns(line);
            (*line, self.last_before(at_ns), at_ns)
        })
    }

    /// The last look before a moment; without one, the first.
    fn last_before(&self, at_ns: u64) -> u64 {
        let before = self.times.iter().rev().find(|time| **time < at_ns);
        before.or(self.times.first()).copied().unwrap_or(0)
    }

    /// Between the looks around a moment.
    pub fn tick_ns(&self, at_ns: u64) -> u64 {
        let after = self.times.iter().find(|time| **time >= at_ns);
        after.map_or(0, |after| after - self.last_before(*after))
    }

    /// When the window of the rate that a look tells began: rates are counted over the last second, in whole ticks.
    fn rate_since_ns(&self, at_ns: u64) -> u64 {
        const SECOND_NS: u64 = 1_000_000_000;
        self.last_before(at_ns - SECOND_NS + 1)
    }
}

/// What a report is made from: the queue, or why there is none.
pub type Seen<'a> = Result<Queue<'a>, String>;

/// A queue that stands still since `since_ns`, at every look until now: `keys` are the quantities of the report with
/// the key of the line and the truth.
pub fn standing(report: &mut Report, queue: &Seen<'_>, since_ns: u64, keys: &[(&str, &str, f64)]) {
    let looks = within(queue, since_ns, unix_ns());
    for (quantity, key, truth) in keys {
        each(report, &looks, quantity, |_| *truth, key);
    }
}

/// The age of what waits since `waits_since_ns` and until `until_ns`.
pub fn age(
    report: &mut Report,
    queue: &Seen<'_>,
    (waits_since_ns, until_ns): (u64, u64),
    quantity: &str,
) {
    let tick_ns = queue
        .as_ref()
        .map_or(0, |queue| queue.tick_ns(waits_since_ns));
    match within(queue, waits_since_ns + SETTLED_NS, until_ns) {
        Ok(looks) => {
            for line in looks {
                let truth = time_ns(line).saturating_sub(waits_since_ns) as f64;
                report.key(quantity, truth, line, "oldest_age_ns", tick_ns);
            }
        }
        Err(said) => report.absent(quantity, &said),
    }
}

/// A rate against a count, at every look for which the count is known over the whole window.
pub fn rate(report: &mut Report, queue: &Seen<'_>, course: &Course, (quantity, key): (&str, &str)) {
    let (from, to) = course.range_ns();
    let told = match queue {
        Ok(queue) => within(&Ok(queue.clone()), from, to).map(|looks| (queue, looks)),
        Err(said) => Err(said.clone()),
    };
    let mut compared = false;
    if let Ok((queue, looks)) = &told {
        for line in looks {
            let (since_ns, at_ns) = (queue.rate_since_ns(time_ns(line)), time_ns(line));
            // A second, or longer where looks came late. What is told over less at first is not compared: its edges weigh too much.
            if since_ns >= from {
                let truth = course.per_second(since_ns, at_ns);
                report.key(quantity, truth, line, key, 0);
                compared = true;
            }
        }
    }
    if !compared {
        let said = told.err();
        let said = said.unwrap_or_else(|| "no look whose window is known".to_owned());
        report.compare(quantity, course.per_second(from, to), None, &said);
    }
}

pub fn within<'a>(queue: &Seen<'a>, from_ns: u64, to_ns: u64) -> Result<Vec<&'a Value>, String> {
    let looks = queue.as_ref().map_err(Clone::clone)?.within(from_ns, to_ns);
    if looks.is_empty() {
        return Err("no look at this queue in that time".to_owned());
    }
    Ok(looks)
}

/// Compares a key at each of these looks.
pub fn each(
    report: &mut Report,
    looks: &Result<Vec<&Value>, String>,
    quantity: &str,
    truth: impl Fn(&Value) -> f64,
    key: &str,
) {
    match looks {
        Ok(looks) => {
            for line in looks {
                report.key(quantity, truth(line), line, key, 0);
            }
        }
        // What it is when nobody looks.
        Err(said) => report.compare(quantity, truth(&Value::Null), None, said),
    }
}
