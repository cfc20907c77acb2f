//! The scenarios that every consumer plays, and how long their phases take.

use std::time::Duration;

use super::group;

/// Time to start the servers of a scenario, for the estimate: 13 s for 15 starts, measured on 2 CPUs.
const START: Duration = Duration::from_secs(1);
/// Shortest measurement beside a CPU neighbour, so that the time after the change outweighs the change itself.
const MIN_NEIGHBOUR: Duration = Duration::from_secs(10);

/// What happens to the service.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scenario {
    /// Offered load relative to the capacity, reached in one step.
    Load(f64),
    /// A few seconds of overload.
    Spike,
    /// Overload, then a CPU neighbour with this many threads on the service's CPU.
    LostCpu(u32),
    /// One of two servers becomes half as fast. Offered load relative to the capacity of both after that.
    SlowServer(f64),
    /// All workers of one of two servers stop.
    StalledServer,
    /// A day's load, to which the number of instances is adapted.
    Day,
    /// While the consumer acts (on overload at 2× the capacity, or on a slow or stalled server), the agent is killed.
    AgentDies,
    /// The agent is started again after that, while the cause continues.
    AgentReturns,
}

/// [`Scenario`] without its numbers, as `--scenario` selects it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ScenarioKind {
    Load,
    Spike,
    LostCpu,
    SlowServer,
    StalledServer,
    Day,
    AgentDies,
    AgentReturns,
}

impl Scenario {
    pub fn kind(self) -> ScenarioKind {
        match self {
            Self::Load(_) => ScenarioKind::Load,
            Self::Spike => ScenarioKind::Spike,
            Self::LostCpu(_) => ScenarioKind::LostCpu,
            Self::SlowServer(_) => ScenarioKind::SlowServer,
            Self::StalledServer => ScenarioKind::StalledServer,
            Self::Day => ScenarioKind::Day,
            Self::AgentDies => ScenarioKind::AgentDies,
            Self::AgentReturns => ScenarioKind::AgentReturns,
        }
    }

    pub fn name(self) -> String {
        match self {
            Self::Load(load) => format!("{load}× load"),
            Self::Spike => "after a 1.4× spike".to_owned(),
            Self::LostCpu(threads) => format!("beside {threads} threads"),
            Self::SlowServer(load) => format!("slow server at {load}× load"),
            Self::StalledServer => "stalled server".to_owned(),
            Self::Day => "a day".to_owned(),
            Self::AgentDies => "agent dies".to_owned(),
            Self::AgentReturns => "agent returns".to_owned(),
        }
    }

    /// Estimated duration, including the start of the servers.
    pub fn duration(self, phases: &Phases) -> Duration {
        let Phases {
            baseline,
            settle,
            load,
            drain,
            spike,
            recovery,
            before_death,
            dead,
            returned,
            ..
        } = *phases;
        START
            + baseline
            + match self {
                Self::Load(_) => settle + load + drain,
                Self::Spike => spike + recovery,
                Self::LostCpu(_) => 2 * phases.beside_neighbour() + drain,
                Self::SlowServer(_) | Self::StalledServer => settle + load + drain,
                Self::Day => group::DAY,
                Self::AgentDies => settle + before_death + dead + drain,
                Self::AgentReturns => settle + before_death + dead + returned + drain,
            }
    }
}

/// Durations of the phases of all scenarios.
#[derive(Clone, Copy, Debug)]
pub struct Phases {
    /// Load before the latency at rest is measured, and time for its backlog to drain.
    pub warm_up: Duration,
    /// Low load, to measure the latency at rest.
    pub rest: Duration,
    /// Overload before the capacity is measured, so that every worker has a backlog.
    pub probe_settle: Duration,
    /// Overload during which completed requests are counted: their rate is the capacity.
    pub probe: Duration,
    /// Low load before the step, so that the agent learns the baseline.
    pub baseline: Duration,
    /// Time after the step in which the initial backlog drains; the figures exclude it.
    pub settle: Duration,
    /// Each measured load.
    pub load: Duration,
    /// Time for the requests in flight at the end to complete.
    pub drain: Duration,
    pub spike: Duration,
    /// Observed after the spike.
    pub recovery: Duration,
    /// Settled overload before the agent is killed.
    pub before_death: Duration,
    /// Without an agent.
    pub dead: Duration,
    /// Measured after the page of the returned agent is alive.
    pub returned: Duration,
}

impl Phases {
    pub fn full(load: Duration) -> Self {
        let s = Duration::from_secs;
        Self {
            warm_up: s(1),
            rest: s(8),
            probe_settle: s(3),
            probe: s(5),
            baseline: s(4),
            settle: s(2),
            load,
            drain: s(2),
            spike: s(5),
            recovery: s(8),
            before_death: s(3),
            dead: s(3),
            returned: s(10),
        }
    }

    /// Short phases, for a verdict on every consumer within minutes.
    pub fn quick() -> Self {
        let s = Duration::from_secs;
        Self {
            rest: s(3),
            probe_settle: s(2),
            probe: s(3),
            baseline: s(3),
            drain: s(1),
            recovery: s(5),
            before_death: s(2),
            ..Self::full(s(5))
        }
    }

    /// At overload, before and after a CPU neighbour starts.
    pub fn beside_neighbour(&self) -> Duration {
        self.load.max(MIN_NEIGHBOUR)
    }

    /// Estimated duration of measuring a service at rest.
    pub fn at_rest(&self) -> Duration {
        START + 2 * self.warm_up + self.rest + self.probe_settle + self.probe
    }
}
