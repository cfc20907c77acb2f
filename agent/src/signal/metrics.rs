//! Metrics of the services, queues, controllers and the agent.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use super::{
    controller::ControllerState,
    exposition::{Exposition, Type},
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
type Family<T> = (&'static str, Type, &'static str, fn(&T) -> Option<f64>);

/// Nanoseconds per second.
const SECOND: f64 = 1e9;

const OF_CONTROLLERS: &[Family<ControllerState>] = &[
    (
        "tailback_controller_admit_ratio",
        Type::Gauge,
        "Share of new work to admit for this queue, 0.05 to 1.",
        |state| Some(state.admit_ratio),
    ),
    (
        "tailback_controller_equilibrium_admit_ratio",
        Type::Gauge,
        "Admit ratio at which arrivals equal departures; absent until departures were observed under load.",
        |state| state.equilibrium_admit_ratio,
    ),
    (
        "tailback_controller_utilization_ratio",
        Type::Gauge,
        "Recent utilization of the busiest worker group, event loop or CPU set of the service.",
        |state| state.utilization,
    ),
    (
        "tailback_controller_overload_utilization_ratio",
        Type::Gauge,
        "Mean utilization while work was waiting.",
        |state| state.overload_utilization,
    ),
    (
        "tailback_controller_target_delay_seconds",
        Type::Gauge,
        "Standing delay that the controller accepts.",
        |state| Some(state.target_delay_ns as f64 / SECOND),
    ),
    (
        "tailback_controller_standing_delay_seconds",
        Type::Gauge,
        "Minimum delay over the last decisions; 0 until it has persisted long enough.",
        |state| Some(state.standing_delay_ns as f64 / SECOND),
    ),
    (
        "tailback_controller_max_queue_wait_seconds",
        Type::Gauge,
        "Longest queue wait that the controller accepts under overload.",
        |state| Some(state.max_queue_wait_ns as f64 / SECOND),
    ),
];

const OF_QUEUES: &[Family<Gauge>] = &[
    (
        "tailback_queue_depth",
        Type::Gauge,
        "Items in the queue, in the unit of its kind.",
        |gauge| Some(gauge.depth as f64),
    ),
    (
        "tailback_queue_limit",
        Type::Gauge,
        "Capacity of the queue, in the unit of its kind.",
        |gauge| gauge.limit.map(|limit| limit as f64),
    ),
    (
        "tailback_queue_fill_ratio",
        Type::Gauge,
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
        Type::Gauge,
        "Age of the oldest item waiting.",
        |gauge| gauge.oldest_age_ns.map(|ns| ns as f64 / SECOND),
    ),
    (
        "tailback_queue_standing_delay_seconds",
        Type::Gauge,
        "Standing delay: the minimum delay over the detection window.",
        |gauge| Some(gauge.standing_delay_ns as f64 / SECOND),
    ),
    (
        "tailback_queue_arrivals_total",
        Type::Counter,
        "Arrivals since the queue was first observed.",
        |gauge| Some(gauge.arrivals as f64),
    ),
    (
        "tailback_queue_departures_total",
        Type::Counter,
        "Departures since the queue was first observed.",
        |gauge| Some(gauge.departures as f64),
    ),
    (
        "tailback_queue_losses_total",
        Type::Counter,
        "Losses since the queue was first observed.",
        |gauge| Some(gauge.losses as f64),
    ),
    (
        "tailback_queue_score",
        Type::Gauge,
        "Score of the queue: 1 is saturated; may exceed 1.",
        |gauge| Some(gauge.score),
    ),
    (
        "tailback_queue_level",
        Type::Gauge,
        "Level of the queue: 0 ok, 1 warn, 2 critical, 3 full.",
        |gauge| Some(f64::from(gauge.level as u8)),
    ),
    (
        "tailback_queue_time_to_full_seconds",
        Type::Gauge,
        "Forecast time until the queue is full; absent if it is not filling.",
        |gauge| gauge.time_to_full_ns.map(|ns| ns as f64 / SECOND),
    ),
];

/// All metrics.
pub fn render(state: &SharedState) -> Exposition {
    let snapshot = state.snapshot();
    let mut all = Exposition::default();
    of_targets(&mut all, &snapshot);
    info_of_targets(&mut all, &snapshot);
    of_queues(&mut all, &snapshot, &state.waits());
    of_controllers(&mut all, &snapshot);
    of_agent(&mut all, state, &snapshot);
    let services = snapshot.pressures.iter().zip(snapshot.names.iter());
    let names: BTreeMap<TargetId, &String> = services
        .map(|(pressure, name)| (pressure.target.id, name))
        .collect();
    let name = |target| names.get(&target).map(|name| (*name).clone());
    state.exact_waits().render(&mut all, name);
    all
}

fn of_targets(all: &mut Exposition, snapshot: &Snapshot) {
    // An unknown value is absent.
    let mut family_of_some = |name: &str, help: &str, value: &dyn Fn(usize) -> Option<f64>| {
        let family = all.family(name, Type::Gauge, help);
        for (index, target) in snapshot.names.iter().enumerate() {
            if let Some(value) = value(index) {
                family.add(&[("target", target)], value);
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
fn info_of_targets(all: &mut Exposition, snapshot: &Snapshot) {
    let family = all.family(
        "tailback_target_info",
        Type::Gauge,
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
        let known = labels
            .into_iter()
            .filter_map(|(label, value)| Some((label, value?)));
        let labels: Vec<(&str, &str)> = [("target", name.as_str())]
            .into_iter()
            .chain(known)
            .collect();
        family.add(&labels, 1.0);
    }
}

fn of_queues(all: &mut Exposition, snapshot: &Snapshot, waits: &WaitHistograms) {
    let (queues, omitted) = exported(snapshot);
    for (name, kind, help, value) in OF_QUEUES {
        let family = all.family(name, *kind, help);
        for ((target, key), gauge) in &queues {
            if let Some(value) = value(gauge) {
                family.add(&labels(target, key), value);
            }
        }
    }
    let family = all.family(
        "tailback_queue_cause",
        Type::Gauge,
        "1 for the cause of the queue's verdict.",
    );
    for (target, key) in queues.keys() {
        if let Some(cause) = snapshot.causes.get(*key) {
            let [target, kind, queue] = labels(target, key);
            family.add(&[target, kind, queue, ("cause", cause.name())], 1.0);
        }
    }
    let family = all.family(
        "tailback_queue_wait_seconds",
        Type::Histogram,
        "Queueing delay of departures; all departures between two samples are counted at their mean delay.",
    );
    for (target, key) in queues.keys() {
        if let Some(histogram) = waits.of(key) {
            family.add_histogram(&labels(target, key), histogram.exposed());
        }
    }
    all.one(
        "tailback_queues_omitted",
        Type::Gauge,
        "Queues beyond the export limit.",
        omitted.all as f64,
    );
    all.one(
        "tailback_saturated_queues_omitted",
        Type::Gauge,
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
fn labels<'a>(target: &'a str, key: &'a QueueKey) -> [(&'static str, &'a str); 3] {
    [
        ("target", target),
        ("kind", key.kind.name()),
        ("queue", key.name()),
    ]
}

/// Only queues with a delay have a controller, so these families are small; their number is bounded like that of the queues.
fn of_controllers(all: &mut Exposition, snapshot: &Snapshot) {
    let services = snapshot.pressures.iter().zip(snapshot.names.iter());
    let controllers: Vec<([(&str, &str); 3], ControllerState)> = services
        .flat_map(|(pressure, name)| {
            let controllers = pressure.controllers.iter();
            controllers.map(move |(key, state)| (labels(name, key), *state))
        })
        .take(MAX_QUEUES)
        .collect();
    let family = all.family(
        "tailback_controller_mode",
        Type::Gauge,
        "1 for the current mode.",
    );
    for ([target, kind, queue], state) in &controllers {
        let mode = ("mode", state.mode.name());
        family.add(&[*target, *kind, *queue, mode], 1.0);
    }
    for (name, kind, help, value) in OF_CONTROLLERS {
        let family = all.family(name, *kind, help);
        for (labels, state) in &controllers {
            if let Some(value) = value(state) {
                family.add(labels, value);
            }
        }
    }
}

fn of_agent(all: &mut Exposition, state: &SharedState, snapshot: &Snapshot) {
    agent_up(all, snapshot.is_current());
    let version = env!("CARGO_PKG_VERSION");
    all.family(
        "tailback_build_info",
        Type::Gauge,
        "Always 1; the agent's version.",
    )
    .add(&[("version", version)], 1.0);
    if let Some(report) = snapshot.report.as_deref() {
        for (name, kind, help, value) in [
            (
                "tailback_agent_samples_total",
                Type::Counter,
                "Samples of all queues.",
                report.samples as f64,
            ),
            (
                "tailback_agent_late_samples_total",
                Type::Counter,
                "Samples that began more than a whole sampling interval late.",
                report.late_samples as f64,
            ),
            (
                "tailback_agent_records_total",
                Type::Counter,
                "Records read from the kernel.",
                report.records as f64,
            ),
            (
                "tailback_agent_cpu_seconds_total",
                Type::Counter,
                "CPU time of the agent.",
                report.cpu_ns as f64 / SECOND,
            ),
            (
                "tailback_agent_cpu_ratio",
                Type::Gauge,
                "CPU time of the agent as a fraction of one core, over the last report interval (10 s).",
                report.cpu_share,
            ),
            (
                "tailback_agent_resident_bytes",
                Type::Gauge,
                "Resident memory of the agent.",
                report.rss_bytes as f64,
            ),
            (
                "tailback_agent_targets",
                Type::Gauge,
                "Watched services.",
                f64::from(report.targets),
            ),
            (
                "tailback_agent_spans_total",
                Type::Counter,
                "Spans passed to the exporter.",
                report.spans as f64,
            ),
            (
                "tailback_agent_spans_dropped_total",
                Type::Counter,
                "Spans dropped because the spool was full or the collector refused them.",
                report.spans_dropped as f64,
            ),
            (
                "tailback_agent_samples_not_recorded_total",
                Type::Counter,
                "Samples that could not be written to the recording.",
                report.samples_not_recorded as f64,
            ),
        ] {
            all.one(name, kind, help, value);
        }
    }
    if let Some(file) = state.config_file() {
        all.one(
            "tailback_config_last_reload_successful",
            Type::Gauge,
            "1 if the configuration file was accepted when it was last read, else 0.",
            f64::from(u8::from(file.error.is_none())),
        );
        all.one(
            "tailback_config_last_reload_success_timestamp_seconds",
            Type::Gauge,
            "Unix time at which the configuration in force was loaded.",
            file.loaded_unix_ns as f64 / SECOND,
        );
        all.one(
            "tailback_config_settings_awaiting_restart",
            Type::Gauge,
            "Settings of the configuration file that take effect only after a restart.",
            file.needs_restart.len() as f64,
        );
    }
    let pages = snapshot.pages;
    all.one(
        "tailback_pages",
        Type::Gauge,
        "Published pages.",
        pages.written as f64,
    );
    all.one(
        "tailback_pages_failed",
        Type::Gauge,
        "Services without a page, because it cannot be written or there are too many.",
        (pages.failed + pages.over_limit) as f64,
    );
    all.one(
        "tailback_pages_renamed",
        Type::Gauge,
        "Services whose page does not have their plain name, because another service has it.",
        pages.renamed as f64,
    );
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed) as f64;
    all.one(
        "tailback_stream_subscribers",
        Type::Gauge,
        "Clients of the unix stream.",
        state.subscribers().len() as f64,
    );
    all.one(
        "tailback_stream_lines_total",
        Type::Counter,
        "Lines published on the unix stream.",
        count(&state.counts.lines),
    );
    let family = all.family(
        "tailback_stream_dropped_total",
        Type::Counter,
        "Clients that were rejected or disconnected.",
    );
    for (reason, counter) in [
        ("rejected", &state.counts.rejected),
        ("too_slow", &state.counts.too_slow),
        ("invalid_commands", &state.counts.invalid_commands),
    ] {
        family.add(&[("reason", reason)], count(counter));
    }
}

/// Whether the agent is sampling. The adapters report it for an agent that is gone.
pub fn agent_up(all: &mut Exposition, is_up: bool) {
    all.one(
        "tailback_agent_up",
        Type::Gauge,
        "1 if the agent replies and is sampling, else 0.",
        is_up.into(),
    );
}

#[cfg(test)]
pub(crate) mod reference;
#[cfg(test)]
mod tests;
