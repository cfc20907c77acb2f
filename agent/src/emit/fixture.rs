//! Test data: an incident of two services whose root cause is a third one, a database.

use std::sync::Arc;

use crate::{
    cause::Cause,
    detect::Waiting,
    diagnose::{Calls, NoBaseline},
    event::{
        Activity, CauseStretch, Confidence, Culprit, CulpritKind, DrivenBy, Episode, Event, Hop,
        Instant, Level, LoggedMessage, Verdict,
    },
    queue::{Kind, QueueKey},
    sample::{Sample, Target, TargetId},
};

pub const SECOND: u64 = 1_000_000_000;
pub const INCIDENT: &str = "0af7651916cd43dd8448eb211c80319c";
pub const SHOP: TargetId = 1;
pub const GATEWAY: TargetId = 2;
pub const POSTGRES: TargetId = 3;

/// Seconds after midnight.
pub fn at(seconds: u64) -> Instant {
    Instant {
        mono_ns: seconds * SECOND,
        unix_ns: (1_699_920_000 + seconds) * SECOND,
    }
}

fn target(id: TargetId, name: &str, pid: u32) -> Arc<Target> {
    Arc::new(Target {
        id,
        name: name.to_owned(),
        pid,
        tgids: vec![pid],
        is_neighbour: id == POSTGRES,
        ..Target::default()
    })
}

pub fn targets() -> Event {
    Event::Targets {
        at: at(0),
        targets: vec![
            target(SHOP, "shop", 4711),
            target(GATEWAY, "gateway", 90),
            target(POSTGRES, "postgres", 800),
        ],
    }
}

/// The three services at this second, and as many further ones, which are new each time.
pub fn churn(seconds: u64, count: u32) -> Event {
    let Event::Targets { mut targets, .. } = targets() else {
        unreachable!("they are an event of this kind");
    };
    let first = 1_000 + seconds as u32 * count;
    targets.extend((first..first + count).map(|id| target(id, "job", id)));
    Event::Targets {
        at: at(seconds),
        targets,
    }
}

fn hop(target: TargetId, pid: u32, name: &str, state: &str, cause: Cause) -> Hop {
    Hop {
        target: Some(target),
        pid: Some(pid),
        name: name.to_owned(),
        state: state.to_owned(),
        cause,
    }
}

/// The root cause: a session of the database.
pub fn culprit() -> Culprit {
    Culprit {
        kind: CulpritKind::Process,
        target: Some(POSTGRES),
        pid: Some(812),
        name: "postgres (812)".to_owned(),
        endpoint: Some("127.0.0.1:5432".to_owned()),
        container: None,
    }
}

/// The verdict on the shop: its workers wait for rows that a session of the database has locked.
pub fn verdict() -> Verdict {
    Verdict {
        cause: Cause::DownstreamSlow,
        share: Some(0.97),
        confidence: Confidence::High,
        runner_up: Some((Cause::UndersizedLimit, 0.21)),
        driven_by: DrivenBy::Consumer,
        culprit: Some(culprit()),
        root: Some(Cause::LockContention),
        path: vec![
            hop(SHOP, 4711, "uwsgi (4711)", "97% waiting for postgres at 127.0.0.1:5432", Cause::DownstreamSlow),
            hop(POSTGRES, 815, "postgres (815)", "96% waiting for a row lock (reported by its process title)", Cause::LockContention),
            hop(
                POSTGRES,
                812,
                "postgres (812)",
                "idle in a transaction for at least 8.2 s",
                Cause::LockContention,
            ),
        ],
        shares: vec![
            (Activity::Downstream, 0.97),
            (Activity::Idle, 0.02),
            (Activity::OnCpu, 0.01),
        ],
        samples: 3_120,
        evidence: "4 threads of shop spent 97% waiting for postgres at 127.0.0.1:5432 in 13 s; postgres (815): 96% \
                   waiting for a row lock (reported by its process title); postgres (812): idle in a transaction for \
                   at least 8.2 s"
            .to_owned(),
        advice: "End the transaction of postgres (812), idle for 8.2 s (pg_terminate_backend(812) for PostgreSQL), or \
                 its client; adding workers here will not help."
            .to_owned(),
        explanation: None,
        messages: vec![LoggedMessage {
            name: "listen_queue_full".to_owned(),
            path: "/var/log/uwsgi/shop.log".to_owned(),
            count: 23,
            line: "*** uWSGI listen queue of socket \"127.0.0.1:8080\" (fd: 3) full !!! (100/100) ***"
                .to_owned(),
            first_unix_ns: at(17).unix_ns,
            lead_ns: Some(9_000_000_000),
        }],
    }
}

pub fn episode(id: &str, target: TargetId, kind: Kind, name: &str) -> Episode {
    Episode {
        id: id.to_owned(),
        incident: INCIDENT.to_owned(),
        key: Arc::new(QueueKey::new(target, kind, name.into())),
        onset: at(7),
        start: at(8),
        end: at(20),
        ongoing: true,
        level_max: Level::Full,
        score_max: 1.5,
        depth: 0,
        depth_max: 101,
        empty_share: 0.0,
        limit: Some(100),
        unit: kind.unit(),
        wait_p50_ns: Some(900_000_000),
        wait_p99_ns: None,
        wait_max_ns: Some(2_300_000_000),
        arrivals: Some(480),
        departures: Some(49),
        losses: 14,
        arrival_rate: Some(40.0),
        service_rate: Some(4.1),
        baseline_arrival_rate: Some(39.8),
        baseline_service_rate: Some(40.0),
        driven_by: DrivenBy::Consumer,
        time_to_full_ns: Some(6_000_000_000),
        lead_ns: Some(4_000_000_000),
        worst: None,
        depths: vec![1, 20, 40, 60, 80, 101, 101],
        evidence: "up to 101 of 100 connections; longest wait 2.3 s".to_owned(),
        advice: "Inspect what its workers wait for.".to_owned(),
        verdict: None,
        moments: vec![],
        moments_dropped: 0,
        measured_waits: Vec::new(),
    }
}

/// The shop's listen queue, in front of the database.
pub fn shop() -> Episode {
    Episode {
        verdict: Some(Arc::new(verdict())),
        ..episode("e1", SHOP, Kind::Accept, "127.0.0.1:8080")
    }
}

/// The gateway's listen queue, in front of the shop.
pub fn gateway() -> Episode {
    let mut path = vec![hop(
        GATEWAY,
        90,
        "nginx (90)",
        "95% waiting for shop at 127.0.0.1:8080",
        Cause::DownstreamSlow,
    )];
    path.extend(verdict().path);
    Episode {
        verdict: Some(Arc::new(Verdict {
            path,
            evidence: "1 thread of gateway spent 95% waiting for shop at 127.0.0.1:8080 in 10 s"
                .to_owned(),
            ..verdict()
        })),
        onset: at(9),
        start: at(10),
        level_max: Level::Critical,
        depth_max: 430,
        empty_share: 0.0,
        limit: Some(511),
        ..episode("e2", GATEWAY, Kind::Accept, "0.0.0.0:80")
    }
}

pub fn cause(episode: &Episode, index: u32, from: Instant, to: Instant) -> CauseStretch {
    CauseStretch {
        episode: episode.id.clone(),
        incident: episode.incident.clone(),
        key: Arc::clone(&episode.key),
        verdict: episode
            .verdict
            .clone()
            .unwrap_or_else(|| Arc::new(verdict())),
        from,
        to,
        index,
    }
}

/// Requests in flight with outstanding calls, and no baseline.
pub fn no_baseline() -> NoBaseline {
    NoBaseline {
        key: Arc::new(QueueKey::new(GATEWAY, Kind::Inflight, ":8000".into())),
        waiting: Waiting {
            depth: 60,
            median_age_ns: 12 * SECOND,
            oldest_age_ns: 25 * SECOND,
        },
        calls: Some(Calls {
            endpoint: "127.0.0.1:9000".to_owned(),
            process: Some("python3 (812)".to_owned()),
            outstanding: 31,
            connections: Some(32),
        }),
    }
}

/// A sample taken `seconds` after midnight.
pub fn sample(seconds: u64) -> Sample {
    Sample {
        mono_ns: at(seconds).mono_ns,
        unix_ns: at(seconds).unix_ns,
        ..Sample::default()
    }
}
