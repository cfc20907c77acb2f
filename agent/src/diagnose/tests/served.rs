//! Verdicts on queues of proxies and connection pools, which pass their items on over connections of their own.

use std::net::SocketAddr;

use super::scene::{Scene, episode, jobs, local, thread};
use crate::{
    cause::Cause,
    event::{Confidence, CulpritKind, Verdict},
    queue::{Kind, Reading},
    sample::Wait,
};

const PROXY: u32 = 10;
const SERVER: u32 = 20;
const OTHER: u32 = 30;
/// Not on this machine.
const DATABASE: &str = "10.0.0.9:5432";

fn full() -> Reading {
    Reading {
        depth: 50,
        extra: vec![("serving", 2.0), ("slots", 2.0)],
        ..Reading::default()
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A proxy with a client that waits, and two servers of their own services. The connections to the first are 1 and 3, the one to the
/// second is 5; calls are outstanding on all of them. The first server calls a database, and waits.
fn proxy() -> Scene {
    let mut scene = Scene::of(&[&[PROXY], &[SERVER], &[OTHER]]);
    scene.accepts(50, (PROXY, 9), 80);
    scene.awaits(50);
    for (cookie, fd, server, port) in [
        (1, 5, SERVER, 8080),
        (3, 6, SERVER, 8080),
        (5, 7, OTHER, 9090),
    ] {
        scene.joins(cookie, (PROXY, fd), (server, fd + 10), port);
        scene.awaits(cookie);
        scene.awaits(cookie + 1);
    }
    scene.calls(7, (SERVER, 30), address(DATABASE));
    scene.awaits(7);
    scene
}

fn threads() -> [Wait; 3] {
    [
        thread(PROXY, 0).serves_all(),
        thread(SERVER, 0).reads(30),
        thread(OTHER, 0).on_cpu(),
    ]
}

fn verdict(mut scene: Scene, ends: &[SocketAddr], threads: &[Wait]) -> Verdict {
    scene.passes_on(PROXY, ends, full());
    scene.take_samples(60, threads);
    scene.verdict(&jobs())
}

fn pids(verdict: &Verdict) -> Vec<Option<u32>> {
    verdict.path.iter().map(|hop| hop.pid).collect()
}

#[test]
fn a_queue_is_followed_to_its_own_servers_and_on_to_the_root() {
    let verdict = verdict(proxy(), &[local(8080)], &threads());
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert_eq!(pids(&verdict), [Some(PROXY), Some(SERVER), None]);
    assert_eq!(verdict.culprit.unwrap().endpoint.unwrap(), DATABASE);
    assert_eq!(verdict.confidence, Confidence::High);
}

#[test]
fn older_calls_to_servers_of_another_queue_do_not_count() {
    let mut scene = proxy();
    scene.awaits(5).began_ns = 1;
    let verdict = verdict(scene, &[local(8080)], &threads());
    assert_eq!(pids(&verdict), [Some(PROXY), Some(SERVER), None]);
}

#[test]
fn own_ends_of_connections_name_them_as_well() {
    // Connections 1 and 3.
    let ends = [local(30_001), local(30_003)];
    let verdict = verdict(proxy(), &ends, &threads());
    assert_eq!(pids(&verdict), [Some(PROXY), Some(SERVER), None]);
}

#[test]
fn several_servers_with_as_much_waiting_are_not_told_apart() {
    // Two connections to each.
    let mut scene = proxy();
    scene.joins(11, (PROXY, 8), (OTHER, 40), 9090);
    scene.awaits(11);
    let verdict = verdict(scene, &[local(8080), local(9090)], &threads());
    assert_eq!((verdict.cause, verdict.path.len()), (Cause::Unknown, 0));
    assert!(
        verdict.evidence.contains("no one has most of the waiting"),
        "{}",
        verdict.evidence
    );
}

#[test]
fn several_servers_that_wait_for_the_same_lead_to_it() {
    let mut scene = proxy();
    scene.joins(11, (PROXY, 8), (OTHER, 40), 9090);
    scene.awaits(11);
    scene.calls(13, (OTHER, 30), address(DATABASE));
    scene.awaits(13);
    let threads = [
        thread(PROXY, 0).serves_all(),
        thread(SERVER, 0).reads(30),
        thread(OTHER, 0).reads(30),
    ];
    let verdict = verdict(scene, &[local(8080), local(9090)], &threads);
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert_eq!(verdict.culprit.unwrap().endpoint.unwrap(), DATABASE);
}

#[test]
fn of_several_servers_the_one_with_most_of_the_waiting_is_followed() {
    let mut scene = proxy();
    for cookie in [1, 3] {
        scene.awaits(cookie).began_ns = 1;
    }
    let verdict = verdict(scene, &[local(8080), local(9090)], &threads());
    assert_eq!(pids(&verdict), [Some(PROXY), Some(SERVER), None]);
}

#[test]
fn unnamed_connections_are_followed_only_if_they_lead_to_one_place() {
    let mut scene = proxy();
    for cookie in [1, 3] {
        scene.awaits(cookie).began_ns = 1;
    }
    assert_eq!(verdict(scene, &[], &threads()).cause, Cause::Unknown);
    let mut scene = Scene::of(&[&[PROXY], &[SERVER]]);
    scene.accepts(50, (PROXY, 9), 80);
    scene.awaits(50);
    scene.joins(1, (PROXY, 5), (SERVER, 15), 8080);
    scene.awaits(1);
    // A resolver is no server.
    scene.calls(3, (PROXY, 6), address("10.0.0.2:53"));
    scene.awaits(3);
    let verdict = verdict(scene, &[], &threads());
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert!(verdict.confidence <= Confidence::Medium);
    assert!(
        verdict.evidence.contains("does not name the servers"),
        "{}",
        verdict.evidence
    );
}

#[test]
fn a_service_can_name_only_connections_that_it_has_opened() {
    // The ends of a client's connection, of one of another service, and of none.
    let client = SocketAddr::from(([192, 0, 2, 7], 20_050));
    for ends in [[local(80), client], [address(DATABASE), local(1)]] {
        let verdict = verdict(proxy(), &ends, &threads());
        assert_eq!((verdict.cause, verdict.path.len()), (Cause::Unknown, 0));
        assert!(
            verdict.evidence.contains("no connection to a server"),
            "{}",
            verdict.evidence
        );
    }
}

#[test]
fn a_proxy_that_computes_is_the_cause_itself() {
    let threads = [
        thread(PROXY, 0).on_cpu(),
        thread(SERVER, 0).reads(30),
        thread(OTHER, 0).on_cpu(),
    ];
    let verdict = verdict(proxy(), &[local(8080)], &threads);
    assert_eq!(verdict.cause, Cause::CpuBound);
    assert_eq!(pids(&verdict)[0], Some(PROXY));
}

/// A pooler of two connections to servers that are idle, for two clients that hold them; another client waits.
fn pooler(title: &str, clients: [u32; 2]) -> Scene {
    let mut scene = Scene::of(&[&[PROXY], &[SERVER, SERVER + 1], &[OTHER], &[OTHER + 1]]);
    scene.accepts(50, (PROXY, 9), 6432).since_received_ns = 1_500_000_000;
    scene.awaits(50);
    for (index, client) in clients.into_iter().enumerate() {
        let index = index as u32;
        let cookie = u64::from(index) * 2 + 1;
        let backend = SERVER + index;
        scene.joins(cookie, (PROXY, 20 + index), (backend, 7), 5432);
        scene.joins(cookie + 10, (client, 30 + index), (PROXY, 40 + index), 6432);
        scene.set_title(backend, title);
    }
    scene
}

fn pooler_threads() -> Vec<Wait> {
    let tgids = [PROXY, SERVER, SERVER + 1];
    let mut threads: Vec<Wait> = tgids.map(|tgid| thread(tgid, 0).serves_all()).into();
    threads.push(thread(OTHER, 0).call(libc::SYS_nanosleep, [0; 4]));
    threads
}

const IN_TRANSACTION: &str = "postgres: shop shop 127.0.0.1(30001) idle in transaction";

#[test]
fn a_client_that_holds_the_connections_in_transactions_is_the_culprit() {
    let scene = pooler(IN_TRANSACTION, [OTHER, OTHER]);
    let verdict = verdict(scene, &[local(5432)], &pooler_threads());
    assert_eq!(verdict.cause, Cause::PoolExhausted);
    let culprit = verdict.culprit.unwrap();
    assert_eq!(
        (culprit.kind, culprit.pid),
        (CulpritKind::Process, Some(OTHER))
    );
    assert!(
        verdict
            .evidence
            .contains("2 of 2 connections to servers are idle in a transaction"),
        "{}",
        verdict.evidence
    );
}

#[test]
fn requests_in_flight_at_the_pooler_wait_for_the_same_client() {
    let mut scene = pooler(IN_TRANSACTION, [OTHER, OTHER]);
    scene.passes_on(PROXY, &[local(5432)], full());
    let endpoint = format!("-> {}", local(5432));
    scene.queue(1, Kind::Downstream, &endpoint, Reading::default());
    scene.take_samples(60, &pooler_threads());
    let verdict = scene.verdict(&episode(Kind::Inflight, ":6432"));
    assert_eq!(verdict.cause, Cause::PoolExhausted);
    assert_eq!(verdict.culprit.unwrap().pid, Some(OTHER));
}

#[test]
fn a_transaction_that_goes_on_holds_no_connection() {
    let mut scene = pooler(IN_TRANSACTION, [OTHER, OTHER]);
    for connection in &mut scene.sample().connections {
        connection.since_received_ns = 200_000_000;
    }
    let verdict = verdict(scene, &[local(5432)], &pooler_threads());
    assert_ne!(verdict.cause, Cause::PoolExhausted);
}

#[test]
fn a_holder_is_not_named_if_clients_of_several_services_could_be_it() {
    let scene = pooler(IN_TRANSACTION, [OTHER, OTHER + 1]);
    let verdict = verdict(scene, &[local(5432)], &pooler_threads());
    assert_eq!(verdict.cause, Cause::PoolExhausted);
    assert_eq!(verdict.culprit.unwrap().kind, CulpritKind::Limit);
}

#[test]
fn silent_connections_are_held_only_if_the_service_says_that_all_are_taken() {
    let title = "postgres: shop shop 127.0.0.1(30001) idle";
    let verdict = verdict(
        pooler(title, [OTHER, OTHER]),
        &[local(5432)],
        &pooler_threads(),
    );
    assert_eq!(verdict.cause, Cause::PoolExhausted);
    assert!(verdict.confidence <= Confidence::Medium);
    let mut scene = pooler(title, [OTHER, OTHER]);
    let free = Reading {
        extra: vec![("serving", 0.0), ("slots", 2.0)],
        ..full()
    };
    scene.passes_on(PROXY, &[local(5432)], free);
    scene.take_samples(60, &pooler_threads());
    assert_eq!(scene.verdict(&jobs()).cause, Cause::Unknown);
}

#[test]
fn silent_connections_beside_those_in_use_are_spare() {
    let mut scene = pooler("postgres: shop shop [local] idle", [OTHER, OTHER]);
    for cookie in [21, 23] {
        scene.joins(
            cookie,
            (PROXY, cookie as u32 + 30),
            (SERVER, cookie as u32),
            5432,
        );
        scene.awaits(cookie);
        scene.awaits(cookie + 1);
    }
    let verdict = verdict(scene, &[local(5432)], &pooler_threads());
    assert_ne!(verdict.cause, Cause::PoolExhausted);
}

#[test]
fn connections_on_which_a_call_may_be_outstanding_are_not_silent() {
    let title = "postgres: shop shop 127.0.0.1(30001) idle";
    let mut scene = pooler(title, [OTHER, OTHER]);
    scene.passes_on(PROXY, &[local(5432)], full());
    let unknown = Reading {
        extra: vec![("unknown", 2.0)],
        ..Reading::default()
    };
    scene.queue(1, Kind::Downstream, &format!("-> {}", local(5432)), unknown);
    scene.take_samples(60, &pooler_threads());
    assert_eq!(scene.verdict(&jobs()).cause, Cause::Unknown);
}

/// The two servers of a pool work as long on each call as before, or longer.
fn called(response_ms: f64) -> Verdict {
    let endpoint = format!("-> {}", local(5432));
    let responds = |ms: f64| Reading {
        depth: 2,
        extra: vec![("response_time_ns", ms * 1e6)],
        ..Reading::default()
    };
    let mut scene = pooler("postgres: shop shop [local] SELECT", [OTHER, OTHER]).unfocused();
    for cookie in [1, 3] {
        scene.awaits(cookie);
        scene.awaits(cookie + 1);
    }
    scene.passes_on(PROXY, &[local(5432)], full());
    scene.queue(1, Kind::Downstream, &endpoint, responds(100.0));
    scene.take_samples(10, &pooler_threads());
    scene.focus();
    scene.queue(1, Kind::Downstream, &endpoint, responds(response_ms));
    scene.take_samples(60, &pooler_threads());
    scene.verdict(&jobs())
}

#[test]
fn a_full_pool_whose_servers_are_as_fast_as_before_is_too_small() {
    let as_before = called(110.0);
    assert_eq!(as_before.cause, Cause::PoolExhausted);
    assert_eq!(as_before.culprit.unwrap().kind, CulpritKind::Limit);
    assert_ne!(called(500.0).cause, Cause::PoolExhausted);
}
