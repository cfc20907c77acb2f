//! The text of a report's rows.

use std::{collections::BTreeMap, sync::Arc};

use super::findings::Seen;
use crate::{
    diagnose::NoBaseline,
    emit::{
        cause,
        terminal::{clock, depth},
    },
    event::{DrivenBy, Episode, Level, LoggedMessage, Verdict},
    queue::Kind,
    sample::{Target, TargetId},
    text::{bytes, count, duration, rate, sparkline, width},
};

/// Width of a bar, in terminal columns.
const BAR: usize = 20;

pub(super) fn evidence(episode: &Episode) -> &str {
    let verdict = episode.verdict.as_deref();
    verdict.map_or(&episode.evidence, |verdict| &verdict.evidence)
}

pub(super) fn advice(episode: &Episode) -> &str {
    let verdict = episode.verdict.as_deref();
    verdict.map_or(&episode.advice, |verdict| &verdict.advice)
}

/// `in 40.0/s (baseline 39.8/s), out 4.1/s (baseline 40.0/s); consumer: departures below baseline`.
pub(super) fn rates(episode: &Episode) -> String {
    // Arrivals and departures of a run queue are wake-ups, not requests.
    if episode.key.kind == Kind::Runqueue {
        return String::new();
    }
    let flow = |per_s: f64| match episode.unit {
        "bytes" => bytes(per_s as u64),
        _ => rate(per_s),
    };
    let side = |word: &str, now: Option<f64>, baseline: Option<f64>| {
        now.map(|now| match baseline {
            Some(baseline) => format!("{word} {}/s (baseline {}/s)", flow(now), flow(baseline)),
            None => format!("{word} {}/s", flow(now)),
        })
    };
    let baseline = (episode.baseline_arrival_rate, episode.baseline_service_rate);
    let sides = [
        side("in", episode.arrival_rate, baseline.0),
        side("out", episode.service_rate, baseline.1),
    ];
    let sides: Vec<String> = sides.into_iter().flatten().collect();
    let driven_by = match (episode.verdict.as_deref(), baseline) {
        (Some(verdict), _) if verdict.driven_by != DrivenBy::Unknown => {
            cause::driven_by(verdict.driven_by)
        }
        (_, (None, None)) => "no baseline (incident started before sampling)",
        _ => cause::driven_by(episode.driven_by),
    };
    [sides.join(", "), driven_by.to_owned()]
        .iter()
        .filter(|part| !part.is_empty())
        .cloned()
        .collect::<Vec<String>>()
        .join("; ")
}

pub(super) fn at_most(episode: &Episode) -> String {
    let most = depth(
        episode.key.kind,
        episode.unit,
        episode.depth_max,
        episode.limit,
    );
    format!("max {most}")
}

pub(super) fn queue(episode: &Episode) -> String {
    let scale = episode.limit.unwrap_or(0).max(episode.depth_max);
    let graph = sparkline(&episode.depths, scale);
    let mut parts = vec![format!("{graph}  {}", at_most(episode)).trim().to_owned()];
    if let Some(wait) = episode.wait_max_ns {
        parts.push(format!("longest wait {}", duration(wait)));
    }
    if episode.losses > 0 {
        let lost = episode.key.kind.losses();
        parts.push(format!("{} {lost}", count(episode.losses)));
    }
    parts.extend(episode.worst.iter().map(|worst| format!("worst: {worst}")));
    parts.join("; ")
}

/// `12:00:05.000Z, for 12 s; full 4.0 s after the warning`.
pub(super) fn since(seen: &Seen) -> String {
    let Seen { episode, level } = seen;
    let lasted = duration(episode.end.mono_ns.saturating_sub(episode.onset.mono_ns));
    let sign = clock(episode.onset.unix_ns);
    let mut text = if episode.ongoing {
        format!("{sign}, for {lasted}")
    } else {
        format!("{sign}; over after {lasted}")
    };
    if let Some(lead) = episode.lead_ns {
        text += &format!("; full {} after the warning", duration(lead));
    } else if let Some(left) = episode
        .time_to_full_ns
        .filter(|left| *left > 0 && episode.ongoing && (Level::Warn..Level::Full).contains(level))
    {
        text += &format!(
            "; forecast at the warning: full in about {}",
            duration(left)
        );
    }
    text
}

/// `23 times, 9.0 s after the warning: *** uWSGI listen queue of socket … (in /var/log/uwsgi.log)`.
pub(super) fn message(logged: &LoggedMessage) -> String {
    let times = match logged.count {
        1 => "once".to_owned(),
        several => format!("{} times", count(several)),
    };
    let lead = logged.lead_ns.map_or_else(String::new, |lead| {
        let side = if lead < 0 { "before" } else { "after" };
        format!(
            ", first {} {side} the warning",
            duration(lead.unsigned_abs())
        )
    });
    format!("{times}{lead}: {} (in {})", logged.line.trim(), logged.path)
}

pub(super) fn confidence(verdict: &Verdict) -> String {
    let name = verdict.confidence.name();
    match verdict.runner_up {
        Some((cause, share)) => format!(
            "{name}; next best explanation ({:.0}%): {}",
            share * 100.0,
            cause.title()
        ),
        None => name.to_owned(),
    }
}

/// `No baseline: 60 requests in flight at gateway :8000, half of them for 12 s or longer, with 31 calls outstanding to
/// python3 (812) at 127.0.0.1:9000 (32 connections). …`.
pub(super) fn no_baseline(queue: &NoBaseline, targets: &BTreeMap<TargetId, Arc<Target>>) -> String {
    let NoBaseline {
        key,
        waiting,
        calls,
    } = queue;
    let target = targets.get(&key.target);
    let calls = calls.as_ref().map_or_else(String::new, |calls| {
        let at = match &calls.process {
            Some(process) => format!("{process} at {}", calls.endpoint),
            None => calls.endpoint.clone(),
        };
        let of = calls.connections.map_or_else(String::new, |connections| {
            format!(" ({} connections)", count(connections))
        });
        let outstanding = count(calls.outstanding);
        format!(", with {outstanding} calls outstanding to {at}{of}")
    });
    format!(
        "No baseline: {} {} in flight at {} {}, half of them for {} or longer{calls}. Diagnose again while the service is \
         healthy, or keep `tailback run` running to have a baseline.",
        count(waiting.depth),
        key.kind.unit(),
        target.map_or("?", |target| target.name.as_str()),
        key.name(),
        duration(waiting.median_age_ns),
    )
}

/// A bar of fixed width: `█████     `. Any positive share shows at least one eighth of a column.
pub(super) fn bar(share: f64) -> String {
    const PARTS: [char; 7] = ['▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    let eighths = (share.clamp(0.0, 1.0) * BAR as f64 * 8.0).round() as usize;
    let eighths = eighths.max(1);
    let mut bar = "█".repeat(eighths / 8);
    bar.extend((eighths % 8).checked_sub(1).map(|part| PARTS[part]));
    let gap = BAR.saturating_sub(width(&bar));
    bar + &" ".repeat(gap)
}
