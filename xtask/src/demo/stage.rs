//! The service, what it depends on, who asks it, and who watches.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tailback_tests::{
    agent::Agent,
    lines::{Line, Stream},
    load::{Load, Plan, Request, Spacing},
    process::Process,
    redis::{Hog, Redis},
    uwsgi::{Options, Uwsgi},
};

pub const WORKERS: u32 = 4;
pub const BACKLOG: u32 = 100;
/// A request's own work, beside its call to Redis.
pub const WORK: Duration = Duration::from_millis(60);
pub const PER_S: f64 = 40.0;
/// For so long Redis is busy, again and again. A request then waits for the end of such a stretch, so that
/// 4 workers serve 4 requests in each: 33 a second, fewer than come in.
pub const SLOW: Duration = Duration::from_millis(120);
/// Between two stretches: with none, Redis finds the next script together with the waiting calls, and some of
/// them wait for that one, too.
const GAP: Duration = Duration::from_millis(2);

/// What the workers can serve in a second while Redis is fast.
pub fn capacity_per_s() -> f64 {
    f64::from(WORKERS) / WORK.as_secs_f64()
}

/// All that runs. It ends with its owner.
pub struct Stage {
    pub agent: Agent,
    pub load: Load,
    pub uwsgi: Uwsgi,
    pub redis: Redis,
}

impl Stage {
    pub fn set(agent: &Path) -> Result<Self> {
        let redis = Redis::start()?;
        let uwsgi = Uwsgi::start(&Options {
            workers: WORKERS,
            backlog: BACKLOG,
            redis_port: redis.port(),
            calls: 1,
            work: WORK,
        })?;
        let load = Load::start(Plan {
            to: uwsgi.address(),
            path: "/".to_owned(),
            per_s: PER_S,
            spacing: Spacing::Even,
            lasts: Duration::from_secs(120),
            timeout: Duration::from_secs(15),
            at_once: 1000,
        })?;
        let agent = Agent::start(
            Command::new(agent)
                .args(["run", "--json", "--port"])
                .arg(uwsgi.port().to_string()),
        )?;
        Ok(Self {
            agent,
            load,
            uwsgi,
            redis,
        })
    }

    pub fn slow_redis(&self) -> Result<Hog> {
        self.redis.hog(SLOW, GAP)
    }

    /// The accept queue as `tailback sample` shows it.
    pub fn sample(&self, agent: &Path) -> Result<Value> {
        let mut command = Command::new(agent);
        command
            .args(["sample", "--json", "--port"])
            .arg(self.uwsgi.port().to_string());
        let sample = Agent::start(&mut command)?;
        let queue = sample.wait_for("the accept queue", Duration::from_secs(10), |event| {
            event.is("queue") && event.text("kind") == "accept"
        })?;
        Ok(queue.value)
    }

    /// All are as alive as they should be.
    pub fn check(&self) -> Result<()> {
        let agent = self.agent.process();
        if let Some(end) = agent.ended()? {
            bail!("tailback ended with {end:?}:\n{}", errors_of(agent));
        }
        self.uwsgi.process().check_running()?;
        self.redis.process().check_running()
    }

    /// The requests that ended in the last `window`.
    pub fn answered(&self, window: Duration) -> Vec<Request> {
        let mut done = self.load.done();
        done.retain(|request| request.ended.elapsed() < window);
        done
    }

    /// How many wait, by uWSGI's own account.
    pub fn uwsgi_queue(&self) -> Result<u64> {
        let stats = self.uwsgi.stats()?;
        let depth = stats.get("listen_queue").and_then(Value::as_u64);
        depth.context("uWSGI's stats have no listen_queue")
    }
}

/// What it wrote to standard error.
pub fn errors_of(process: &Process) -> String {
    let errors =
        |line: &Line| (line.stream == Stream::Stderr).then(|| format!("    {}\n", line.text));
    process.lines().all().iter().filter_map(errors).collect()
}
