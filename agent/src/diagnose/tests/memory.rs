//! Verdicts where the tasks of the service's control group stall for memory.

use super::scene::{Scene, filling, thread, waits_for_a_disk};
use crate::{
    cause::Cause,
    event::{Confidence, Verdict},
    queue::{Kind, Reading},
    sample::{Refaults, Wait},
};

/// The verdict if the thread does this while tasks of the group stall for this share of the time.
fn verdict(stall_share: f64, thread: &Wait) -> Verdict {
    verdict_with_refaults(stall_share, thread, 0)
}

/// The same if the group reads 25 pages in each sample, this many of which were evicted before.
fn verdict_with_refaults(stall_share: f64, thread: &Wait, refaults: u64) -> Verdict {
    verdict_with_pages(stall_share, thread, refaults, 25)
}

fn verdict_with_pages(stall_share: f64, thread: &Wait, refaults: u64, pages: u64) -> Verdict {
    let mut scene = Scene::of(&[&[10]]);
    let memory = Reading {
        depth: 60 << 20,
        limit: Some(64 << 20),
        fill: Some(0.99),
        extra: vec![("used_share", 0.94), ("stall_share", stall_share)],
        ..Reading::default()
    };
    scene.queue(1, Kind::Memory, "/service-1", memory);
    scene.sample().scans.system = true;
    for sample in 0..60 {
        scene.sample().refaults = vec![Refaults {
            cgroup: "/service-1".to_owned(),
            refaults: sample * refaults,
            pages: sample * pages,
        }];
        scene.take_samples(1, std::slice::from_ref(thread));
    }
    scene.verdict(&filling())
}

#[test]
fn a_wait_for_pages_that_were_evicted_is_one_for_memory() {
    let verdict = verdict(0.6, &waits_for_a_disk());
    assert_eq!(verdict.cause, Cause::MemoryStalled);
    assert!(
        verdict.evidence.contains("60%") && verdict.evidence.contains("67.1 MB"),
        "{}",
        verdict.evidence
    );
    assert!(
        verdict.advice.contains("memory limit"),
        "{}",
        verdict.advice
    );
}

#[test]
fn reclaim_that_computes_is_a_wait_for_memory() {
    let verdict = verdict(0.6, &thread(10, 0).on_cpu());
    assert_eq!(verdict.cause, Cause::MemoryStalled);
}

#[test]
fn a_wait_for_a_disk_beside_little_reclaim_is_one_for_the_disk() {
    let verdict = verdict(0.05, &waits_for_a_disk());
    assert_eq!(verdict.cause, Cause::DiskSlow);
}

#[test]
fn pages_that_are_read_again_and_again_are_a_lack_of_memory() {
    let verdict = verdict_with_refaults(0.05, &waits_for_a_disk(), 20);
    assert_eq!(verdict.cause, Cause::MemoryStalled);
    assert!(verdict.evidence.contains("80% of"), "{}", verdict.evidence);
    assert_eq!(verdict.confidence, Confidence::Medium);
}

#[test]
fn reading_pages_again_may_compute_and_then_needs_stalls_or_many_pages() {
    for (stall_share, refaults, pages, cause) in [
        (0.1, 20, 25, Cause::MemoryStalled),
        (0.02, 20, 25, Cause::CpuBound),
        (0.1, 5, 25, Cause::CpuBound),
        // 8,000 a second.
        (0.02, 200, 250, Cause::MemoryStalled),
        (0.02, 50, 250, Cause::CpuBound),
    ] {
        let verdict = verdict_with_pages(stall_share, &thread(10, 0).on_cpu(), refaults, pages);
        assert_eq!(verdict.cause, cause, "{stall_share} {refaults} {pages}");
    }
}

#[test]
fn pages_that_are_read_for_the_first_time_are_not() {
    let verdict = verdict_with_refaults(0.05, &waits_for_a_disk(), 5);
    assert_eq!(verdict.cause, Cause::DiskSlow);
}
