//! Evidence and advice of an episode, from its numbers alone: the diagnosis adds the cause.

use crate::{
    event::{DrivenBy, Episode, Level},
    queue::Kind,
    text::{amount, count, duration, rate},
};

/// The numbers of the episode in one sentence.
pub(super) fn evidence(episode: &Episode) -> String {
    let unit = episode.unit;
    let mut parts = vec![match episode.limit {
        Some(limit) if episode.key.kind == Kind::Runqueue => format!(
            "up to {} {unit} waiting for {} CPUs",
            count(episode.depth_max),
            count(limit)
        ),
        limit => format!("up to {}", amount(episode.depth_max, limit, unit)),
    }];
    if let Some(wait) = episode.wait_max_ns {
        parts.push(format!("longest wait {}", duration(wait)));
    }
    let side = |what: &str, now: Option<f64>, baseline: Option<f64>| {
        now.map(|now| match baseline {
            Some(baseline) => format!("{what} {}/s (baseline {}/s)", rate(now), rate(baseline)),
            None => format!("{what} {}/s", rate(now)),
        })
    };
    if episode.key.kind != Kind::Runqueue {
        parts.extend(side(
            "in",
            episode.arrival_rate,
            episode.baseline_arrival_rate,
        ));
        parts.extend(side(
            "out",
            episode.service_rate,
            episode.baseline_service_rate,
        ));
    }
    if episode.losses > 0 {
        parts.push(format!("{} lost", count(episode.losses)));
    }
    if let Some(worst) = &episode.worst {
        parts.push(format!("worst: {worst}"));
    }
    parts.join("; ")
}

/// What to do, in one or two sentences.
pub(super) fn advice(episode: &Episode) -> String {
    let lost = episode.level_max == Level::Full;
    match (episode.key.kind, episode.driven_by) {
        (Kind::Accept, DrivenBy::Consumer) => {
            "The service accepts connections more slowly than before: check what its workers wait for. A larger backlog \
             would only make callers wait longer."
        }
        (Kind::Accept, DrivenBy::Producer) => {
            "Connections arrive faster than before, and the service accepts them at its normal rate: add capacity or limit the \
             callers."
        }
        (Kind::Accept, _) if lost => {
            "The kernel drops or refuses connections because the service does not accept them fast enough. Check what its \
             workers wait for, and who calls it."
        }
        (kind, _) => kind.advice(),
    }
    .to_owned()
}
