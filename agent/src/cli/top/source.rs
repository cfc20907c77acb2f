//! Where the view comes from: a running agent, own samples, or a recording.

use std::{
    io::ErrorKind,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, sync_channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use serde_json::Value;

use super::{model::Model, player::Player};
use crate::{
    adapters::agent as socket,
    cli::{
        Failure, Targets, TierOption,
        exit_code::Outcome,
        run::SamplingClock,
        session::{self, Stop},
    },
    collect::OutputStats,
    config::Config,
    signal::{
        directory::in_use,
        live::{Live, view::View},
        stream::SOCKET,
    },
};

/// CPU budget of own samples, as a share of one core: that of `diagnose`, because a person is waiting.
const CPU_BUDGET: f64 = 0.05;
/// How often an agent is asked, and a new view is made from own samples.
const VIEW_INTERVAL: Duration = Duration::from_secs(1);
/// How soon a reply of the agent is noticed.
const REPLY_INTERVAL: Duration = Duration::from_millis(100);

/// What is shown.
#[derive(Clone, Debug, Default)]
pub(super) struct Shown {
    pub(super) view: View,
    /// `agent 4000`, `own samples`, `shop.tbk 0:12 of 1:30`.
    pub(super) origin: String,
    /// Adapters, each with the service that it serves; `None`: all.
    pub(super) adapters: Vec<(String, Option<String>)>,
    /// Nothing is published: the signals shown are those that an agent would publish.
    pub(super) is_unpublished: bool,
    /// Why the view is out of date, or ends early.
    pub(super) problem: Option<String>,
}

/// The result of a step.
pub(super) enum Step {
    Nothing,
    Shown(Box<Shown>),
    /// A stop was requested.
    Stopped,
}

pub(super) enum Source {
    Agent(Box<Agent>),
    Own(Box<Sampler>),
    Replay(Box<Player>),
}

impl Source {
    /// A recording.
    pub(super) fn replay(file: &Path, targets: &Targets) -> Outcome<Self> {
        let config = targets.config()?;
        Ok(Self::Replay(Box::new(Player::open(file, config)?)))
    }

    /// The running agent, unless there is none, or targets or a tier were given.
    pub(super) fn of_host(targets: &Targets, tier: TierOption) -> Outcome<Self> {
        let config = targets.config()?;
        let directory = in_use(&config.signal.directory());
        let path = directory.join(SOCKET);
        if !targets.are_given() && !tier.is_given() {
            match UnixStream::connect(&path) {
                Ok(_) => return Agent::start(directory).map(|agent| Self::Agent(Box::new(agent))),
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                    return Err(Failure::kernel(anyhow!(
                        "an agent runs, but permission to open {} was denied: run as root, or as a member of the \
                         agent's group",
                        path.display()
                    )));
                }
                // No agent runs.
                Err(_) => {}
            }
        }
        Sampler::start(targets, tier, &config).map(|sampler| Self::Own(Box::new(sampler)))
    }

    pub(super) fn is_replay(&self) -> bool {
        matches!(self, Self::Replay(_))
    }

    /// Whether nothing more will come.
    pub(super) fn is_over(&self) -> bool {
        matches!(self, Self::Replay(player) if player.is_over())
    }

    /// Time until the next step.
    pub(super) fn due_in(&self) -> Duration {
        match self {
            Self::Agent(agent) => agent.due_in(),
            Self::Own(sampler) => sampler.clock.due_in(),
            Self::Replay(player) => player.due_in(),
        }
    }

    pub(super) fn step(&mut self, stop: &Stop) -> Outcome<Step> {
        match self {
            Self::Agent(agent) => Ok(agent.step()),
            Self::Own(sampler) => sampler.step(stop),
            Self::Replay(player) => player.step(),
        }
    }

    pub(super) fn pause(&mut self, is_paused: bool) {
        if let Self::Replay(player) = self {
            player.pause(is_paused);
        }
    }

    pub(super) fn seek(&mut self, seconds: i64) -> Outcome<()> {
        match self {
            Self::Replay(player) => player.seek(seconds),
            _ => Ok(()),
        }
    }
}

/// The replies of an agent, read by a thread: an agent that hangs must not hold up the keys.
pub(super) struct Agent {
    replies: Receiver<Result<Reply, String>>,
    last: Shown,
    checked: Instant,
}

/// A view, and the status of the adapter process.
type Reply = (View, Option<Value>);

impl Agent {
    fn start(directory: PathBuf) -> Outcome<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot connect to the agent")
            .map_err(Failure::bug)?;
        let (sender, replies) = sync_channel(1);
        let ask = move || {
            loop {
                let reply = runtime.block_on(ask(&directory));
                if sender
                    .send(reply.map_err(|error| format!("{error:#}")))
                    .is_err()
                {
                    return;
                }
                thread::sleep(VIEW_INTERVAL);
            }
        };
        thread::Builder::new()
            .name("agent".to_owned())
            .spawn(ask)
            .context("cannot start a thread")
            .map_err(Failure::bug)?;
        Ok(Self {
            replies,
            last: Shown {
                origin: "agent".to_owned(),
                ..Shown::default()
            },
            checked: Instant::now(),
        })
    }

    fn due_in(&self) -> Duration {
        REPLY_INTERVAL.saturating_sub(self.checked.elapsed())
    }

    fn step(&mut self) -> Step {
        self.checked = Instant::now();
        let Ok(reply) = self.replies.try_recv() else {
            return Step::Nothing;
        };
        match reply {
            Ok((view, process)) => self.last = shown(view, process.as_ref()),
            Err(error) => {
                self.last.problem = Some(format!(
                    "no reply from the agent: {error}. If it has stopped, all signals have failed open"
                ));
            }
        }
        Step::Shown(Box::new(self.last.clone()))
    }
}

async fn ask(directory: &Path) -> anyhow::Result<Reply> {
    let (view, process) = tokio::join!(
        socket::ask(directory, "live"),
        socket::adapter_process_status(directory)
    );
    let view = serde_json::from_str(&view?).context("invalid reply")?;
    Ok((view, process.ok()))
}

fn shown(view: View, process: Option<&Value>) -> Shown {
    let adapters = process.map(|process| &process["adapters"]);
    let adapters = adapters.and_then(Value::as_array).into_iter().flatten();
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let one = |adapter: &Value| {
        let kind = text(&adapter["adapter"])?;
        let at = text(&adapter["at"]).unwrap_or_default();
        Some((format!("{kind} {at}"), text(&adapter["target"])))
    };
    let agent = view.agent.as_ref();
    let is_hung = agent.is_some_and(|agent| !agent.sampling);
    Shown {
        origin: agent.map_or_else(String::new, |agent| format!("agent {}", agent.pid)),
        adapters: adapters.filter_map(one).collect(),
        is_unpublished: false,
        problem: is_hung
            .then(|| "the agent takes no samples: all signals have failed open".to_owned()),
        view,
    }
}

/// Own samples.
pub(super) struct Sampler {
    clock: SamplingClock,
    model: Model,
    viewed: Option<Instant>,
}

impl Sampler {
    fn start(targets: &Targets, tier: TierOption, config: &Config) -> Outcome<Self> {
        let tier = tier.or(config);
        let specs = targets.or_all(config).specs(config)?;
        let budget = config.budget_or(CPU_BUDGET);
        let mut collector = session::collector(specs, budget, false, targets.load_options(tier))?;
        collector.set_tier(tier, config.hook_budget());
        collector.read_logs(config.messages().map_err(Failure::usage)?);
        collector.ask_apps(config.apps().map_err(Failure::usage)?);
        Ok(Self {
            clock: SamplingClock::with(collector, None),
            model: Model::new(config, Live::default()),
            viewed: None,
        })
    }

    fn step(&mut self, stop: &Stop) -> Outcome<Step> {
        let Some(sample) = self.clock.next(stop, OutputStats::default())? else {
            return Ok(Step::Stopped);
        };
        let focused = self.model.step(&sample);
        self.clock.finish_sample(&focused)?;
        if self.viewed.is_some_and(|at| at.elapsed() < VIEW_INTERVAL) {
            return Ok(Step::Nothing);
        }
        self.viewed = Some(Instant::now());
        Ok(Step::Shown(Box::new(Shown {
            view: self.model.view(),
            origin: "own samples".to_owned(),
            is_unpublished: true,
            ..Shown::default()
        })))
    }
}
