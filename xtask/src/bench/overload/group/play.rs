//! The scenarios of two servers.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use tailback_tests::wait;

use super::{
    super::{
        outcome::{Bound, Measure, Outcome},
        run::Run,
        scenario::Scenario,
        shedding::{POLL_INTERVAL, TTL},
    },
    Capacity, Group, Mover,
};

/// Load when the agent dies while one server is slow, relative to the capacity of both. With even shares, the slow server gets 5%
/// more than it can take. At a higher load, the work that piles up on it during the absence would decide the figures after the
/// return: nobody can withdraw it.
const AGENT_LOAD: f64 = 0.7;
/// Load while the second server stalls, relative to the capacity of the other one.
const STALLED_LOAD: f64 = 0.8;
/// Deadline for the consumer to act.
const ACT_DEADLINE: Duration = Duration::from_secs(10);

/// What happens to the second server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    HalfSpeed,
    Stall,
}

/// Two servers in one scenario.
pub(super) struct Subject {
    pub mover: Mover,
    pub capacity: Capacity,
    pub group: Box<dyn Group>,
}

impl Mover {
    /// The trouble that it reacts to. `/ready` reports full servers only, and a slow one is hardly ever full.
    fn trouble(self) -> Trouble {
        match self {
            Self::Ready | Self::EnvoyReady => Trouble::Stall,
            _ => Trouble::HalfSpeed,
        }
    }

    /// How long after the death of the agent its signal may still be in force.
    fn fail_open_within(self) -> Duration {
        match self {
            // The client forgets a weight after a second and reports once a second.
            Self::Orca => TTL + Duration::from_secs(2) + 2 * POLL_INTERVAL,
            // Two successful checks are needed.
            Self::Ready => TTL + 3 * POLL_INTERVAL,
            _ => TTL + 2 * POLL_INTERVAL,
        }
    }
}

impl Subject {
    pub fn play(mut self, run: &Run, scenario: Scenario) -> Result<Outcome> {
        let measures = match scenario {
            Scenario::SlowServer(load) => self.trouble(run, Trouble::HalfSpeed, load)?,
            Scenario::StalledServer => self.trouble(run, Trouble::Stall, STALLED_LOAD)?,
            Scenario::AgentDies => self.agent_dies(run)?,
            Scenario::AgentReturns => self.agent_returns(run)?,
            _ => bail!("two servers do not play this scenario"),
        };
        Ok(Outcome(measures))
    }

    /// Starts the load and, after the baseline, the trouble. Returns the load in requests per second; the servers together can carry
    /// it.
    fn begin(&mut self, run: &Run, trouble: Trouble, load: f64) -> Result<f64> {
        let capacity = match trouble {
            Trouble::HalfSpeed => self.capacity.healthy + self.capacity.slow,
            Trouble::Stall => self.capacity.healthy,
        };
        let per_s = load * capacity;
        self.group.start_load(run, per_s)?;
        thread::sleep(run.phases.baseline);
        match trouble {
            Trouble::HalfSpeed => self.group.slow_down()?,
            Trouble::Stall => self.group.stall()?,
        }
        Ok(per_s)
    }

    /// Like [`Subject::begin`] with the trouble that the consumer reacts to. Returns once it has moved load.
    fn begin_and_act(&mut self, run: &Run) -> Result<f64> {
        let trouble = self.mover.trouble();
        let load = match trouble {
            Trouble::HalfSpeed => AGENT_LOAD,
            Trouble::Stall => STALLED_LOAD,
        };
        let per_s = self.begin(run, trouble, load)?;
        thread::sleep(run.phases.settle + run.phases.before_death);
        wait::until("the consumer to move load", ACT_DEADLINE, || {
            Ok((!self.group.is_even()?).then_some(()))
        })?;
        Ok(per_s)
    }

    fn trouble(&mut self, run: &Run, trouble: Trouble, load: f64) -> Result<Vec<Measure>> {
        let per_s = self.begin(run, trouble, load)?;
        thread::sleep(run.phases.settle);
        let (from, before) = (Instant::now(), self.group.completed()?);
        thread::sleep(run.phases.load);
        let (to, after) = (Instant::now(), self.group.completed()?);
        thread::sleep(run.phases.drain);
        let [first, second] = [0, 1].map(|server| after[server] - before[server]);
        let mut measures = self.measures(from, to, per_s, 95.0)?;
        measures.push(Measure::percent(
            "of the second server",
            second / (first + second).max(1.0),
        ));
        Ok(measures)
    }

    /// Goodput relative to the load, and latency.
    fn measures(
        &self,
        from: Instant,
        to: Instant,
        per_s: f64,
        min_percent: f64,
    ) -> Result<Vec<Measure>> {
        let responses = self.group.responses(from..to)?;
        let goal = self
            .mover
            .has_agent()
            .then_some(Bound::AtLeast(min_percent));
        let goodput = Measure::percent("goodput", responses.good_per_s / per_s).goal(goal);
        let p99 = responses.p99_ms.map(|ms| Measure::number("p99", "ms", ms));
        Ok([goodput].into_iter().chain(p99).collect())
    }

    /// Kills the agents and measures how long their last signal stays in force.
    fn agent_dies(&mut self, run: &Run) -> Result<Vec<Measure>> {
        self.begin_and_act(run)?;
        let death = Instant::now();
        for agent in self.group.agents() {
            agent.kill_agent()?;
        }
        let open = wait::until("both servers to be treated alike", run.phases.dead, || {
            Ok(self.group.is_even()?.then(|| death.elapsed()))
        });
        let within = self.mover.fail_open_within().as_secs_f64();
        let open = open.unwrap_or(run.phases.dead);
        Ok(vec![
            Measure::seconds("fail-open time", open).goal(Bound::AtMost(within)),
        ])
    }

    /// Kills the agents, starts them again, and measures once their first pages are alive.
    fn agent_returns(&mut self, run: &Run) -> Result<Vec<Measure>> {
        let per_s = self.begin_and_act(run)?;
        for agent in self.group.agents() {
            agent.kill_agent()?;
        }
        thread::sleep(run.phases.dead);
        let started = Instant::now();
        for agent in self.group.agents() {
            agent.start_agent()?;
        }
        let alive = Instant::now();
        thread::sleep(run.phases.returned);
        let end = Instant::now();
        thread::sleep(run.phases.drain);
        let mut measures = self.measures(alive, end, per_s, 90.0)?;
        measures.push(Measure::seconds("page alive after", alive - started));
        Ok(measures)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mover_is_given_the_time_to_live_to_fail_open() {
        for mover in [
            Mover::Weight,
            Mover::Maxconn,
            Mover::Ready,
            Mover::EnvoyReady,
            Mover::Orca,
        ] {
            assert!(mover.has_agent() && mover.fail_open_within() > TTL);
        }
    }
}
