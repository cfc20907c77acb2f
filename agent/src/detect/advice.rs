//! The sentence with the numbers that speak, and what to do. Facts only: the cause behind them is another step's business.

use crate::{
    event::{DrivenBy, Episode, Level},
    queue::Kind,
    text::{amount, count, duration, rate},
};

/// One sentence.
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
    let side = |what: &str, now: Option<f64>, usual: Option<f64>| {
        now.map(|now| match usual {
            Some(usual) => format!("{what} {}/s (usually {}/s)", rate(now), rate(usual)),
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

/// One or two sentences.
pub(super) fn advice(episode: &Episode) -> String {
    let lost = episode.level_max == Level::Full;
    match (episode.key.kind, episode.driven_by) {
        (Kind::Accept, DrivenBy::Consumer) => {
            "The service accepts more slowly than before: look at what its workers wait for. A larger backlog \
             would only make callers wait longer."
        }
        (Kind::Accept, DrivenBy::Producer) => {
            "More connections come than before and the service keeps its pace: add capacity, or limit the callers."
        }
        (Kind::Accept, _) if lost => {
            "Connections are refused or retried by the kernel: the service does not accept fast enough. Look at \
             what its workers wait for, and at who calls."
        }
        (kind, _) => kind.advice(),
    }
    .to_owned()
}
