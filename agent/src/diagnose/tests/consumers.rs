//! Verdicts on queues inside services, from the processes that take items from them.

use super::scene::{Scene, jobs, thread};
use crate::{
    cause::Cause,
    event::{Confidence, Episode, Verdict},
    queue::Reading,
    sample::Wait,
};

const BROKER: u32 = 10;
const WORKER: u32 = 20;
/// Another process of the worker's service.
const WEB: u32 = 30;

fn waiting(consumers: u64) -> Reading {
    Reading {
        depth: 50,
        extra: vec![("consumers", consumers as f64)],
        ..Reading::default()
    }
}

fn idle() -> Wait {
    thread(WORKER, 0).call(libc::SYS_wait4, [0; 4])
}

fn verdict(consumers: u64, threads: &[Wait], episode: &Episode) -> Verdict {
    let mut scene = Scene::of(&[&[BROKER], &[WORKER, WEB]]);
    scene.calls(1, (WORKER, 5), "10.0.0.9:5432".parse().unwrap());
    scene.awaits(1);
    scene.jobs(BROKER, &[WORKER], waiting(consumers));
    scene.take_samples(60, threads);
    scene.verdict(episode)
}

#[test]
fn idle_consumers_are_not_stalled_if_departures_are_unknown() {
    let unknown = jobs();
    assert_ne!(
        verdict(1, &[idle()], &unknown).cause,
        Cause::ConsumerStalled
    );
    let none = Episode {
        departures: Some(0),
        ..jobs()
    };
    assert_eq!(verdict(1, &[idle()], &none).cause, Cause::ConsumerStalled);
}

#[test]
fn a_busy_process_beside_a_consumer_that_waits_is_not_a_consumer() {
    let threads = [
        thread(WORKER, 0).reads(5),
        thread(WEB, 0).on_cpu(),
        thread(WEB, 1).on_cpu(),
        thread(WEB, 2).on_cpu(),
    ];
    let verdict = verdict(1, &threads, &jobs());
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert!(
        !verdict.evidence.contains("idle themselves"),
        "{}",
        verdict.evidence
    );
}

#[test]
fn the_service_of_idle_consumers_gives_medium_confidence_at_most() {
    let verdict = verdict(1, &[idle(), thread(WEB, 0).on_cpu()], &jobs());
    assert!(verdict.confidence <= Confidence::Medium);
    assert!(
        verdict.evidence.contains("idle themselves"),
        "{}",
        verdict.evidence
    );
}

#[test]
fn one_known_consumer_of_many_gives_medium_confidence_at_most() {
    let verdict = verdict(40, &[thread(WORKER, 0).reads(5)], &jobs());
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert!(verdict.confidence <= Confidence::Medium);
    assert!(
        verdict.evidence.contains("1 of 40 consumers"),
        "{}",
        verdict.evidence
    );
}

#[test]
fn nobody_takes_items_only_if_somebody_did_and_two_answers_say_so() {
    let of = |no_consumers_ns, departures| {
        let mut scene = Scene::of(&[&[BROKER]]);
        let reading = Reading {
            no_consumers_ns,
            ..waiting(0)
        };
        scene.jobs(BROKER, &[], reading);
        scene.take_samples(60, &[thread(BROKER, 0).serves_all()]);
        let verdict = scene.verdict(&Episode {
            departures,
            ..jobs()
        });
        (verdict.cause, verdict.confidence)
    };
    let stalled = Cause::ConsumerStalled;
    assert_ne!(of(None, Some(0)).0, stalled, "it never had consumers");
    assert_ne!(of(Some(0), Some(0)).0, stalled, "one answer");
    assert_ne!(of(Some(5), Some(3)).0, stalled, "items leave it");
    assert_eq!(of(Some(5), Some(0)), (stalled, Confidence::High));
    assert_eq!(of(Some(5), None), (stalled, Confidence::Medium));
}
