//! Verdicts: the cause and the culprit.

use super::{
    super::rules::is_surge,
    scene::{Scene, bursts, episode, filling, local, thread},
};
use crate::{
    cause::Cause,
    event::{Confidence, CulpritKind, DrivenBy, Episode, Verdict},
    queue::{Kind, Reading},
    sample::{
        CpuUser, Detail, Distribution, ExactWait, HookReport, State, Wait, WaitParty, WorstWait,
    },
};

pub(super) fn culprit(verdict: &Verdict) -> (CulpritKind, Option<u32>, &str) {
    let culprit = verdict.culprit.as_ref().unwrap();
    (culprit.kind, culprit.pid, &culprit.name)
}

/// The first `count` threads of a process, all in the same state.
fn alike(tgid: u32, count: u32, observation: impl Fn(Wait) -> Wait) -> Vec<Wait> {
    (0..count)
        .map(|index| observation(thread(tgid, index)))
        .collect()
}

fn depth(depth: u64) -> Reading {
    Reading {
        depth,
        ..Reading::default()
    }
}

fn responds_in(response_ms: u64) -> Reading {
    Reading {
        depth: 3,
        extra: vec![("response_time_ns", response_ms as f64 * 1e6)],
        ..Reading::default()
    }
}

#[test]
fn shares_of_a_verdict_add_up_to_one() {
    let mut scene = Scene::of(&[&[10]]);
    let mut threads = alike(10, 3, Wait::on_cpu);
    threads.push(thread(10, 3).locked(0x1000, 10));
    threads.push(thread(10, 4).call(libc::SYS_nanosleep, [0; 4]));
    scene.take_samples(40, &threads);
    let verdict = scene.verdict(&filling());
    let sum: f64 = verdict.shares.iter().map(|(_, share)| share).sum();
    assert!((sum - 1.0).abs() < 1e-9, "{:?}", verdict.shares);
    assert!(
        verdict
            .share
            .is_some_and(|share| (0.0..=1.0).contains(&share))
    );
}

#[test]
fn a_window_without_samples_is_unknown() {
    let mut scene = Scene::of(&[&[10]]);
    scene.take_samples(40, &[]);
    let verdict = scene.verdict(&filling());
    assert_eq!(
        (verdict.cause, verdict.culprit.clone()),
        (Cause::Unknown, None)
    );
    assert_eq!((verdict.samples, verdict.confidence), (0, Confidence::Low));
    assert_eq!(verdict.shares, []);
}

#[test]
fn the_verdict_names_the_end_of_the_wait_chain() {
    let mut scene = Scene::of(&[&[10], &[20], &[30]]);
    scene.joins(1, (10, 5), (20, 5), 7001);
    scene.joins(3, (20, 6), (30, 5), 7002);
    for cookie in 1..=4 {
        scene.awaits(cookie);
    }
    let threads = [
        thread(10, 0).reads(5),
        thread(20, 0).reads(6),
        thread(30, 0).on_cpu(),
    ];
    scene.take_samples(60, &threads);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert_eq!(
        culprit(&verdict),
        (CulpritKind::Process, Some(30), "service-3 (30)")
    );
    assert_eq!(verdict.root, Some(Cause::CpuBound));
    assert_eq!(verdict.confidence, Confidence::High);
    let path: Vec<_> = verdict.path.iter().map(|hop| hop.pid).collect();
    assert_eq!(path, [Some(10), Some(20), Some(30)]);
}

#[test]
fn a_remote_service_is_named_by_its_address() {
    let mut scene = Scene::of(&[&[10]]);
    scene.calls(1, (10, 5), "10.0.0.9:5432".parse().unwrap());
    scene.awaits(1);
    scene.take_samples(60, &[thread(10, 0).reads(5)]);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert_eq!(
        culprit(&verdict),
        (CulpritKind::Endpoint, None, "10.0.0.9:5432")
    );
}

#[test]
fn a_cycle_of_waiting_is_a_deadlock() {
    let mut scene = Scene::of(&[&[10], &[20]]);
    scene.joins(1, (10, 5), (20, 5), 7001);
    scene.joins(3, (20, 6), (10, 6), 7002);
    for cookie in 1..=4 {
        scene.awaits(cookie);
    }
    scene.take_samples(60, &[thread(10, 0).reads(5), thread(20, 0).reads(6)]);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::ConsumerStalled);
    assert!(
        verdict.evidence.contains("each other"),
        "{}",
        verdict.evidence
    );
}

#[test]
fn a_stopped_service_is_stalled_and_its_own_culprit() {
    let mut scene = Scene::of(&[&[10]]);
    scene.take_samples(60, &alike(10, 4, |wait| wait.state(State::Stopped)));
    let verdict = scene.verdict(&filling());
    assert_eq!(
        (verdict.cause, verdict.share),
        (Cause::ConsumerStalled, Some(1.0))
    );
    assert_eq!(culprit(&verdict).1, Some(10));
}

fn convoy(holder: Wait) -> Vec<Wait> {
    let mut threads = alike(10, 5, |wait| wait.locked(0x1000, 15));
    threads.push(holder);
    threads
}

#[test]
fn a_lock_whose_holder_computes_is_contended() {
    let mut scene = Scene::of(&[&[10]]);
    scene.take_samples(60, &convoy(thread(10, 5).on_cpu()));
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::LockContention);
    assert_eq!(verdict.root, Some(Cause::CpuBound));
    let (kind, _, name) = culprit(&verdict);
    assert_eq!(kind, CulpritKind::Thread);
    assert!(name.contains("(15)"), "{name}");
}

#[test]
fn a_lock_whose_holder_waits_for_a_service_is_not_the_cause() {
    let mut scene = Scene::of(&[&[10], &[20]]);
    scene.joins(1, (10, 5), (20, 5), 7001);
    scene.awaits(1);
    scene.awaits(2);
    let mut threads = convoy(thread(10, 5).reads(5));
    threads.push(thread(20, 0).on_cpu());
    scene.take_samples(60, &threads);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert_eq!(culprit(&verdict).1, Some(20));
}

#[test]
fn a_lock_whose_holder_waits_for_a_disk_is_disk_slow() {
    let mut scene = Scene::of(&[&[10]]);
    let wal = Detail::File {
        path: "/db/wal".to_owned(),
        device: Some("sdb".to_owned()),
    };
    let syncs = thread(10, 5).call(libc::SYS_fsync, [3, 0, 0, 0]).with(wal);
    scene.take_samples(60, &convoy(syncs));
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::DiskSlow);
    assert_eq!(
        culprit(&verdict),
        (CulpritKind::File, Some(10), "/db/wal on sdb")
    );
}

#[test]
fn a_row_lock_leads_to_the_session_idle_in_a_transaction() {
    let mut scene = Scene::of(&[&[10], &[20, 21, 22]]);
    scene.joins(1, (10, 5), (21, 5), 5432);
    scene.awaits(1);
    scene.awaits(2);
    scene.set_title(21, "postgres: bob shop [local] UPDATE waiting");
    scene.set_title(22, "postgres: bob shop [local] idle in transaction");
    let threads = [
        thread(10, 0).reads(5),
        thread(20, 0).serves_all(),
        thread(21, 0).serves_all(),
        thread(22, 0).serves_all(),
    ];
    scene.take_samples(60, &threads);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert_eq!(
        culprit(&verdict),
        (CulpritKind::Process, Some(22), "service-2 (22)")
    );
    assert!(verdict.advice.contains("22"), "{}", verdict.advice);
}

#[test]
fn of_sessions_first_seen_idle_in_a_transaction_the_one_with_the_most_silent_client_is_the_holder()
{
    for holder in [22, 23, 24] {
        let mut scene = Scene::of(&[&[10], &[21, 22, 23, 24]]);
        scene.joins(1, (10, 5), (21, 5), 5432);
        scene.awaits(1);
        scene.awaits(2);
        scene.set_title(21, "postgres: bob shop [local] UPDATE waiting");
        for session in [22, 23, 24] {
            scene.set_title(session, "postgres: bob shop [local] idle in transaction");
            let client = scene.accepts(u64::from(session), (session, 6), 5432);
            if session == holder {
                client.since_received_ns *= 10;
                client.since_sent_ns *= 10;
            }
        }
        let threads = [
            thread(10, 0).reads(5),
            thread(21, 0).serves_all(),
            thread(22, 0).serves_all(),
            thread(23, 0).serves_all(),
            thread(24, 0).serves_all(),
        ];
        scene.take_samples(60, &threads);
        let verdict = scene.verdict(&filling());
        let name = format!("service-2 ({holder})");
        assert_eq!(
            culprit(&verdict),
            (CulpritKind::Process, Some(holder), name.as_str())
        );
    }
}

/// Service 1 has three connections to a remote service, whose baseline response time is 20 ms, and `inflight` requests in
/// flight.
fn gateway(inflight: u64) -> Scene {
    let mut scene = Scene::of(&[&[10]]).unfocused();
    let there = "10.0.0.9:5432".parse().unwrap();
    for cookie in 1..=3 {
        scene.calls(cookie, (10, 10 + cookie as u32), there);
        scene.awaits(cookie);
    }
    scene.accepts(9, (10, 9), 80);
    scene.awaits(9);
    scene.queue(1, Kind::Downstream, "-> 10.0.0.9:5432", responds_in(20));
    scene.take_samples(20, &[]);
    scene.focus();
    scene.queue(1, Kind::Inflight, ":80", depth(inflight));
    scene
}

#[test]
fn an_exhausted_pool_is_the_cause_if_response_times_are_at_their_baseline() {
    let mut scene = gateway(12);
    scene.take_samples(60, &[thread(10, 0).serves_all()]);
    let verdict = scene.verdict(&episode(Kind::Inflight, ":80"));
    assert_eq!(verdict.cause, Cause::PoolExhausted);
    let (kind, pid, name) = culprit(&verdict);
    assert_eq!((kind, pid), (CulpritKind::Limit, Some(10)));
    assert!(name.contains("3 connections to 10.0.0.9:5432"), "{name}");
}

#[test]
fn connections_that_stay_unused_while_the_others_are_all_in_use_are_part_of_the_pool() {
    let there = "10.0.0.9:5432".parse().unwrap();
    for (silent_ms, cause) in [(5_000, Cause::PoolExhausted), (500, Cause::DownstreamSlow)] {
        let mut scene = gateway(12);
        scene.calls(4, (10, 14), there);
        for connection in &mut scene.sample().connections {
            if connection.cookie == 4 {
                connection.since_received_ns = silent_ms * 1_000_000;
                connection.since_sent_ns = silent_ms * 1_000_000;
            }
        }
        scene.take_samples(60, &[thread(10, 0).serves_all()]);
        let verdict = scene.verdict(&episode(Kind::Inflight, ":80"));
        assert_eq!(verdict.cause, cause, "{silent_ms}");
        if cause == Cause::PoolExhausted {
            assert_eq!(verdict.confidence, Confidence::Medium);
            assert!(
                verdict.evidence.contains("1 of 4 connections"),
                "{}",
                verdict.evidence
            );
        }
    }
}

#[test]
fn an_exhausted_pool_is_not_the_cause_if_responses_are_slow() {
    let mut scene = gateway(12);
    scene.queue(1, Kind::Downstream, "-> 10.0.0.9:5432", responds_in(900));
    scene.take_samples(60, &[thread(10, 0).serves_all()]);
    let verdict = scene.verdict(&episode(Kind::Inflight, ":80"));
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert_eq!(
        culprit(&verdict),
        (CulpritKind::Endpoint, None, "10.0.0.9:5432")
    );
}

#[test]
fn more_arrivals_are_a_surge_if_response_times_are_at_their_baseline() {
    let mut scene = gateway(3);
    scene.take_samples(60, &[thread(10, 0).serves_all()]);
    let mut surge = episode(Kind::Inflight, ":80");
    surge.driven_by = DrivenBy::Producer;
    let verdict = scene.verdict(&surge);
    assert_eq!(
        (verdict.cause, verdict.culprit),
        (Cause::ProducerSurge, None)
    );
}

#[test]
fn requests_in_flight_are_not_a_surge_while_connections_wait_to_be_accepted() {
    let producer = |kind, name| Episode {
        driven_by: DrivenBy::Producer,
        ..episode(kind, name)
    };
    let inflight = producer(Kind::Inflight, ":80");
    let waiting = episode(Kind::Accept, ":80");
    assert!(is_surge(&[&inflight]));
    assert!(!is_surge(&[&inflight, &waiting]));
    // More arrivals at the accept queue itself are a surge.
    let coming = producer(Kind::Accept, ":80");
    assert!(is_surge(&[&inflight, &coming]));
    // Dispatches of threads are not work that arrives from outside.
    assert!(!is_surge(&[&producer(Kind::Runqueue, "run queue")]));
}

#[test]
fn advice_for_an_event_loop_is_not_to_add_workers() {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(9, (10, 9), 80);
    scene.awaits(9);
    scene.take_samples(60, &[thread(10, 0).serves_all()]);
    let mut surge = episode(Kind::Inflight, ":80");
    surge.driven_by = DrivenBy::Producer;
    (surge.arrival_rate, surge.service_rate) = (Some(60.0), Some(40.0));
    let verdict = scene.verdict(&surge);
    assert_eq!(verdict.cause, Cause::ProducerSurge);
    assert!(!verdict.advice.contains("workers"), "{}", verdict.advice);
}

#[test]
fn a_service_that_computes_is_cpu_bound_or_in_a_surge() {
    let mut scene = Scene::of(&[&[10]]);
    scene.take_samples(60, &alike(10, 2, Wait::on_cpu));
    let mut filling = filling();
    assert_eq!(scene.verdict(&filling).cause, Cause::CpuBound);
    filling.driven_by = DrivenBy::Producer;
    assert_eq!(scene.verdict(&filling).cause, Cause::ProducerSurge);
}

/// A service that runs half of the time, and waits for a CPU the other half. `by` had the CPU then.
fn starved(by: &'static str) -> Scene {
    let mut scene = Scene::of(&[&[10]]);
    let split = Reading {
        depth: 1,
        extra: vec![(by, 1.0)],
        ..Reading::default()
    };
    scene.queue(1, Kind::Runqueue, "threads", split);
    let hog = CpuUser {
        tgid: 99,
        name: "hog".to_owned(),
        cgroup: Some("/batch".to_owned()),
        cpu_ns: 20_000_000,
    };
    scene.sample().scans.cpu_users = true;
    scene.sample().cpu_users = vec![hog];
    scene.take_samples(30, &[thread(10, 0).on_cpu()]);
    scene.take_samples(30, &[thread(10, 0).state(State::Runnable)]);
    scene
}

/// A second in which the threads of process 10 waited for a CPU that this process had.
fn measured(culprit: u32) -> HookReport {
    let worst = WorstWait {
        wait_ns: 8_000_000,
        tid: 10,
        culprit: Some(WaitParty {
            tgid: culprit,
            tid: culprit,
            comm: "spin".to_owned(),
        }),
        culprit_ns: 7_000_000,
        ..WorstWait::default()
    };
    let wait = ExactWait {
        target: 1,
        tgid: 10,
        distribution: Distribution {
            count: 1,
            total_ns: 8_000_000,
            max_ns: 8_000_000,
            waits: vec![(8_000_000, 1)],
        },
        worst: Some(worst),
        ..ExactWait::default()
    };
    HookReport {
        is_attached: true,
        interval_ns: 25_000_000,
        waits: vec![wait],
        ..HookReport::default()
    }
}

#[test]
fn what_hooks_measured_decides_who_had_the_cpu() {
    let verdict = |culprit: u32| {
        let mut scene = starved("foreign_share");
        let quieter = CpuUser {
            tgid: 77,
            name: "quieter".to_owned(),
            cgroup: None,
            cpu_ns: 5_000_000,
        };
        scene.sample().cpu_users.push(quieter);
        scene.sample().hooks = Some(measured(culprit));
        scene.take_samples(100, &[thread(10, 0).state(State::Runnable)]);
        scene.verdict(&filling())
    };
    let blamed = verdict(77);
    assert_eq!(blamed.cause, Cause::CpuStarved);
    assert_eq!(
        culprit(&blamed),
        (CulpritKind::Process, Some(77), "quieter (77)")
    );
    let evidence = &blamed.evidence;
    assert!(
        evidence.contains("waits for a CPU in 2.5 s: mean 8.0 ms, p99 8.0 ms, longest 8.0 ms, of which spin (77) had the CPU for 7.0 ms"),
        "{evidence}"
    );
    // A process that samples do not have is not blamed, nor is another one.
    let unknown = verdict(55);
    assert_eq!((unknown.cause, unknown.culprit), (Cause::CpuStarved, None));
    assert_eq!(unknown.confidence, Confidence::Medium);
    // Its own threads had the CPU: the hog uses another one.
    assert_eq!(verdict(10).cause, Cause::CpuBound);
}

#[test]
fn hooks_find_others_where_the_estimate_says_own_threads() {
    let mut scene = starved("own_share");
    scene.sample().hooks = Some(measured(99));
    scene.take_samples(100, &[thread(10, 0).state(State::Runnable)]);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::CpuStarved);
    assert_eq!(culprit(&verdict).1, Some(99));
}

#[test]
fn waits_for_a_quota_are_not_blamed_on_who_ran_meanwhile() {
    let mut scene = starved("quota_share");
    scene.sample().hooks = Some(measured(99));
    scene.take_samples(100, &[thread(10, 0).state(State::Runnable)]);
    assert_eq!(scene.verdict(&filling()).cause, Cause::CpuThrottled);
}

#[test]
fn an_explanation_has_what_hooks_measured_beside_the_estimate() {
    let mut scene = starved("foreign_share");
    scene.explain();
    scene.sample().hooks = Some(measured(10));
    scene.take_samples(100, &[thread(10, 0).state(State::Runnable)]);
    let verdict = scene.verdict(&filling());
    let explanation = verdict.explanation.unwrap();
    let rules = explanation.rules.iter();
    let mut checks = rules.filter(|rule| rule.cause == Cause::CpuStarved);
    let checks = &checks.next().unwrap().checks;
    let value = |name: &str| {
        let check = checks.iter().find(|check| check.name.starts_with(name));
        check.unwrap_or_else(|| panic!("no {name}")).value.unwrap()
    };
    assert!(value("time others had the CPU, estimated") > 0.5);
    assert!(value("share of the longest waits") < 1e-9);
    // 8 ms in each 25 ms.
    assert!((value("threads of the service waiting") - 0.32).abs() < 1e-9);
    assert!(value("threads that serve the queue waiting") > 0.5);
}

#[test]
fn the_process_or_quota_that_takes_the_cpu_is_named() {
    let verdict = starved("foreign_share").verdict(&filling());
    assert_eq!(verdict.cause, Cause::CpuStarved);
    assert_eq!(
        culprit(&verdict),
        (CulpritKind::Process, Some(99), "hog (99)")
    );
    let verdict = starved("quota_share").verdict(&filling());
    assert_eq!(verdict.cause, Cause::CpuThrottled);
    assert_eq!(
        culprit(&verdict),
        (CulpritKind::Cgroup, None, "the CPU quota of /service-1")
    );
    assert_eq!(
        starved("own_share").verdict(&filling()).cause,
        Cause::CpuBound
    );
}

#[test]
fn a_long_turn_of_an_event_loop_blocks_it() {
    let mut scene = Scene::of(&[&[10]]);
    let turn = Reading {
        depth: 1,
        oldest_age_ns: Some(800_000_000),
        ..Reading::default()
    };
    scene.queue(1, Kind::Eventloop, "worker-0/10", turn);
    scene.take_samples(60, &[thread(10, 0).on_cpu()]);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::EventLoopBlocked);
    assert_eq!(culprit(&verdict).1, Some(10));
}

#[test]
fn workers_that_all_sleep_in_a_request_are_too_few() {
    let mut scene = Scene::of(&[&[10]]);
    scene.take_samples(
        60,
        &alike(10, 3, |wait| wait.call(libc::SYS_nanosleep, [0; 4])),
    );
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::UndersizedLimit);
    assert_eq!(
        culprit(&verdict),
        (CulpritKind::Limit, Some(10), "3 workers")
    );
}

/// An episode of a queue that nothing has left.
fn untouched() -> Episode {
    Episode {
        departures: Some(0),
        ..filling()
    }
}

#[test]
fn a_consumer_that_sleeps_and_takes_nothing_is_not_busy() {
    let mut scene = Scene::of(&[&[10]]);
    let asleep = [thread(10, 0).call(libc::SYS_clock_nanosleep, [0; 4])];
    scene.take_samples(60, &asleep);
    let verdict = scene.verdict(&untouched());
    assert_eq!(verdict.cause, Cause::ConsumerStalled);
    assert_eq!(culprit(&verdict).1, Some(10));
    let more_arrive = Episode {
        arrival_rate: Some(200.0),
        driven_by: DrivenBy::Both,
        ..untouched()
    };
    assert_eq!(scene.verdict(&more_arrive).cause, Cause::ConsumerStalled);
    scene.accepts(1, (10, 5), 80);
    scene.awaits(1);
    scene.take_samples(60, &asleep);
    let verdict = scene.verdict(&untouched());
    assert_eq!(verdict.cause, Cause::UndersizedLimit, "it serves a request");
}

#[test]
fn a_connection_that_is_not_answered_is_a_call() {
    let mut scene = Scene::of(&[&[10]]);
    scene
        .calls(1, (10, 5), "10.0.0.9:5432".parse().unwrap())
        .state = 2;
    scene.accepts(2, (10, 6), 80);
    scene.awaits(2);
    for wait in [
        thread(10, 0).call(libc::SYS_connect, [5, 0, 16, 0]),
        thread(10, 0)
            .call(libc::SYS_poll, [0x1000, 1, 1_000, 0])
            .with(Detail::Poll(vec![(5, 4)])),
        thread(10, 0).serves_all(),
    ] {
        scene.take_samples(60, &[wait]);
        let verdict = scene.verdict(&filling());
        assert_eq!(verdict.cause, Cause::DownstreamSlow);
        assert_eq!(culprit(&verdict).2, "10.0.0.9:5432");
        assert!(
            verdict.evidence.contains("answer the connection request"),
            "{}",
            verdict.evidence
        );
    }
}

#[test]
fn a_connection_that_nobody_accepts_leads_to_the_process_that_listens() {
    let mut scene = Scene::of(&[&[10], &[20]]);
    scene.calls(1, (10, 5), local(9090)).state = 2;
    scene.listens(20, local(9090), "python3");
    let threads = [
        thread(10, 0).call(libc::SYS_connect, [5, 0, 16, 0]),
        thread(20, 0).state(State::Stopped),
    ];
    scene.take_samples(60, &threads);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert_eq!(culprit(&verdict).1, Some(20));
    assert_eq!(verdict.root, Some(Cause::ConsumerStalled));
}

#[test]
fn a_socket_that_workers_share_leads_to_its_reader() {
    let mut scene = Scene::of(&[&[10, 11, 12], &[20]]);
    scene.unix((71, 72), (10, 5), 20);
    let sends = |tgid| {
        let inode = Detail::File {
            path: "socket:[71]".to_owned(),
            device: None,
        };
        thread(tgid, 0)
            .call(libc::SYS_sendto, [5, 0, 0, 0])
            .with(inode)
    };
    let threads = [sends(11), sends(12), thread(20, 0).parked()];
    scene.take_samples(60, &threads);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::OutputBlocked);
    assert_eq!(culprit(&verdict).1, Some(20));
}

#[test]
fn output_that_nobody_is_known_to_read_has_no_culprit() {
    let mut scene = Scene::of(&[&[10]]);
    scene.unix((71, 72), (10, 5), 20);
    scene.sample().holders = Some(Vec::new());
    scene.take_samples(60, &[thread(10, 0).writes(5)]);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::OutputBlocked);
    assert_eq!(
        (verdict.culprit, verdict.confidence),
        (None, Confidence::Medium)
    );
}

#[test]
fn a_backlog_that_overflows_while_workers_are_idle_is_too_small() {
    let mut scene = Scene::of(&[&[10]]);
    let idle = |wait: Wait| wait.call(libc::SYS_accept4, [3, 0, 0, 0]);
    scene.take_samples(60, &alike(10, 4, idle));
    let verdict = scene.verdict(&bursts());
    assert_eq!(verdict.cause, Cause::UndersizedLimit);
    assert_eq!(culprit(&verdict).2, "a backlog of 8");
    let fewer_get_in = Episode {
        driven_by: DrivenBy::Consumer,
        empty_share: 0.95,
        ..bursts()
    };
    let verdict = scene.verdict(&fewer_get_in);
    assert_eq!(verdict.cause, Cause::UndersizedLimit);
}

#[test]
fn a_standing_queue_is_not_due_to_its_backlog() {
    let standing = Episode {
        empty_share: 0.0,
        ..bursts()
    };
    let slower = Episode {
        driven_by: DrivenBy::Consumer,
        ..bursts()
    };
    for episode in [standing, slower] {
        let mut scene = Scene::of(&[&[10]]);
        scene.take_samples(60, &alike(10, 4, Wait::parked));
        let verdict = scene.verdict(&episode);
        assert_ne!(verdict.cause, Cause::UndersizedLimit);
    }
}

#[test]
fn threads_that_never_run_at_once_wait_for_a_lock_that_does_not_show() {
    for (cpus, at_once, cause) in [
        (2, 1, Cause::LockContention),
        (1, 1, Cause::Unknown),
        (2, 2, Cause::Unknown),
    ] {
        let mut scene = Scene::of(&[&[10]]);
        scene.targets[0].cpus = cpus;
        for turn in 0..64 {
            let mut threads = alike(10, 16, Wait::parked);
            for index in turn..turn + at_once {
                threads[index as usize % 16] = thread(10, index % 16).on_cpu();
            }
            scene.take_samples(1, &threads);
        }
        let verdict = scene.verdict(&filling());
        let is_it = verdict.cause == Cause::LockContention;
        assert_eq!(is_it, cause == Cause::LockContention, "{cpus} {at_once}");
    }
}

#[test]
fn a_call_that_waits_in_the_own_accept_queue_is_a_cycle() {
    // In another network namespace, at another host's address, or accepted by the same process, one of whose threads works, it
    // is a call like any other. Accepted by a process of which no thread works, it is a cycle.
    for (netns, remote, is_accepted, another_works, cause) in [
        (1, "127.0.0.1:80", false, false, Cause::ConsumerStalled),
        (2, "127.0.0.1:80", false, false, Cause::DownstreamSlow),
        (1, "192.0.2.9:80", false, false, Cause::DownstreamSlow),
        (1, "127.0.0.1:80", true, true, Cause::DownstreamSlow),
        (1, "127.0.0.1:80", true, false, Cause::ConsumerStalled),
    ] {
        let mut scene = Scene::of(&[&[10, 11]]);
        scene.listens(10, "0.0.0.0:80".parse().unwrap(), "service-1");
        scene.accepts(1, (10, 4), 80);
        scene.calls(2, (10, 5), remote.parse().unwrap()).netns = netns;
        if is_accepted {
            scene.accepts(3, (10, 6), 80).remote = local(30_002);
        }
        scene.awaits(1);
        scene.awaits(2);
        let mut threads = vec![thread(10, 0).reads(5)];
        if another_works {
            threads.push(thread(10, 0).reads(5));
            threads[1].tid = 12;
            threads.push(thread(10, 3).on_cpu());
        }
        scene.take_samples(60, &threads);
        let verdict = scene.verdict(&filling());
        assert_eq!(
            verdict.cause, cause,
            "{netns} {remote} {is_accepted} {another_works}"
        );
        let is_itself = cause == Cause::ConsumerStalled;
        assert_eq!(verdict.advice.contains("calls itself"), is_itself);
    }
}

#[test]
fn a_question_over_udp_is_a_call() {
    let resolver = "192.0.2.53:53".parse().unwrap();
    for (is_serving, cause) in [(true, Cause::DownstreamSlow), (false, Cause::Unknown)] {
        let mut scene = Scene::of(&[&[10]]);
        scene.accepts(1, (10, 4), 80);
        scene.asks((10, 5), resolver);
        if is_serving {
            scene.awaits(1);
        }
        let poll = Detail::Poll(vec![(5, 1)]);
        let waits = |wait: Wait| wait.call(libc::SYS_poll, [0; 4]).with(poll.clone());
        scene.take_samples(60, &alike(10, 2, waits));
        let verdict = scene.verdict(&filling());
        let is_it = verdict.cause == Cause::DownstreamSlow;
        assert_eq!(is_it, cause == Cause::DownstreamSlow);
        if is_serving {
            assert_eq!(
                culprit(&verdict),
                (CulpritKind::Endpoint, None, "192.0.2.53:53")
            );
        }
    }
}

#[test]
fn an_event_loop_whose_requests_wait_for_a_resolver_waits_for_it() {
    let resolver = "192.0.2.53:53".parse().unwrap();
    // A socket that was open before sampling began may always be open. One that was opened later, and stays, is a query.
    for (opened, cause) in [(0, Cause::Unknown), (1, Cause::DownstreamSlow)] {
        let mut scene = Scene::of(&[&[10]]);
        scene.accepts(1, (10, 4), 80);
        scene.awaits(1);
        let threads = alike(10, 2, Wait::serves_all);
        scene.take_samples(opened, &threads);
        scene.asks((10, 5), resolver);
        scene.take_samples(120, &threads);
        let verdict = scene.verdict(&filling());
        let is_it = verdict.cause == Cause::DownstreamSlow;
        assert_eq!(is_it, cause == Cause::DownstreamSlow, "{opened}");
        if is_it {
            assert_eq!(
                culprit(&verdict),
                (CulpritKind::Endpoint, None, "192.0.2.53:53")
            );
        }
    }
}

#[test]
fn a_reply_to_an_unconnected_socket_is_awaited_from_nobody_known() {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(1, (10, 4), 80);
    scene.awaits(1);
    scene.asks((10, 5), "0.0.0.0:0".parse().unwrap());
    let poll = Detail::Poll(vec![(5, 1)]);
    let waits = |wait: Wait| wait.call(libc::SYS_poll, [0; 4]).with(poll.clone());
    scene.take_samples(60, &alike(10, 2, waits));
    let verdict = scene.verdict(&filling());
    assert_eq!(
        (verdict.cause, verdict.culprit, verdict.confidence),
        (Cause::DownstreamSlow, None, Confidence::Medium)
    );
}

#[test]
fn threads_that_call_another_service_one_at_a_time_wait_for_their_turn() {
    for (at_once, requests, cause) in [
        (1, 2, Cause::DownstreamSlow),
        (2, 2, Cause::Unknown),
        (1, 1, Cause::Unknown),
    ] {
        let mut scene = Scene::of(&[&[10], &[20]]);
        for cookie in 100..100 + requests {
            scene.accepts(cookie, (10, 4), 80);
            scene.awaits(cookie);
        }
        for index in 0..20 {
            let cookie = 2 * u64::from(index) + 1;
            scene.joins(cookie, (10, 5 + index), (20, 5 + index), 7001);
        }
        for sample in 0..100 {
            let calls = |index: u32| (index + 20 - sample % 20) % 20 < at_once;
            let mut threads = alike(10, 20, Wait::parked);
            for index in (0..20).filter(|index| calls(*index)) {
                threads[index as usize] = thread(10, index).reads(u64::from(5 + index));
            }
            threads.push(thread(20, 0).on_cpu());
            scene.take_samples(1, &threads);
        }
        let verdict = scene.verdict(&filling());
        assert_eq!(
            verdict.cause, cause,
            "{at_once} {requests}: {}",
            verdict.evidence
        );
        if cause == Cause::DownstreamSlow {
            assert_eq!(culprit(&verdict).1, Some(20));
            assert_eq!(verdict.confidence, Confidence::Medium);
        }
    }
}

#[test]
fn a_lock_over_calls_is_blamed_unless_slow_calls_would_need_more_threads() {
    for (takes_ms, threads, cause) in [
        (50, 4, Cause::LockContention),
        (200, 20, Cause::LockContention),
        (200, 4, Cause::DownstreamSlow),
    ] {
        let mut scene = Scene::of(&[&[10], &[20]]).unfocused();
        for index in 0..threads {
            let cookie = 2 * u64::from(index) + 1;
            scene.joins(cookie, (10, 5 + index), (20, 5 + index), 7001);
        }
        scene.queue(1, Kind::Downstream, "127.0.0.1:7001", responds_in(50));
        scene.take_samples(40, &alike(10, threads, Wait::parked));
        scene.focus();
        for cookie in 100..102 {
            scene.accepts(cookie, (10, 4), 80);
            scene.awaits(cookie);
        }
        scene.queue(1, Kind::Downstream, "127.0.0.1:7001", responds_in(takes_ms));
        // 40 requests a second.
        let arrives = Reading {
            arrivals: Some(1),
            ..depth(2)
        };
        scene.queue(1, Kind::Inflight, ":80", arrives);
        for sample in 0..100 {
            let mut all = alike(10, threads, Wait::parked);
            let index = sample % threads;
            all[index as usize] = thread(10, index).reads(u64::from(5 + index));
            all.push(thread(20, 0).on_cpu());
            scene.take_samples(1, &all);
        }
        for kind in [Kind::Accept, Kind::Inflight, Kind::Recv] {
            let verdict = scene.verdict(&episode(kind, ":80"));
            assert_eq!(
                verdict.cause, cause,
                "{takes_ms} ms, {threads} threads: {}",
                verdict.evidence
            );
            let blamed = if cause == Cause::LockContention {
                10
            } else {
                20
            };
            assert_eq!(culprit(&verdict).1, Some(blamed));
        }
    }
}

#[test]
fn threads_that_sleep_in_turn_hold_a_lock_and_a_timer_does_not() {
    for (workers, is_lock) in [(6, true), (0, false)] {
        let mut scene = Scene::of(&[&[10]]);
        for cookie in 100..102 {
            scene.accepts(cookie, (10, 4), 80);
            scene.awaits(cookie);
        }
        for sample in 0..120_u32 {
            let sleeps = |thread: Wait| thread.call(libc::SYS_nanosleep, [0; 4]);
            let mut threads = alike(10, 7, Wait::parked);
            if let Some(index) = sample.checked_rem(workers) {
                threads[index as usize] = sleeps(thread(10, index));
            }
            threads.push(sleeps(thread(10, 7)));
            scene.take_samples(1, &threads);
        }
        let verdict = scene.verdict(&filling());
        assert_eq!(
            verdict.cause == Cause::LockContention,
            is_lock,
            "{workers}: {}",
            verdict.evidence
        );
    }
}

#[test]
fn a_connection_that_a_full_backlog_keeps_out_is_no_network_fault() {
    for (listens, cause, confidence) in [
        (true, Cause::DownstreamSlow, Confidence::High),
        (false, Cause::NetworkLimited, Confidence::Medium),
    ] {
        let mut scene = Scene::of(&[&[10], &[20]]);
        let call = scene.calls(1, (10, 5), local(7001));
        (call.write_seq, call.snd_nxt) = (60, 60);
        if listens {
            scene.listens(20, local(7001), "service-2");
        }
        scene.take_samples(60, &[thread(20, 0).on_cpu()]);
        let verdict = scene.verdict(&episode(Kind::Send, "-> 127.0.0.1:7001"));
        assert_eq!((verdict.cause, verdict.confidence), (cause, confidence));
        if listens {
            assert_eq!(culprit(&verdict).1, Some(20));
        }
    }
}

#[test]
fn a_service_is_told_how_many_descriptors_are_left() {
    for (open, words) in [
        (
            84,
            "36 file descriptors are left below RLIMIT_NOFILE of 120",
        ),
        (119, "is reached"),
    ] {
        let mut scene = Scene::of(&[&[10]]);
        let files = Reading {
            limit: Some(120),
            ..depth(open)
        };
        scene.queue(1, Kind::Fd, "open files", files);
        scene.take_samples(60, &[]);
        let verdict = scene.verdict(&episode(Kind::Fd, "open files"));
        assert!(verdict.advice.contains(words), "{}", verdict.advice);
    }
}

#[test]
fn exhausted_file_descriptors_decide_whatever_the_threads_do() {
    let mut scene = Scene::of(&[&[10]]);
    let files = Reading {
        limit: Some(120),
        ..depth(120)
    };
    scene.queue(1, Kind::Fd, "open files", files);
    scene.take_samples(60, &alike(10, 2, Wait::on_cpu));
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::FdExhausted);
    assert_eq!(culprit(&verdict).2, "RLIMIT_NOFILE of 120");
}

#[test]
fn descriptors_that_are_closed_do_not_change_why_the_queue_filled() {
    for (most, cause) in [(120, Cause::FdExhausted), (100, Cause::ConsumerStalled)] {
        let mut scene = Scene::of(&[&[10]]);
        for open in [most, 9] {
            let files = Reading {
                limit: Some(120),
                ..depth(open)
            };
            scene.queue(1, Kind::Fd, "open files", files);
            scene.take_samples(20, &alike(10, 2, Wait::serves_all));
        }
        let verdict = scene.verdict(&Episode {
            departures: Some(0),
            wait_max_ns: Some(2_000_000_000),
            ..filling()
        });
        assert_eq!(verdict.cause, cause);
        if cause == Cause::FdExhausted {
            assert!(
                verdict.evidence.contains("120 of 120"),
                "{}",
                verdict.evidence
            );
        }
    }
}

#[test]
fn blocked_output_names_its_reader() {
    let mut scene = Scene::of(&[&[10], &[20]]);
    scene.pipe(77, (10, 1), 20);
    let mut threads = alike(10, 2, |wait| wait.writes(1));
    threads.push(thread(20, 0).state(State::Stopped));
    scene.take_samples(60, &threads);
    for episode in [filling(), episode(Kind::Pipe, "pipe:[77]")] {
        let verdict = scene.verdict(&episode);
        assert_eq!(verdict.cause, Cause::OutputBlocked);
        assert_eq!(culprit(&verdict).1, Some(20));
    }
}

#[test]
fn the_receive_window_distinguishes_a_slow_peer_from_a_slow_network() {
    let sending = |window: u32| {
        let mut scene = Scene::of(&[&[10]]);
        let client = scene.accepts(1, (10, 5), 80);
        (client.write_seq, client.snd_nxt, client.snd_wnd) = (200_000, 60_000, window);
        scene.take_samples(60, &[thread(10, 0).writes(5)]);
        let send = scene.verdict(&episode(Kind::Send, ":80")).cause;
        (send, scene.verdict(&filling()).cause)
    };
    assert_eq!(
        sending(60_000),
        (Cause::PeerNotReading, Cause::PeerNotReading)
    );
    assert_eq!(
        sending(1_000_000),
        (Cause::NetworkLimited, Cause::NetworkLimited)
    );
}

#[test]
fn a_client_that_does_not_finish_its_request_is_named() {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(1, (10, 5), 80);
    scene.awaits(1).read = false;
    scene.take_samples(60, &[thread(10, 0).reads(5)]);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::PeerNotSending);
    assert_eq!(
        culprit(&verdict),
        (CulpritKind::Endpoint, None, "192.0.2.7:20001")
    );
}

#[test]
fn few_samples_lower_the_confidence() {
    let mut scene = Scene::of(&[&[10]]);
    scene.take_samples(10, &[thread(10, 0).on_cpu()]);
    assert_eq!(scene.verdict(&filling()).confidence, Confidence::Medium);
    scene.take_samples(50, &[thread(10, 0).on_cpu()]);
    assert_eq!(scene.verdict(&filling()).confidence, Confidence::High);
}

#[test]
fn idle_threads_on_a_condition_variable_are_not_lock_contention() {
    let mut scene = Scene::of(&[&[10]]);
    scene.calls(1, (10, 5), local(5432));
    scene.take_samples(60, &alike(10, 4, Wait::parked));
    let verdict = scene.verdict(&filling());
    assert!(verdict.cause != Cause::LockContention, "{verdict:?}");
}

/// Service 1 has opened four connections to a remote service, silent for 5 s, and `inflight` requests in flight since `age_ms`
/// ago, which all wait inside it.
fn leaked(inflight: u32, age_ms: u64) -> Scene {
    let mut scene = Scene::of(&[&[10]]);
    let there = "10.0.0.9:5432".parse().unwrap();
    for cookie in 1..=4 {
        scene.calls(cookie, (10, 10 + cookie as u32), there);
    }
    for client in 0..inflight {
        let cookie = 100 + u64::from(client);
        scene.accepts(cookie, (10, 100 + client), 80);
        // The scene begins here, and is judged 1.5 s later.
        scene.awaits(cookie).began_ns = 100_000_000_000 + 1_500_000_000 - age_ms * 1_000_000;
    }
    scene.queue(1, Kind::Downstream, "-> 10.0.0.9:5432", depth(0));
    scene.queue(1, Kind::Inflight, ":80", depth(u64::from(inflight)));
    scene
}

fn judged(scene: &mut Scene) -> Verdict {
    scene.take_samples(60, &[thread(10, 0).serves_all(), thread(10, 1).parked()]);
    scene.verdict(&episode(Kind::Inflight, ":80"))
}

#[test]
fn connections_that_no_request_in_flight_can_hold_are_leaked() {
    let verdict = judged(&mut leaked(12, 4_000));
    assert_eq!(verdict.cause, Cause::PoolExhausted);
    assert_eq!(
        culprit(&verdict),
        (
            CulpritKind::Limit,
            Some(10),
            "a pool of 4 connections to 10.0.0.9:5432"
        )
    );
    assert!(
        verdict.evidence.contains("4 of the connections"),
        "{}",
        verdict.evidence
    );
    assert!(verdict.advice.contains("leaked"), "{}", verdict.advice);
    assert!(verdict.confidence < Confidence::High);
}

#[test]
fn connections_that_requests_in_flight_can_hold_are_held_by_them() {
    let verdict = judged(&mut leaked(12, 6_000));
    assert_eq!(verdict.cause, Cause::PoolExhausted);
    assert!(verdict.advice.contains("another one"), "{}", verdict.advice);
    assert!(verdict.confidence < Confidence::High);
}

#[test]
fn an_idle_pool_is_not_held_if_something_else_explains_the_wait() {
    // As many requests as connections: each worker may have one.
    assert_ne!(judged(&mut leaked(4, 4_000)).cause, Cause::PoolExhausted);
    // Requests began to wait long after the pool was last used.
    assert_ne!(judged(&mut leaked(12, 1_500)).cause, Cause::PoolExhausted);
    // A call to another service is outstanding.
    let mut scene = leaked(12, 4_000);
    scene.calls(50, (10, 50), "10.0.0.8:80".parse().unwrap());
    scene.awaits(50);
    assert_eq!(judged(&mut scene).cause, Cause::DownstreamSlow);
    // Data moves on one of the connections.
    let mut scene = leaked(12, 4_000);
    scene.sample().connections[0].since_sent_ns = 50_000_000;
    assert_ne!(judged(&mut scene).cause, Cause::PoolExhausted);
    // Threads compute.
    let mut scene = leaked(12, 4_000);
    scene.take_samples(60, &alike(10, 2, Wait::on_cpu));
    let verdict = scene.verdict(&episode(Kind::Inflight, ":80"));
    assert_ne!(verdict.cause, Cause::PoolExhausted);
}

#[test]
fn connections_that_show_that_somebody_has_them_are_evidence_enough() {
    // Even if there are no more requests than connections.
    for sign in ["closed by the peer", "response that nobody reads"] {
        let mut scene = leaked(4, 4_000);
        for connection in &mut scene.sample().connections[..4] {
            match sign {
                "closed by the peer" => connection.state = 8,
                _ => connection.rcv_nxt = 100,
            }
        }
        let verdict = judged(&mut scene);
        assert_eq!(verdict.cause, Cause::PoolExhausted, "{sign}");
        assert_eq!(verdict.confidence, Confidence::High, "{sign}");
        assert!(verdict.evidence.contains(sign), "{}", verdict.evidence);
    }
}

#[test]
fn an_event_loop_that_waits_in_one_call_has_no_pool_of_one_connection() {
    let mut scene = Scene::of(&[&[10]]);
    let there = "10.0.0.9:5432".parse().unwrap();
    scene.calls(1, (10, 11), there);
    scene.awaits(1);
    scene.accepts(9, (10, 9), 80);
    scene.awaits(9);
    scene.queue(1, Kind::Downstream, "-> 10.0.0.9:5432", responds_in(20));
    scene.queue(1, Kind::Inflight, ":80", depth(12));
    scene.take_samples(60, &[thread(10, 0).reads(11)]);
    let verdict = scene.verdict(&episode(Kind::Inflight, ":80"));
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert_eq!(culprit(&verdict).2, "10.0.0.9:5432");
    assert!(
        verdict.evidence.contains("event loop"),
        "{}",
        verdict.evidence
    );
    assert!(
        verdict.advice.contains("asynchronous"),
        "{}",
        verdict.advice
    );
    // One that returns to epoll_wait while the call is outstanding has.
    scene.take_samples(400, &[thread(10, 0).serves_all()]);
    let verdict = scene.verdict(&episode(Kind::Inflight, ":80"));
    assert_eq!(verdict.cause, Cause::PoolExhausted);
}

#[test]
fn an_exhausted_pool_whose_calls_are_never_answered_is_not_the_cause() {
    for (age_ms, cause) in [(500, Cause::PoolExhausted), (3_000, Cause::DownstreamSlow)] {
        let mut scene = Scene::of(&[&[10]]);
        let there = "10.0.0.9:5432".parse().unwrap();
        for cookie in 1..=3 {
            scene.calls(cookie, (10, 10 + cookie as u32), there);
            scene.awaits(cookie);
        }
        scene.accepts(9, (10, 9), 80);
        scene.awaits(9);
        let calls = Reading {
            ages_ns: vec![age_ms * 1_000_000; 3],
            oldest_age_ns: Some(age_ms * 1_000_000),
            ..depth(3)
        };
        scene.queue(1, Kind::Downstream, "-> 10.0.0.9:5432", calls);
        scene.queue(1, Kind::Inflight, ":80", depth(12));
        scene.take_samples(60, &[thread(10, 0).serves_all()]);
        let verdict = scene.verdict(&episode(Kind::Inflight, ":80"));
        assert_eq!(verdict.cause, cause, "{age_ms}");
        assert!(verdict.confidence < Confidence::High);
    }
}

#[test]
fn idle_connections_that_were_answered_and_occupy_the_workers_are_a_limit() {
    for (answered, cause) in [
        (4, Cause::UndersizedLimit),
        (1, Cause::UndersizedLimit),
        (0, Cause::PeerNotSending),
    ] {
        let mut scene = Scene::of(&[&[10]]);
        for cookie in 1..=4 {
            let client = scene.accepts(cookie, (10, 10 + cookie as u32), 80);
            if cookie <= answered {
                client.since_received_ns += 20_000_000;
            }
        }
        let mut threads: Vec<Wait> = (1..=4)
            .map(|index| thread(10, index).reads(u64::from(10 + index)))
            .collect();
        // As many threads of a runtime as there are workers.
        threads.extend((5..9).map(|index| thread(10, index).parked()));
        scene.take_samples(60, &threads);
        let verdict = scene.verdict(&filling());
        if answered > 0 {
            assert_eq!(verdict.cause, cause, "{answered}");
            assert!(culprit(&verdict).2.contains("4 workers"), "{answered}");
        } else {
            assert_ne!(verdict.cause, Cause::UndersizedLimit);
        }
    }
}

#[test]
fn a_collector_that_has_the_cpu_while_all_others_are_stopped_is_the_cause() {
    for (collecting, empty_share, cause) in [
        (36, 0.0, Cause::CpuBound),
        (28, 0.0, Cause::Unknown),
        (28, 0.5, Cause::CpuBound),
        (10, 0.9, Cause::Unknown),
    ] {
        let mut scene = Scene::of(&[&[10]]);
        let named = |index: u32, name: &str, wait: Wait| Wait {
            comm: name.to_owned(),
            ..Wait {
                tid: 10 + index,
                own_tid: 10 + index,
                ..wait
            }
        };
        for sample in 0..60 {
            let collects = sample % 60 < collecting;
            let vm = thread(10, 1);
            let vm = if collects { vm.on_cpu() } else { vm.parked() };
            let mut threads = vec![
                named(0, "java", thread(10, 0).parked()),
                named(1, "VM Thread", vm),
                named(2, "VM Periodic Tas", thread(10, 2).parked()),
            ];
            threads.extend((3..7).map(|index| thread(10, index).parked()));
            scene.take_samples(1, &threads);
        }
        let verdict = scene.verdict(&Episode {
            empty_share,
            ..filling()
        });
        if cause == Cause::CpuBound {
            assert_eq!(verdict.cause, cause);
            assert!(culprit(&verdict).2.contains("VM Thread"));
            assert!(verdict.advice.contains("heap"), "{}", verdict.advice);
        } else {
            assert!(!verdict.advice.contains("heap"), "{}", verdict.advice);
        }
    }
}
