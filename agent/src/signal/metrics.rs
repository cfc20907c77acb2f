//! The queues and the agent in Prometheus's text format.

use std::{collections::BTreeMap, fmt::Write as _, sync::atomic::Ordering};

use super::{
    state::{SharedState, Snapshot},
    wait_histograms::WaitHistograms,
};
use crate::{detect::Gauge, queue::QueueKey};

/// Queues that are told, the worst first; what is beyond is counted.
const MOST: usize = 2_000;

/// What is told of one queue: its name, its type, what it says, and where it comes from.
type Family = (
    &'static str,
    &'static str,
    &'static str,
    fn(&Gauge) -> Option<f64>,
);

const SECOND: f64 = 1e9;

const OF_QUEUES: &[Family] = &[
    (
        "tailback_queue_depth",
        "gauge",
        "What waits in the queue, in the unit of the kind.",
        |gauge| Some(gauge.depth as f64),
    ),
    (
        "tailback_queue_limit",
        "gauge",
        "What fits into the queue.",
        |gauge| gauge.limit.map(|limit| limit as f64),
    ),
    (
        "tailback_queue_fill_ratio",
        "gauge",
        "Depth over limit.",
        |gauge| {
            gauge
                .limit
                .filter(|limit| *limit > 0)
                .map(|limit| gauge.depth as f64 / limit as f64)
        },
    ),
    (
        "tailback_queue_oldest_age_seconds",
        "gauge",
        "Age of what has waited longest.",
        |gauge| gauge.oldest_age_ns.map(|ns| ns as f64 / SECOND),
    ),
    (
        "tailback_queue_standing_delay_seconds",
        "gauge",
        "The delay that stands: no less for about a second.",
        |gauge| Some(gauge.standing_delay_ns as f64 / SECOND),
    ),
    (
        "tailback_queue_arrivals_total",
        "counter",
        "What came, since the queue is watched.",
        |gauge| Some(gauge.arrivals as f64),
    ),
    (
        "tailback_queue_departures_total",
        "counter",
        "What was taken, since the queue is watched.",
        |gauge| Some(gauge.departures as f64),
    ),
    (
        "tailback_queue_losses_total",
        "counter",
        "What was lost, since the queue is watched.",
        |gauge| Some(gauge.losses as f64),
    ),
    (
        "tailback_queue_score",
        "gauge",
        "How saturated the queue is: 0 to 1, may pass 1.",
        |gauge| Some(gauge.score),
    ),
    (
        "tailback_queue_level",
        "gauge",
        "0 ok, 1 warn, 2 critical, 3 full.",
        |gauge| Some(f64::from(gauge.level as u8)),
    ),
    (
        "tailback_queue_time_to_full_seconds",
        "gauge",
        "Forecast; absent when the queue is not filling.",
        |gauge| gauge.time_to_full_ns.map(|ns| ns as f64 / SECOND),
    ),
];

/// All that there is to tell.
pub fn render(state: &SharedState) -> String {
    let snapshot = state.snapshot();
    let mut text = String::new();
    of_targets(&mut text, &snapshot);
    of_queues(&mut text, &snapshot, &state.waits());
    of_agent(&mut text, state, &snapshot);
    text
}

fn of_targets(text: &mut String, snapshot: &Snapshot) {
    // What is not known, or does not hold now, is absent.
    let mut family_of_some = |name: &str, help: &str, value: &dyn Fn(usize) -> Option<f64>| {
        head(text, name, "gauge", help);
        for (index, target) in snapshot.names.iter().enumerate() {
            if let Some(value) = value(index) {
                let _ = writeln!(text, "{name}{{target=\"{}\"}} {value}", escaped(target));
            }
        }
    };
    let of = &snapshot.pressures;
    family_of_some(
        "tailback_concurrency_limit",
        "So many requests at once keep the service busy; absent unless more come than it can do.",
        &|i| of[i].concurrency_limit.map(f64::from),
    );
    family_of_some(
        "tailback_max_queue_wait_seconds",
        "Work that waited for longer is to be turned away; absent unless more comes than the service can do.",
        &|i| of[i].max_queue_wait_ns.map(|ns| ns as f64 / SECOND),
    );
    let mut family = |name: &str, help: &str, value: &dyn Fn(usize) -> f64| {
        family_of_some(name, help, &|i| Some(value(i)));
    };
    family(
        "tailback_shedding",
        "1 while work is to be turned away: by a share, by a number at once, or by how long it waited.",
        &|i| f64::from(of[i].is_limited()),
    );
    family(
        "tailback_level",
        "Of the worst queue: 0 ok, 1 warn, 2 critical, 3 full.",
        &|i| f64::from(of[i].level as u8),
    );
    family(
        "tailback_score",
        "Of the worst queue: 0 to 1, may pass 1.",
        &|i| of[i].score,
    );
    family(
        "tailback_admit_ratio",
        "Share of new work to admit.",
        &|i| of[i].admit_ratio,
    );
    family(
        "tailback_load_ratio",
        "What is asked of the service, of what it can do: 1 is all of it, 2 twice that or more.",
        &|i| of[i].load.all,
    );
    family(
        "tailback_cpu_ratio",
        "CPU time, of what the service may use.",
        &|i| of[i].load.cpu,
    );
}

fn of_queues(text: &mut String, snapshot: &Snapshot, waits: &WaitHistograms) {
    let mut queues: BTreeMap<(&str, &QueueKey), &Gauge> = BTreeMap::new();
    let mut beyond = 0;
    for (pressure, name) in snapshot.pressures.iter().zip(snapshot.names.iter()) {
        for (key, gauge) in &pressure.queues {
            if queues.len() < MOST {
                queues.insert((name, key), gauge);
            } else {
                beyond += 1;
            }
        }
    }
    let labels = |target: &str, key: &QueueKey| {
        let (kind, target, queue) = (key.kind.name(), escaped(target), escaped(key.name()));
        format!("target=\"{target}\",kind=\"{kind}\",queue=\"{queue}\"")
    };
    for (name, kind, help, value) in OF_QUEUES {
        head(text, name, kind, help);
        for ((target, key), gauge) in &queues {
            if let Some(value) = value(gauge) {
                let _ = writeln!(text, "{name}{{{}}} {value}", labels(target, key));
            }
        }
    }
    const WAIT: &str = "tailback_queue_wait_seconds";
    head(
        text,
        WAIT,
        "histogram",
        "How long what left the queue had waited, each tick's at its mean.",
    );
    for (target, key) in queues.keys() {
        let Some(histogram) = waits.of(key) else {
            continue;
        };
        let labels = labels(target, key);
        let mut all = 0;
        for (bound, count) in histogram.cumulative() {
            let bound = bound.map_or_else(|| "+Inf".to_owned(), |bound| bound.to_string());
            let _ = writeln!(text, "{WAIT}_bucket{{{labels},le=\"{bound}\"}} {count}");
            all = count;
        }
        let _ = writeln!(text, "{WAIT}_sum{{{labels}}} {}", histogram.sum_s());
        let _ = writeln!(text, "{WAIT}_count{{{labels}}} {all}");
    }
    one(
        text,
        "tailback_queues_omitted",
        "gauge",
        "Queues beyond the bound of what is told here.",
        beyond as f64,
    );
}

fn of_agent(text: &mut String, state: &SharedState, snapshot: &Snapshot) {
    one(
        text,
        "tailback_agent_up",
        "gauge",
        "The agent answers, and looks.",
        f64::from(snapshot.holds()),
    );
    if let Some(report) = snapshot.report.as_deref() {
        for (name, kind, help, value) in [
            (
                "tailback_agent_ticks_total",
                "counter",
                "Looks at all queues.",
                report.ticks as f64,
            ),
            (
                "tailback_agent_late_ticks_total",
                "counter",
                "Looks that began late by more than half their interval.",
                report.late_ticks as f64,
            ),
            (
                "tailback_agent_records_total",
                "counter",
                "Records read from the kernel.",
                report.records as f64,
            ),
            (
                "tailback_agent_cpu_seconds_total",
                "counter",
                "CPU time of the agent.",
                report.cpu_ns as f64 / SECOND,
            ),
            (
                "tailback_agent_cpu_ratio",
                "gauge",
                "Of one core, over the last seconds.",
                report.cpu_share,
            ),
            (
                "tailback_agent_resident_bytes",
                "gauge",
                "Memory of the agent.",
                report.rss_bytes as f64,
            ),
            (
                "tailback_agent_targets",
                "gauge",
                "Services that are watched.",
                f64::from(report.targets),
            ),
            (
                "tailback_agent_spans_total",
                "counter",
                "Spans handed to the exporter.",
                report.spans as f64,
            ),
            (
                "tailback_agent_spans_dropped_total",
                "counter",
                "Spans that no collector took.",
                report.spans_dropped as f64,
            ),
            (
                "tailback_agent_samples_not_recorded_total",
                "counter",
                "Samples that could not be recorded.",
                report.samples_not_recorded as f64,
            ),
        ] {
            one(text, name, kind, help, value);
        }
    }
    let (written, failed, beyond) = snapshot.pages;
    one(
        text,
        "tailback_pages",
        "gauge",
        "Pages that are written.",
        written as f64,
    );
    one(
        text,
        "tailback_pages_failed",
        "gauge",
        "Pages that cannot be written.",
        (failed + beyond) as f64,
    );
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed) as f64;
    one(
        text,
        "tailback_stream_subscribers",
        "gauge",
        "Who listens to the stream.",
        state.subscribers().len() as f64,
    );
    one(
        text,
        "tailback_stream_lines_total",
        "counter",
        "Lines said on the stream.",
        count(&state.counts.lines),
    );
    head(
        text,
        "tailback_stream_dropped_total",
        "counter",
        "Subscribers that were refused or let go.",
    );
    for (reason, counter) in [
        ("no_room", &state.counts.refused),
        ("too_slow", &state.counts.too_slow),
        ("not_understood", &state.counts.not_understood),
    ] {
        let _ = writeln!(
            text,
            "tailback_stream_dropped_total{{reason=\"{reason}\"}} {}",
            count(counter)
        );
    }
}

/// A family of one value.
pub fn one(text: &mut String, name: &str, kind: &str, help: &str, value: f64) {
    head(text, name, kind, help);
    let _ = writeln!(text, "{name} {value}");
}

/// What a family is.
pub fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// The value of a label, whatever is in it.
pub fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}
