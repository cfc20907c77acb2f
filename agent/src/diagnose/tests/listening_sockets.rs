//! Verdicts where one of several listening sockets of an address fills (SO_REUSEPORT).

use super::{
    scene::{Scene, filling, local, thread},
    verdicts::culprit,
};
use crate::{
    cause::Cause,
    event::{Confidence, Verdict},
    sample::{Listener, State, Wait},
};

/// A socket of the queue's address.
fn socket(cookie: u64, tgid: u32, depth: u32) -> Listener {
    Listener {
        cookie,
        tgid,
        netns: 1,
        address: local(80),
        depth,
        limit: 64,
        drops: 0,
        half_open: None,
        seen_ns: 0,
        ages_ns: Vec::new(),
    }
}

/// The verdict on a service of three processes with three listening sockets. `holders`: the process that holds each socket.
/// `second`: what the second process does. The second socket fills.
fn verdict(holders: [u32; 3], second: Wait) -> Verdict {
    let mut scene = Scene::of(&[&[10, 11, 12]]);
    let sockets = holders.iter().enumerate();
    scene.sample().listeners = sockets
        .map(|(index, tgid)| socket(index as u64, *tgid, if index == 1 { 30 } else { 0 }))
        .collect();
    let threads = [
        thread(10, 0).serves_all(),
        second,
        thread(12, 0).serves_all(),
    ];
    scene.take_samples(80, &threads);
    scene.verdict(&filling())
}

const OWN: [u32; 3] = [10, 11, 12];
const INHERITED: [u32; 3] = [10, 10, 10];

#[test]
fn a_worker_that_computes_in_one_turn_blocks_its_own_queue() {
    for holders in [OWN, INHERITED] {
        let verdict = verdict(holders, thread(11, 0).on_cpu());
        assert_eq!(verdict.cause, Cause::EventLoopBlocked);
        assert_eq!(culprit(&verdict).1, Some(11));
        assert_eq!(verdict.confidence, Confidence::High);
        assert!(
            verdict.evidence.contains("1 of 3 listening sockets"),
            "{}",
            verdict.evidence
        );
        assert!(
            verdict.advice.contains("A longer backlog only"),
            "{}",
            verdict.advice
        );
    }
}

#[test]
fn a_worker_that_sleeps_in_a_handler_is_not_a_lack_of_workers() {
    let sleeps = thread(11, 0).call(libc::SYS_clock_nanosleep, [0; 4]);
    let verdict = verdict(OWN, sleeps);
    assert_eq!(verdict.cause, Cause::EventLoopBlocked);
    assert_eq!(culprit(&verdict).1, Some(11));
}

#[test]
fn a_worker_that_is_stopped_is_stalled() {
    let verdict = verdict(INHERITED, thread(11, 0).state(State::Stopped));
    assert_eq!(verdict.cause, Cause::ConsumerStalled);
    assert_eq!(culprit(&verdict).1, Some(11));
}

#[test]
fn a_socket_without_a_worker_is_not_served() {
    let verdict = verdict(INHERITED, thread(11, 0).serves_all());
    assert_eq!(verdict.cause, Cause::ConsumerStalled);
    assert_eq!(verdict.confidence, Confidence::Medium);
    assert!(verdict.advice.contains("accepts"), "{}", verdict.advice);
}

#[test]
fn a_busy_worker_that_accepts_has_more_than_its_share() {
    let mut scene = Scene::of(&[&[10, 11]]);
    let threads = [thread(10, 0).serves_all(), thread(11, 0).on_cpu()];
    for round in 0..80 {
        let depth = 20 + round % 3;
        scene.sample().listeners = vec![socket(0, 10, 0), socket(1, 11, depth)];
        scene.take_samples(1, &threads);
    }
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::CpuBound);
    assert!(
        verdict.advice.contains("spread unevenly"),
        "{}",
        verdict.advice
    );
}
