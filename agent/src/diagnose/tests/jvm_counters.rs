//! Verdicts on garbage collection, with and without the JVM's own counters.

use super::scene::{Scene, filling, thread};
use crate::{
    cause::Cause,
    event::{Confidence, Verdict},
    sample::{JvmCounters, Wait},
};

/// Samples per second of a scene.
const PER_SECOND: u64 = 40;

/// The verdict on a JVM whose VM thread has the CPU all the time, for four seconds. `counted`: of each second, the milliseconds
/// that the JVM counts as collections and as stops; `None`: its counters are not read.
fn verdict(counted: Option<(u64, u64)>, is_collecting: bool) -> Verdict {
    verdict_on(thread(10, 1).on_cpu(), counted, is_collecting)
}

/// The same with this VM thread.
fn verdict_on(vm_thread: Wait, counted: Option<(u64, u64)>, is_collecting: bool) -> Verdict {
    let mut scene = Scene::of(&[&[10]]);
    let named = |index: u32, name: &str, wait: Wait| Wait {
        comm: name.to_owned(),
        tid: 10 + index,
        own_tid: 10 + index,
        ..wait
    };
    let mut threads = vec![
        named(0, "java", thread(10, 0).parked()),
        named(1, "VM Thread", vm_thread),
        named(2, "VM Periodic Tas", thread(10, 2).parked()),
    ];
    threads.extend((3..7).map(|index| thread(10, index).parked()));
    for sample in 0..=4 * PER_SECOND {
        let second = sample / PER_SECOND;
        let is_due = sample % PER_SECOND == 0;
        let counters = counted
            .filter(|_| is_due)
            .map(|(collecting_ms, stopped_ms)| JvmCounters {
                tgid: 10,
                collector_ns: second * collecting_ms * 1_000_000,
                collections: 1 + second * u64::from(collecting_ms > 0),
                is_collecting,
                safepoint_ns: second * stopped_ms * 1_000_000,
                safepoints: 1 + second,
            });
        scene.sample().jvm_counters = counters.into_iter().collect();
        scene.take_samples(1, &threads);
    }
    scene.verdict(&filling())
}

#[test]
fn without_counters_the_threads_decide_alone() {
    let verdict = verdict(None, false);
    assert_eq!(verdict.cause, Cause::CpuBound);
    assert_eq!(verdict.confidence, Confidence::High);
    assert!(
        !verdict.evidence.contains("counters"),
        "{}",
        verdict.evidence
    );
}

#[test]
fn counters_that_agree_are_part_of_the_evidence() {
    let verdict = verdict(Some((900, 950)), false);
    assert_eq!(verdict.cause, Cause::CpuBound);
    assert_eq!(verdict.confidence, Confidence::High);
    let words = "counters agree: it was in collections 90% of the time, and all its threads were stopped for at least 95%";
    assert!(verdict.evidence.contains(words), "{}", verdict.evidence);
}

#[test]
fn counters_that_contradict_lower_the_confidence() {
    // All threads are stopped, but not to collect garbage.
    let verdict = verdict(Some((20, 950)), false);
    assert_eq!(verdict.cause, Cause::CpuBound);
    assert_eq!(verdict.confidence, Confidence::Low);
    assert!(verdict.advice.contains("heap dumps"), "{}", verdict.advice);
    let words = "contradict this: it was in collections at most 2% of the time, and all its threads were stopped for at least 95%";
    assert!(verdict.evidence.contains(words), "{}", verdict.evidence);
}

#[test]
fn counters_alone_decide_nothing() {
    // A JVM can write into them what it likes.
    let idle = || thread(10, 1).parked();
    let with = verdict_on(idle(), Some((1_000, 1_000)), true);
    let without = verdict_on(idle(), None, false);
    assert_ne!(with.cause, Cause::CpuBound);
    assert_eq!(
        (with.cause, with.confidence, with.evidence),
        (without.cause, without.confidence, without.evidence)
    );
}

#[test]
fn a_collection_that_has_not_ended_contradicts_nothing() {
    let verdict = verdict(Some((0, 0)), true);
    assert_eq!(verdict.confidence, Confidence::High);
    let words = "in progress when the JVM's own counters were read, and they do not count it yet";
    assert!(verdict.evidence.contains(words), "{}", verdict.evidence);
    // One ends and one begins in each second.
    let verdict = self::verdict(Some((400, 400)), true);
    assert_eq!(verdict.confidence, Confidence::High);
    let words = "in collections 30% to 65% of the time, as one was in progress";
    assert!(verdict.evidence.contains(words), "{}", verdict.evidence);
}
