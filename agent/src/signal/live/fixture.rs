//! Test data: the incident of `emit::fixture` in the second minute of a running agent, beside a healthy service.

use std::sync::Arc;

use super::{
    Live,
    view::{Agent, Reader, Subscriber, View},
};
use crate::{
    detect::Gauge,
    emit::fixture::{GATEWAY, SECOND, SHOP, at, episode, gateway, shop, targets},
    event::{Episode, Event, Level},
    queue::{Kind, QueueKey},
    sample::{
        Architecture, Distribution, ExactWait, ExactWaitKind, HookReport, Target, WaitParty,
        WorstWait,
    },
    signal::pressure::{Pressure, PressureTracker},
};

/// When the fixture's view is made, seconds.
const NOW: u64 = 80;

/// A queue with `depth` items, of which each takes 23 ms to serve: the wait is `depth` × 23 ms.
pub(crate) fn gauge(depth: u64, limit: u64, level: Level) -> Gauge {
    Gauge {
        level,
        score: depth as f64 / limit as f64,
        depth,
        limit: Some(limit),
        fill: Some((depth as f64 / limit as f64).min(1.0)),
        wait_ns: Some(depth * 23_000_000),
        arrivals_per_s: Some(40.0),
        departures_per_s: Some(4.1),
        ..Gauge::default()
    }
}

/// The pressure on a service with these queues, the worst first.
pub(crate) fn pressure(target: &Arc<Target>, queues: Vec<(Arc<QueueKey>, Gauge)>) -> Pressure {
    let mut all = PressureTracker::default().read(0, std::iter::empty(), std::iter::once(target));
    let worst = queues[0].1;
    Pressure {
        level: worst.level,
        score: worst.score,
        time_to_full_ns: worst.time_to_full_ns,
        queues,
        ..all.remove(0)
    }
}

fn pressures(live: &Live, seconds: u64) -> Vec<Pressure> {
    let filled = seconds.saturating_sub(30).min(50) * 2;
    let level = match filled {
        0..30 => Level::Ok,
        30..90 => Level::Critical,
        _ => Level::Full,
    };
    let of_shop = vec![
        (
            shop().key,
            Gauge {
                losses: 14,
                ..gauge(filled, 100, level)
            },
        ),
        (key(SHOP, Kind::Workers, "uwsgi-#"), gauge(4, 4, Level::Ok)),
        (key(SHOP, Kind::Recv, ":8080"), gauge(0, 87_380, Level::Ok)),
    ];
    let mut shop = pressure(&live.targets[&SHOP], of_shop);
    if level > Level::Ok {
        shop.admit_ratio = 0.62;
        shop.concurrency_limit = Some(6);
        shop.max_queue_wait_ns = Some(15_000_000);
        shop.retry_after_ms = 2_300;
    }
    let of_gateway = vec![(
        gateway().key,
        Gauge {
            time_to_full_ns: (level > Level::Ok).then_some(6 * SECOND),
            ..gauge(filled * 4, 511, level.min(Level::Critical))
        },
    )];
    let calm = Arc::new(Target {
        id: 9,
        name: "calm".to_owned(),
        pid: 77,
        ..Target::default()
    });
    let of_calm = vec![(
        key(9, Kind::Accept, "0.0.0.0:6379"),
        gauge(0, 128, Level::Ok),
    )];
    vec![
        pressure(&calm, of_calm),
        pressure(&live.targets[&GATEWAY], of_gateway),
        shop,
    ]
}

fn key(target: u32, kind: Kind, name: &str) -> Arc<QueueKey> {
    Arc::new(QueueKey::new(target, kind, name.into()))
}

/// What hooks have measured of the shop: its waits for a CPU behind a backup, and for its database.
fn hooks() -> HookReport {
    let waits = |kind, call, path: Option<&str>, waits: [(u64, u64); 2]| ExactWait {
        target: SHOP,
        tgid: 4_711,
        kind,
        call,
        path: path.map(str::to_owned),
        distribution: Distribution {
            count: waits[0].1 + waits[1].1,
            total_ns: waits[0].0 * waits[0].1 + waits[1].0 * waits[1].1,
            max_ns: waits[1].0,
            waits: waits.to_vec(),
        },
        ..ExactWait::default()
    };
    let worst = WorstWait {
        wait_ns: 5_200_000,
        tid: 4_711,
        culprit: Some(WaitParty {
            tgid: 950,
            tid: 951,
            comm: "backup".to_owned(),
        }),
        culprit_ns: 4_000_000,
        ..WorstWait::default()
    };
    let for_cpu = ExactWait {
        worst: Some(worst),
        ..waits(
            ExactWaitKind::Woken,
            None,
            None,
            [(12_000, 1_203), (5_200_000, 1)],
        )
    };
    // recvfrom(2) of x86-64.
    let blocked = waits(
        ExactWaitKind::Blocked,
        Some(45),
        Some("socket:[4711]"),
        [(92_000_000, 9), (160_000_000, 1)],
    );
    HookReport {
        is_attached: true,
        interval_ns: SECOND,
        waits: vec![blocked, for_cpu],
        ..HookReport::default()
    }
}

/// As after many samples.
pub(crate) fn live() -> (Live, Vec<Pressure>) {
    let mut live = Live::default();
    live.take(&targets());
    let over = Episode {
        ongoing: false,
        verdict: shop().verdict,
        ..episode("e0", GATEWAY, Kind::Inflight, ":80")
    };
    live.take(&Event::Episode(Box::new(over)));
    for seconds in 0..=NOW {
        let now = pressures(&live, seconds);
        live.read(at(seconds).mono_ns, at(seconds).unix_ns, &now);
        if seconds == 50 {
            live.take(&Event::EpisodeOpened(Box::new(shop())));
            live.take(&Event::EpisodeOpened(Box::new(gateway())));
        }
    }
    live.set_exact_waits(&hooks(), Architecture::X86_64);
    let now = pressures(&live, NOW);
    (live, now)
}

/// The view with everything that it can contain.
pub(crate) fn view() -> View {
    let (live, pressures) = live();
    let names = ["calm", "gateway", "shop"].map(str::to_owned);
    let mut view = View::of(at(NOW).unix_ns, &pressures, &names, &live);
    view.agent = Some(Agent {
        pid: 4_000,
        version: "0.1.0".to_owned(),
        sampling: true,
        node: Some("node-1".to_owned()),
    });
    view.subscribers = vec![Subscriber {
        pid: Some(4_100),
        target: Some("shop".to_owned()),
    }];
    let reader = Reader {
        pid: 4_712,
        name: "uwsgi".to_owned(),
    };
    view.add_readers([("shop", reader.clone()), ("gone", reader)].into_iter());
    view
}
