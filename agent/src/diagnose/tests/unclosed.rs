//! Verdicts where connections are not closed after the peer has closed them.

use super::{
    scene::{Scene, episode, filling, local, thread},
    verdicts::culprit,
};
use crate::{
    cause::Cause,
    event::{Confidence, CulpritKind, Episode},
    queue::{Kind, Reading},
};

/// include/net/tcp_states.h
const CLOSE_WAIT: u8 = 8;

fn files(open: u64) -> Reading {
    Reading {
        depth: open,
        limit: Some(100),
        ..Reading::default()
    }
}

fn fd() -> Episode {
    episode(Kind::Fd, "open files")
}

/// A service with 90 of 100 descriptors open.
fn scene() -> Scene {
    let mut scene = Scene::of(&[&[10]]);
    scene.queue(1, Kind::Fd, "open files", files(90));
    scene
}

#[test]
fn descriptors_of_connections_that_clients_have_closed_are_a_leak() {
    let mut scene = scene();
    for cookie in 0..70 {
        let connection = scene.accepts(cookie, (10, 20 + cookie as u32), 80);
        connection.state = CLOSE_WAIT;
        connection.since_sent_ns -= 1;
    }
    scene.take_samples(40, &[thread(10, 0).serves_all()]);
    let verdict = scene.verdict(&fd());
    assert_eq!(verdict.cause, Cause::FdExhausted);
    assert_eq!(
        culprit(&verdict),
        (
            CulpritKind::Process,
            Some(10),
            "connections that service-1 (10) does not close"
        )
    );
    let evidence = &verdict.evidence;
    assert!(evidence.contains("70 connections are closed"), "{evidence}");
    assert!(evidence.contains("accepted on port 80"), "{evidence}");
    assert!(verdict.advice.contains("leaks"), "{}", verdict.advice);
}

#[test]
fn so_are_those_of_calls_that_the_server_has_closed() {
    let mut scene = scene();
    for cookie in 0..70 {
        scene
            .calls(cookie, (10, 20 + cookie as u32), local(5432))
            .state = CLOSE_WAIT;
    }
    scene.take_samples(40, &[thread(10, 0).serves_all()]);
    let verdict = scene.verdict(&fd());
    assert!(
        verdict.evidence.contains("opened to 127.0.0.1:5432"),
        "{}",
        verdict.evidence
    );
}

#[test]
fn connections_whose_requests_are_not_answered_yet_are_no_leak() {
    let mut scene = scene();
    for cookie in 0..70 {
        // The client has given up, and the service still works on its request.
        scene.accepts(cookie, (10, 20 + cookie as u32), 80).state = CLOSE_WAIT;
    }
    scene.take_samples(40, &[thread(10, 0).serves_all()]);
    let verdict = scene.verdict(&fd());
    assert_eq!(culprit(&verdict).2, "RLIMIT_NOFILE of 100");
}

#[test]
fn a_limit_of_connections_that_is_used_up_by_closed_ones_is_no_keep_alive() {
    let mut scene = Scene::of(&[&[10]]);
    for cookie in 0..20 {
        let connection = scene.accepts(cookie, (10, 20 + cookie as u32), 80);
        connection.state = CLOSE_WAIT;
        connection.since_sent_ns -= 1;
    }
    scene.take_samples(40, &[thread(10, 0).serves_all()]);
    let verdict = scene.verdict(&Episode {
        departures: Some(0),
        ..filling()
    });
    assert_eq!(verdict.cause, Cause::ConsumerStalled);
    assert_eq!(verdict.confidence, Confidence::Medium);
    assert!(verdict.advice.contains("leaks"), "{}", verdict.advice);
}
