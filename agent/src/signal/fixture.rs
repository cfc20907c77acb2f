//! Test data: the state of a service about which everything is known.

use std::sync::Arc;

use super::{
    controller::{ControllerState, Mode},
    load::Load,
    pressure::{Pressure, PressureTracker},
    state::{ConfigFile, SharedState, Snapshot, Subscriber},
};
use crate::{
    cause::Cause,
    detect::Gauge,
    event::Level,
    queue::{Kind, QueueKey},
    sample::{
        AgentReport, Architecture, Distribution, ExactWait, ExactWaitKind, HookCost, HookLoss,
        HookReport, Owner, Pod, Target, Workload,
    },
    target::Downward,
};

/// Every time, ns: 2.5 s.
const TIME_NS: u64 = 2_500_000_000;

fn queue() -> (Arc<QueueKey>, Gauge) {
    let key = QueueKey::new(1, Kind::Accept, ":80".into());
    let gauge = Gauge {
        at_ns: 1,
        level: Level::Critical,
        score: 0.93,
        depth: 9,
        limit: Some(100),
        standing_delay_ns: TIME_NS,
        oldest_age_ns: Some(TIME_NS),
        wait_ns: Some(TIME_NS),
        time_to_full_ns: Some(TIME_NS),
        is_counted: true,
        arrivals: 20,
        departures: 11,
        losses: 3,
        ..Gauge::default()
    };
    (Arc::new(key), gauge)
}

fn controller() -> ControllerState {
    ControllerState {
        mode: Mode::Draining,
        admit_ratio: 0.31,
        equilibrium_admit_ratio: Some(0.5),
        utilization: Some(1.0),
        overload_utilization: Some(1.0),
        target_delay_ns: TIME_NS,
        standing_delay_ns: TIME_NS,
        max_queue_wait_ns: TIME_NS,
    }
}

pub(super) fn pressure() -> Pressure {
    let shop = Arc::new(Target {
        name: "shop".to_owned(),
        container: Some("c0ffee".to_owned()),
        workload: Workload {
            owner: Owner::Unit("shop.service".to_owned()),
            pod: Some(Pod {
                namespace: "default".to_owned(),
                name: "shop-1".to_owned(),
                container: "web".to_owned(),
            }),
            ..Workload::default()
        },
        ..Target::default()
    });
    let none = PressureTracker::default().read(0, std::iter::empty(), std::iter::once(&shop));
    let (key, gauge) = queue();
    Pressure {
        level: Level::Critical,
        score: 0.93,
        admit_ratio: 0.31,
        load: Load { all: 1.5, cpu: 0.5 },
        utilization: Some(1.0),
        concurrency_limit: Some(6),
        max_queue_wait_ns: Some(TIME_NS),
        time_to_full_ns: Some(TIME_NS),
        queues: vec![(Arc::clone(&key), gauge)],
        controllers: vec![(key, controller())],
        ..none[0].clone()
    }
}

fn hooks() -> HookReport {
    let wait = |kind, call| ExactWait {
        kind,
        call,
        distribution: Distribution {
            count: 1,
            total_ns: TIME_NS,
            max_ns: TIME_NS,
            waits: vec![(TIME_NS, 1)],
        },
        ..ExactWait::default()
    };
    HookReport {
        is_attached: true,
        reason: "requested".to_owned(),
        hooks: vec![HookCost {
            name: "sched_switch".to_owned(),
            runs: 10,
            cpu_ns: TIME_NS,
        }],
        share: 0.002,
        expected_share: 0.003,
        budget: 0.01,
        lost: vec![HookLoss {
            reason: "map_busy".to_owned(),
            count: 1,
        }],
        interval_ns: TIME_NS,
        waits: vec![
            wait(ExactWaitKind::Woken, None),
            wait(ExactWaitKind::Blocked, Some(0)),
        ],
    }
}

pub(super) fn state() -> SharedState {
    let state = SharedState::default();
    let pressures = vec![pressure()];
    state.count_waits(&pressures);
    let targets = [pressures[0].target.id].into();
    state
        .exact_waits()
        .add(&hooks(), (0, 0), Architecture::X86_64, &targets);
    state.set(Snapshot {
        until_ns: u64::MAX,
        pressures: Arc::new(pressures),
        names: Arc::new(vec!["shop".to_owned()]),
        causes: Arc::new([(queue().0, Cause::DownstreamSlow)].into()),
        downward: Arc::new(Downward {
            node: Some("node-1".to_owned()),
            ..Downward::default()
        }),
        report: Some(Arc::new(AgentReport {
            cpu_ns: TIME_NS,
            cpu_share: 0.01,
            ..AgentReport::default()
        })),
        ..Snapshot::default()
    });
    state.set_config_file(ConfigFile {
        path: "/etc/tailback.toml".to_owned(),
        loaded_unix_ns: TIME_NS,
        reloads: 1,
        rejected: 1,
        error: Some("line 1: unknown field".to_owned()),
        needs_restart: vec!["otlp".to_owned()],
    });
    state.add_subscriber(Subscriber {
        pid: Some(1),
        target: Some("shop".to_owned()),
        min_level: Level::Warn,
        since_unix_ns: 1,
        lines: 1,
    });
    state
}
