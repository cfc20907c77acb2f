//! The view: one JSON object, made by the agent for the live page and for `tailback top`, or by `top` itself.

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

pub use super::exact_waits::Wait;
use super::{
    Live,
    episodes::Known,
    history::{History, wait_ns},
};
use crate::{
    detect::Gauge,
    emit::{beside_culprit, headline, json::round},
    event::{Hop, Level, Verdict},
    queue::{Kind, QueueKey},
    sample::TargetId,
    signal::pressure::Pressure,
};

// Bounds: the view is made and sent once a second for each client.

/// Services. The view counts the others, which are no worse.
const MAX_SERVICES: usize = 200;
/// Queues per service.
const MAX_QUEUES: usize = 8;
/// Open episodes per service.
const MAX_EPISODES: usize = 4;
/// Hops of a wait chain.
const MAX_HOPS: usize = 8;
/// Share of its limit that a stock (open files, memory), which is never empty, must exceed to be busy.
const BUSY_STOCK: f64 = 0.5;

/// Everything that is shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct View {
    pub r#type: String,
    pub time_unix_ns: u64,
    /// Since when there is a history.
    pub began_unix_ns: u64,
    /// The time that one point of a history covers.
    pub point_ns: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<Agent>,
    /// Worst first.
    pub services: Vec<Service>,
    pub services_omitted: usize,
    /// Episodes that ended within the length of the histories, the latest first.
    pub ended: Vec<Episode>,
    pub subscribers: Vec<Subscriber>,
}

/// The agent that publishes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Agent {
    pub pid: u32,
    pub version: String,
    /// Its loop takes samples. Otherwise all signals have failed open.
    pub sampling: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// A client of the unix stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Subscriber {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The service that it subscribed to; `None`: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// One service: its queues, and what is signalled.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Service {
    pub target: String,
    /// Directory of its page; empty if nothing is published.
    pub directory: String,
    pub pid: u32,
    pub level: Level,
    pub score: f64,
    pub admit_ratio: f64,
    pub load: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency_limit: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_queue_wait_ns: Option<u64>,
    pub retry_after_ms: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_to_full_ns: Option<u64>,
    /// Worst first, then the busiest of the last ten minutes. Idle ones are left out, except for the first.
    pub queues: Vec<Queue>,
    pub queues_omitted: usize,
    /// Measured by hooks in the last second; empty without them.
    pub waits: Vec<Wait>,
    /// Open, worst first.
    pub episodes: Vec<Episode>,
    /// Processes that map its page.
    pub readers: Vec<Reader>,
}

/// A process that maps a page.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reader {
    pub pid: u32,
    pub name: String,
}

/// One queue.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Queue {
    pub kind: String,
    pub name: String,
    pub level: Level,
    pub score: f64,
    pub depth: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    pub unit: String,
    /// Of its fullest part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fill: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wait_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arrivals_per_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub departures_per_s: Option<f64>,
    /// Since the queue was first observed.
    pub losses: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_to_full_ns: Option<u64>,
    /// Maxima per point, oldest first; the last is in progress. Before the first, the queue was empty or had no history.
    pub depths: Vec<u64>,
    pub waits_ms: Vec<u32>,
}

/// One episode of a queue, with its verdict.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Episode {
    pub id: String,
    pub trace_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    pub kind: String,
    pub name: String,
    pub level: Level,
    pub level_max: Level,
    pub onset_unix_ns: u64,
    /// Absent while it is open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_unix_ns: Option<u64>,
    pub depth_max: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    pub unit: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wait_max_ns: Option<u64>,
    pub losses: u64,
    /// Absent until its threads have been sampled, like `verdict`, `confidence` and `root`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// Cause and culprit in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confidence: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<Root>,
    pub path: Vec<Step>,
    pub evidence: String,
    pub advice: String,
}

/// The end of a wait chain.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Root {
    /// The cause at the end, in words, if it is known and describes the culprit itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub culprit: Option<String>,
}

/// One hop of a wait chain.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Step {
    /// The service, if it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    pub name: String,
    /// What it does, in words.
    pub state: String,
}

impl View {
    /// The view after a sample. `names`: the directories of the pages, in the order of `pressures`; none if nothing is published.
    pub fn of(unix_ns: u64, pressures: &[Pressure], names: &[String], live: &Live) -> Self {
        let mut order: Vec<usize> = (0..pressures.len()).collect();
        order.sort_by(|a, b| {
            let (a, b) = (&pressures[*a], &pressures[*b]);
            let rank = |of: &Pressure| Reverse((of.level, (of.score * 1e3) as u64));
            rank(a)
                .cmp(&rank(b))
                .then_with(|| a.target.name.cmp(&b.target.name))
                .then_with(|| a.target.id.cmp(&b.target.id))
        });
        let mut episodes: BTreeMap<TargetId, Vec<&Known>> = BTreeMap::new();
        for known in live.episodes.open() {
            let of_target = episodes.entry(known.episode.key.target).or_default();
            of_target.push(known);
        }
        let shown = &order[..order.len().min(MAX_SERVICES)];
        let services = shown.iter().map(|index| {
            let pressure = &pressures[*index];
            let own = episodes.remove(&pressure.target.id).unwrap_or_default();
            let directory = names.get(*index).cloned().unwrap_or_default();
            service(pressure, directory, own, live)
        });
        Self {
            r#type: "live".to_owned(),
            time_unix_ns: unix_ns,
            began_unix_ns: live.began_unix_ns.unwrap_or(unix_ns),
            point_ns: live.histories.point_ns(),
            agent: None,
            services: services.collect(),
            services_omitted: order.len() - shown.len(),
            ended: live
                .episodes
                .ended()
                .map(|known| episode(known, live))
                .collect(),
            subscribers: Vec::new(),
        }
    }
}

fn service(
    pressure: &Pressure,
    directory: String,
    mut episodes: Vec<&Known>,
    live: &Live,
) -> Service {
    // The worst first. Unread bytes are a part of the requests that another queue counts.
    episodes.sort_by_key(|known| {
        let of = &known.episode;
        let is_part = of.key.kind == Kind::Recv;
        (Reverse(known.level), is_part, of.onset)
    });
    let mut queues: Vec<(&Arc<QueueKey>, &Gauge, Option<&History>)> = pressure
        .queues
        .iter()
        .map(|(key, gauge)| (key, gauge, live.histories.get(key)))
        .collect();
    queues.sort_by_cached_key(|(key, gauge, history)| {
        let now = (gauge.level, (gauge.score * 1e3) as u64);
        let past = history.map(History::rank);
        (Reverse((now, past, is_busy(key, gauge))), (*key).clone())
    });
    let total = queues.len();
    let is_shown =
        |(index, (key, gauge, history)): &(usize, (&Arc<QueueKey>, &Gauge, Option<&History>))| {
            *index == 0
                || gauge.level > Level::Ok
                || is_busy(key, gauge)
                || history.is_some_and(|of| of.rank().0 > Level::Ok)
        };
    let shown: Vec<Queue> = queues
        .into_iter()
        .enumerate()
        .filter(is_shown)
        .take(MAX_QUEUES)
        .map(|(_, (key, gauge, history))| queue(key, gauge, history))
        .collect();
    Service {
        target: pressure.target.name.clone(),
        directory,
        pid: pressure.target.pid,
        level: pressure.level,
        score: round(pressure.score),
        admit_ratio: round(pressure.admit_ratio),
        load: round(pressure.load.all),
        concurrency_limit: pressure.concurrency_limit,
        max_queue_wait_ns: pressure.max_queue_wait_ns,
        retry_after_ms: pressure.retry_after_ms,
        time_to_full_ns: pressure.time_to_full_ns,
        queues_omitted: total - shown.len(),
        queues: shown,
        waits: live
            .waits
            .get(&pressure.target.id)
            .cloned()
            .unwrap_or_default(),
        episodes: episodes
            .into_iter()
            .take(MAX_EPISODES)
            .map(|known| episode(known, live))
            .collect(),
        readers: Vec::new(),
    }
}

/// Whether a queue holds work. Open files and used memory are never zero.
fn is_busy(key: &QueueKey, gauge: &Gauge) -> bool {
    match (key.kind, gauge.limit) {
        (Kind::Fd | Kind::Memory, Some(limit)) => gauge.depth as f64 > limit as f64 * BUSY_STOCK,
        (Kind::Fd | Kind::Memory, None) => false,
        _ => gauge.depth > 0,
    }
}

fn queue(key: &QueueKey, gauge: &Gauge, history: Option<&History>) -> Queue {
    let points = || history.into_iter().flat_map(History::points);
    Queue {
        kind: key.kind.name().to_owned(),
        name: key.name().to_owned(),
        level: gauge.level,
        score: round(gauge.score),
        depth: gauge.depth,
        limit: gauge.limit,
        unit: gauge.unit.unwrap_or(key.kind.unit()).to_owned(),
        fill: gauge.fill.map(round),
        wait_ns: wait_ns(gauge),
        arrivals_per_s: gauge.arrivals_per_s.map(round),
        departures_per_s: gauge.departures_per_s.map(round),
        losses: gauge.losses,
        time_to_full_ns: gauge.time_to_full_ns,
        depths: points().map(|point| point.depth).collect(),
        waits_ms: points().map(|point| point.wait_ms).collect(),
    }
}

fn episode(known: &Known, live: &Live) -> Episode {
    let Known {
        episode: of,
        level,
        verdict,
    } = known;
    let name_of = |target: Option<TargetId>| Some(live.targets.get(&target?)?.name.clone());
    let verdict = verdict.as_deref();
    let text =
        |of_verdict: Option<&String>, of_episode: &String| of_verdict.unwrap_or(of_episode).clone();
    Episode {
        id: of.id.clone(),
        trace_id: of.incident.clone(),
        target: name_of(Some(of.key.target)),
        kind: of.key.kind.name().to_owned(),
        name: of.key.name().to_owned(),
        level: *level,
        level_max: of.level_max.max(*level),
        onset_unix_ns: of.onset.unix_ns,
        end_unix_ns: (!of.ongoing).then_some(of.end.unix_ns),
        depth_max: of.depth_max,
        limit: of.limit,
        unit: of.unit.to_owned(),
        wait_max_ns: of.wait_max_ns,
        losses: of.losses,
        cause: verdict.map(|it| it.cause.name().to_owned()),
        verdict: verdict.map(headline),
        confidence: verdict.map(|it| it.confidence.name().to_owned()),
        root: verdict.map(root),
        path: verdict.map_or_else(Vec::new, |it| {
            let hops = it.path.iter().take(MAX_HOPS);
            hops.map(|hop| step(hop, name_of(hop.target))).collect()
        }),
        evidence: text(verdict.map(|it| &it.evidence), &of.evidence),
        advice: text(verdict.map(|it| &it.advice), &of.advice),
    }
}

fn root(verdict: &Verdict) -> Root {
    // On a path of several hops the verdict's own cause is that of the first one.
    let cause = match verdict.path.len() {
        0 | 1 => Some(verdict.root.unwrap_or(verdict.cause)),
        _ => verdict.root,
    };
    Root {
        cause: cause
            .and_then(|cause| beside_culprit(cause, verdict.culprit.as_ref()))
            .map(str::to_owned),
        culprit: verdict.culprit.as_ref().map(|it| it.name.clone()),
    }
}

fn step(hop: &Hop, target: Option<String>) -> Step {
    Step {
        target,
        name: hop.name.clone(),
        state: match hop.state.as_str() {
            "" => hop.cause.title().to_owned(),
            state => state.to_owned(),
        },
    }
}

impl View {
    /// Adds the processes that map the pages: each with the directory of the page.
    pub fn add_readers<'a>(&mut self, readers: impl Iterator<Item = (&'a str, Reader)>) {
        for (directory, reader) in readers {
            let mut services = self.services.iter_mut();
            if let Some(service) = services.find(|service| service.directory == directory) {
                service.readers.push(reader);
            }
        }
    }
}
