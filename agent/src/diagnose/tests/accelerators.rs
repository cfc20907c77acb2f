//! Verdicts where threads wait for an accelerator.

use super::{
    scene::{Scene, episode, filling, thread},
    verdicts::culprit,
};
use crate::{
    cause::Cause,
    event::{Confidence, Verdict},
    queue::Kind,
    sample::{Accelerator, OnAccelerator, Wait},
};

/// The verdict if thread `tid` of process 10 is on an accelerator in every sample.
fn verdict(tid: u32, threads: &[Wait]) -> Verdict {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(1, (10, 5), 80);
    scene.awaits(1);
    scene.sample().on_accelerator = vec![OnAccelerator {
        tgid: 10,
        tid,
        through: Accelerator::Cuda,
    }];
    scene.take_samples(60, threads);
    scene.verdict(&filling())
}

#[test]
fn a_thread_that_spins_in_a_library_of_an_accelerator_does_not_compute() {
    let verdict = verdict(10, &[thread(10, 0).on_cpu()]);
    assert_eq!(verdict.cause, Cause::AcceleratorBound);
    assert_eq!(verdict.confidence, Confidence::High);
    let (_, pid, name) = culprit(&verdict);
    assert_eq!(pid, Some(10));
    assert!(name.ends_with("in libcuda"), "{name}");
    assert!(!verdict.advice.contains("profile it"), "{}", verdict.advice);
}

#[test]
fn an_event_loop_that_waits_for_such_a_thread_is_not_the_cause() {
    let threads = [thread(10, 0).serves_all(), thread(10, 1).on_cpu()];
    let verdict = verdict(11, &threads);
    assert_eq!(verdict.cause, Cause::AcceleratorBound);
    assert!(culprit(&verdict).2.contains("(11)"));
}

#[test]
fn threads_that_compute_beside_it_are_busy() {
    let mut threads: Vec<Wait> = (0..4).map(|index| thread(10, index).on_cpu()).collect();
    threads.push(thread(10, 4).on_cpu());
    let verdict = verdict(14, &threads);
    assert_eq!(verdict.cause, Cause::CpuBound);
}

#[test]
fn a_lock_whose_holder_waits_for_an_accelerator_is_not_the_cause() {
    let mut threads: Vec<Wait> = (0..5)
        .map(|index| thread(10, index).locked(0x1000, 15))
        .collect();
    threads.push(thread(10, 5).on_cpu());
    let verdict = verdict(15, &threads);
    assert_eq!(verdict.cause, Cause::AcceleratorBound);
    assert!(culprit(&verdict).2.contains("(15)"));
}

#[test]
fn a_thread_that_waits_for_a_cpu_is_not_on_the_accelerator() {
    let mut scene = Scene::of(&[&[10]]);
    scene.sample().on_accelerator = vec![OnAccelerator {
        tgid: 10,
        tid: 10,
        through: Accelerator::Cuda,
    }];
    let waits = thread(10, 0).state(crate::sample::State::Runnable);
    scene.take_samples(60, &[waits]);
    let verdict = scene.verdict(&episode(Kind::Runqueue, "threads"));
    assert_eq!(verdict.cause, Cause::CpuBound);
}
