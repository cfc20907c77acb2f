//! Metrics of the services, queues, controllers and the agent in the Prometheus text format.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, atomic::Ordering},
};

use super::{
    controller::ControllerState,
    state::{SharedState, Snapshot},
    wait_histograms::WaitHistograms,
};
use crate::{
    detect::Gauge,
    event::Level,
    queue::QueueKey,
    sample::{Owner, TargetId},
};

/// Bound on the number of queues in the output. Further ones are counted in `tailback_queues_omitted`.
const MAX_QUEUES: usize = 2_000;

/// A metric family: name, type, help text, and where the value comes from.
type Family<T> = (
    &'static str,
    &'static str,
    &'static str,
    fn(&T) -> Option<f64>,
);

/// Nanoseconds per second.
const SECOND: f64 = 1e9;

const OF_CONTROLLERS: &[Family<ControllerState>] = &[
    (
        "tailback_controller_admit_ratio",
        "gauge",
        "Share of new work to admit for this queue, 0.05 to 1.",
        |state| Some(state.admit_ratio),
    ),
    (
        "tailback_controller_equilibrium_admit_ratio",
        "gauge",
        "Admit ratio at which arrivals equal departures; absent until departures were observed under load.",
        |state| state.equilibrium_admit_ratio,
    ),
    (
        "tailback_controller_utilization_ratio",
        "gauge",
        "Recent utilization of the busiest worker group, event loop or CPU set of the service.",
        |state| state.utilization,
    ),
    (
        "tailback_controller_overload_utilization_ratio",
        "gauge",
        "Mean utilization while work was waiting.",
        |state| state.overload_utilization,
    ),
    (
        "tailback_controller_target_delay_seconds",
        "gauge",
        "Standing delay that the controller accepts.",
        |state| Some(state.target_delay_ns as f64 / SECOND),
    ),
    (
        "tailback_controller_standing_delay_seconds",
        "gauge",
        "Minimum delay over the last decisions; 0 until it has persisted long enough.",
        |state| Some(state.standing_delay_ns as f64 / SECOND),
    ),
    (
        "tailback_controller_max_queue_wait_seconds",
        "gauge",
        "Longest queue wait that the controller accepts under overload.",
        |state| Some(state.max_queue_wait_ns as f64 / SECOND),
    ),
];

const OF_QUEUES: &[Family<Gauge>] = &[
    (
        "tailback_queue_depth",
        "gauge",
        "Items in the queue, in the unit of its kind.",
        |gauge| Some(gauge.depth as f64),
    ),
    (
        "tailback_queue_limit",
        "gauge",
        "Capacity of the queue, in the unit of its kind.",
        |gauge| gauge.limit.map(|limit| limit as f64),
    ),
    (
        "tailback_queue_fill_ratio",
        "gauge",
        "Depth divided by limit.",
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
        "Age of the oldest item waiting.",
        |gauge| gauge.oldest_age_ns.map(|ns| ns as f64 / SECOND),
    ),
    (
        "tailback_queue_standing_delay_seconds",
        "gauge",
        "Standing delay: the minimum delay over the detection window.",
        |gauge| Some(gauge.standing_delay_ns as f64 / SECOND),
    ),
    (
        "tailback_queue_arrivals_total",
        "counter",
        "Arrivals since the queue was first observed.",
        |gauge| Some(gauge.arrivals as f64),
    ),
    (
        "tailback_queue_departures_total",
        "counter",
        "Departures since the queue was first observed.",
        |gauge| Some(gauge.departures as f64),
    ),
    (
        "tailback_queue_losses_total",
        "counter",
        "Losses since the queue was first observed.",
        |gauge| Some(gauge.losses as f64),
    ),
    (
        "tailback_queue_score",
        "gauge",
        "Score of the queue: 1 is saturated; may exceed 1.",
        |gauge| Some(gauge.score),
    ),
    (
        "tailback_queue_level",
        "gauge",
        "Level of the queue: 0 ok, 1 warn, 2 critical, 3 full.",
        |gauge| Some(f64::from(gauge.level as u8)),
    ),
    (
        "tailback_queue_time_to_full_seconds",
        "gauge",
        "Forecast time until the queue is full; absent if it is not filling.",
        |gauge| gauge.time_to_full_ns.map(|ns| ns as f64 / SECOND),
    ),
];

/// All metrics.
pub fn render(state: &SharedState) -> String {
    let snapshot = state.snapshot();
    let mut text = String::new();
    of_targets(&mut text, &snapshot);
    info_of_targets(&mut text, &snapshot);
    of_queues(&mut text, &snapshot, &state.waits());
    of_controllers(&mut text, &snapshot);
    of_agent(&mut text, state, &snapshot);
    let services = snapshot.pressures.iter().zip(snapshot.names.iter());
    let names: BTreeMap<TargetId, &String> = services
        .map(|(pressure, name)| (pressure.target.id, name))
        .collect();
    let name = |target| names.get(&target).map(|name| (*name).clone());
    state.exact_waits().render(&mut text, name);
    text
}

fn of_targets(text: &mut String, snapshot: &Snapshot) {
    // An unknown value is absent.
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
        "Maximum number of requests to have in service at once; absent without overload.",
        &|i| of[i].concurrency_limit.map(f64::from),
    );
    family_of_some(
        "tailback_max_queue_wait_seconds",
        "Max queue wait: reject work at dequeue if it waited longer; absent without overload.",
        &|i| of[i].max_queue_wait_ns.map(|ns| ns as f64 / SECOND),
    );
    let mut family = |name: &str, help: &str, value: &dyn Fn(usize) -> f64| {
        family_of_some(name, help, &|i| Some(value(i)));
    };
    family(
        "tailback_shedding",
        "1 while new work should be rejected, by admit ratio, concurrency limit or max queue wait.",
        &|i| f64::from(of[i].is_shedding()),
    );
    family(
        "tailback_level",
        "Level of the worst queue: 0 ok, 1 warn, 2 critical, 3 full.",
        &|i| f64::from(of[i].level as u8),
    );
    family(
        "tailback_score",
        "Score of the worst queue: 1 is saturated; may exceed 1.",
        &|i| of[i].score,
    );
    family(
        "tailback_admit_ratio",
        "Share of new work to admit, 0.05 to 1.",
        &|i| of[i].admit_ratio,
    );
    family(
        "tailback_load_ratio",
        "Demand divided by capacity, at most 2.",
        &|i| of[i].load.all,
    );
    family(
        "tailback_cpu_ratio",
        "CPU time as a fraction of the CPUs that the service may use.",
        &|i| of[i].load.cpu,
    );
}

/// What the node knows of where each service runs. A service has no other labels, so these are joined by `target`.
fn info_of_targets(text: &mut String, snapshot: &Snapshot) {
    const INFO: &str = "tailback_target_info";
    head(
        text,
        INFO,
        "gauge",
        "Always 1; where the service runs, as the node knows it.",
    );
    for (pressure, name) in snapshot.pressures.iter().zip(snapshot.names.iter()) {
        let target = &*pressure.target;
        let pod = target.workload.pod.as_ref();
        let own = &*snapshot.downward;
        let unit = match &target.workload.owner {
            Owner::Unit(unit) => Some(unit.as_str()),
            _ => None,
        };
        let labels = [
            (
                "k8s_namespace_name",
                pod.map(|pod| &*pod.namespace).or(own.namespace.as_deref()),
            ),
            (
                "k8s_pod_name",
                pod.map(|pod| &*pod.name).or(own.pod.as_deref()),
            ),
            ("k8s_container_name", pod.map(|pod| &*pod.container)),
            ("k8s_node_name", own.node.as_deref()),
            ("container_id", target.container.as_deref()),
            ("systemd_unit", unit),
        ];
        let _ = write!(text, "{INFO}{{target=\"{}\"", escaped(name));
        for (label, value) in labels {
            if let Some(value) = value {
                let _ = write!(text, ",{label}=\"{}\"", escaped(value));
            }
        }
        let _ = writeln!(text, "}} 1");
    }
}

fn of_queues(text: &mut String, snapshot: &Snapshot, waits: &WaitHistograms) {
    let (queues, omitted) = exported(snapshot);
    for (name, kind, help, value) in OF_QUEUES {
        head(text, name, kind, help);
        for ((target, key), gauge) in &queues {
            if let Some(value) = value(gauge) {
                let _ = writeln!(text, "{name}{{{}}} {value}", labels(target, key));
            }
        }
    }
    const CAUSE: &str = "tailback_queue_cause";
    head(
        text,
        CAUSE,
        "gauge",
        "1 for the cause of the queue's verdict.",
    );
    for (target, key) in queues.keys() {
        if let Some(cause) = snapshot.causes.get(*key) {
            let (labels, cause) = (labels(target, key), cause.name());
            let _ = writeln!(text, "{CAUSE}{{{labels},cause=\"{cause}\"}} 1");
        }
    }
    const WAIT: &str = "tailback_queue_wait_seconds";
    head(
        text,
        WAIT,
        "histogram",
        "Queueing delay of departures; all departures between two samples are counted at their mean delay.",
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
        "Queues beyond the export limit.",
        omitted.all as f64,
    );
    one(
        text,
        "tailback_saturated_queues_omitted",
        "gauge",
        "Queues beyond the export limit that are not at level ok.",
        omitted.saturated as f64,
    );
}

/// How many queues are beyond the export limit.
struct Omitted {
    all: usize,
    saturated: usize,
}

type Exported<'a> = BTreeMap<(&'a str, &'a QueueKey), &'a Gauge>;

/// The queues of the output: those with the highest levels, then the worst of each service, then its second-worst, and so on. So
/// no service is left out for the idle queues of another one.
fn exported(snapshot: &Snapshot) -> (Exported<'_>, Omitted) {
    let services = snapshot.pressures.iter().zip(snapshot.names.iter());
    let mut all: Vec<_> = services
        .flat_map(|(pressure, name)| {
            // A service lists its worst queue first.
            let queues = pressure.queues.iter().enumerate();
            queues.map(move |(rank, (key, gauge))| {
                let order = (std::cmp::Reverse(gauge.level), rank);
                (order, (&**name, &**key), gauge)
            })
        })
        .collect();
    let mut omitted = Omitted {
        all: 0,
        saturated: 0,
    };
    if all.len() > MAX_QUEUES {
        // Stable: among equals, the order of the services decides.
        all.sort_by_key(|(order, ..)| *order);
        let beyond = &all[MAX_QUEUES..];
        omitted.all = beyond.len();
        let saturated = beyond.iter().filter(|(.., gauge)| gauge.level > Level::Ok);
        omitted.saturated = saturated.count();
        all.truncate(MAX_QUEUES);
    }
    let queues = all.into_iter().map(|(_, id, gauge)| (id, gauge));
    (queues.collect(), omitted)
}

/// The labels of a queue.
fn labels(target: &str, key: &QueueKey) -> String {
    let (kind, target, queue) = (key.kind.name(), escaped(target), escaped(key.name()));
    format!("target=\"{target}\",kind=\"{kind}\",queue=\"{queue}\"")
}

/// Only queues with a delay have a controller, so these families are small; their number is bounded like that of the queues.
fn of_controllers(text: &mut String, snapshot: &Snapshot) {
    let all = snapshot.pressures.iter().zip(snapshot.names.iter());
    let controllers: Vec<(String, ControllerState)> = all
        .flat_map(|(pressure, name)| {
            let of_queue = |(key, state): &(Arc<QueueKey>, _)| (labels(name, key), *state);
            pressure.controllers.iter().map(of_queue)
        })
        .take(MAX_QUEUES)
        .collect();
    const MODE: &str = "tailback_controller_mode";
    head(text, MODE, "gauge", "1 for the current mode.");
    for (labels, state) in &controllers {
        let mode = state.mode.name();
        let _ = writeln!(text, "{MODE}{{{labels},mode=\"{mode}\"}} 1");
    }
    for (name, kind, help, value) in OF_CONTROLLERS {
        head(text, name, kind, help);
        for (labels, state) in &controllers {
            if let Some(value) = value(state) {
                let _ = writeln!(text, "{name}{{{labels}}} {value}");
            }
        }
    }
}

fn of_agent(text: &mut String, state: &SharedState, snapshot: &Snapshot) {
    agent_up(text, snapshot.is_current());
    const BUILD: &str = "tailback_build_info";
    head(text, BUILD, "gauge", "Always 1; the agent's version.");
    let version = env!("CARGO_PKG_VERSION");
    let _ = writeln!(text, "{BUILD}{{version=\"{version}\"}} 1");
    if let Some(report) = snapshot.report.as_deref() {
        for (name, kind, help, value) in [
            (
                "tailback_agent_samples_total",
                "counter",
                "Samples of all queues.",
                report.samples as f64,
            ),
            (
                "tailback_agent_late_samples_total",
                "counter",
                "Samples that began more than a whole sampling interval late.",
                report.late_samples as f64,
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
                "CPU time of the agent as a fraction of one core, over the last report interval (10 s).",
                report.cpu_share,
            ),
            (
                "tailback_agent_resident_bytes",
                "gauge",
                "Resident memory of the agent.",
                report.rss_bytes as f64,
            ),
            (
                "tailback_agent_targets",
                "gauge",
                "Watched services.",
                f64::from(report.targets),
            ),
            (
                "tailback_agent_spans_total",
                "counter",
                "Spans passed to the exporter.",
                report.spans as f64,
            ),
            (
                "tailback_agent_spans_dropped_total",
                "counter",
                "Spans dropped because the spool was full or the collector refused them.",
                report.spans_dropped as f64,
            ),
            (
                "tailback_agent_samples_not_recorded_total",
                "counter",
                "Samples that could not be written to the recording.",
                report.samples_not_recorded as f64,
            ),
        ] {
            one(text, name, kind, help, value);
        }
    }
    if let Some(file) = state.config_file() {
        one(
            text,
            "tailback_config_last_reload_successful",
            "gauge",
            "1 if the configuration file was accepted when it was last read, else 0.",
            f64::from(u8::from(file.error.is_none())),
        );
        one(
            text,
            "tailback_config_last_reload_success_timestamp_seconds",
            "gauge",
            "Unix time at which the configuration in force was loaded.",
            file.loaded_unix_ns as f64 / SECOND,
        );
        one(
            text,
            "tailback_config_settings_awaiting_restart",
            "gauge",
            "Settings of the configuration file that take effect only after a restart.",
            file.needs_restart.len() as f64,
        );
    }
    let pages = snapshot.pages;
    one(
        text,
        "tailback_pages",
        "gauge",
        "Published pages.",
        pages.written as f64,
    );
    one(
        text,
        "tailback_pages_failed",
        "gauge",
        "Services without a page, because it cannot be written or there are too many.",
        (pages.failed + pages.over_limit) as f64,
    );
    one(
        text,
        "tailback_pages_renamed",
        "gauge",
        "Services whose page does not have their plain name, because another service has it.",
        pages.renamed as f64,
    );
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed) as f64;
    one(
        text,
        "tailback_stream_subscribers",
        "gauge",
        "Clients of the unix stream.",
        state.subscribers().len() as f64,
    );
    one(
        text,
        "tailback_stream_lines_total",
        "counter",
        "Lines published on the unix stream.",
        count(&state.counts.lines),
    );
    head(
        text,
        "tailback_stream_dropped_total",
        "counter",
        "Clients that were rejected or disconnected.",
    );
    for (reason, counter) in [
        ("rejected", &state.counts.rejected),
        ("too_slow", &state.counts.too_slow),
        ("invalid_commands", &state.counts.invalid_commands),
    ] {
        let _ = writeln!(
            text,
            "tailback_stream_dropped_total{{reason=\"{reason}\"}} {}",
            count(counter)
        );
    }
}

/// Whether the agent is sampling. The adapters report it for an agent that is gone.
pub fn agent_up(text: &mut String, is_up: bool) {
    one(
        text,
        "tailback_agent_up",
        "gauge",
        "1 if the agent replies and is sampling, else 0.",
        is_up.into(),
    );
}

/// A family with a single value.
pub fn one(text: &mut String, name: &str, kind: &str, help: &str, value: f64) {
    head(text, name, kind, help);
    let _ = writeln!(text, "{name} {value}");
}

/// The HELP and TYPE lines of a family.
pub fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Escapes a label value.
pub fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
pub(crate) mod reference;
#[cfg(test)]
mod tests;
