//! Verdicts where the agent cannot see a fact that would decide.

use super::scene::{Scene, filling, thread, waits_for_a_disk};
use crate::{
    cause::Cause,
    event::{Confidence, Verdict},
    sample::{Hidden, HiddenFact, Wait},
};

/// The verdict on a service whose thread does this, if these facts of its control group are hidden.
fn verdict(thread: &Wait, facts: &[HiddenFact]) -> Verdict {
    let mut scene = Scene::of(&[&[10]]);
    scene.sample().scans.system = true;
    for _ in 0..60 {
        let hidden = facts.iter().map(|fact| Hidden {
            cgroup: "/service-1".to_owned(),
            fact: *fact,
        });
        scene.sample().hidden = hidden.collect();
        scene.take_samples(1, std::slice::from_ref(thread));
    }
    scene.verdict(&filling())
}

#[test]
fn hidden_limits_make_a_busy_service_uncertain() {
    let computes = thread(10, 0).on_cpu();
    let seen = verdict(&computes, &[]);
    assert_eq!(seen.cause, Cause::CpuBound);
    assert!(seen.confidence > Confidence::Low);
    assert!(!seen.evidence.contains("hidden"), "{}", seen.evidence);
    let hidden = verdict(&computes, &[HiddenFact::CpuQuota]);
    assert_eq!(hidden.confidence, Confidence::Low);
    assert!(
        hidden
            .evidence
            .contains("the CPU quota of control group /service-1"),
        "{}",
        hidden.evidence
    );
    let hidden = verdict(&computes, &[HiddenFact::MemoryLimit]);
    assert_eq!(hidden.confidence, Confidence::Low);
    // Limits that have nothing to do with it.
    let other = verdict(&computes, &[HiddenFact::IoLimits]);
    assert_eq!(other.confidence, seen.confidence);
    assert!(!other.evidence.contains("hidden"), "{}", other.evidence);
}

#[test]
fn hidden_limits_make_a_wait_for_a_disk_uncertain() {
    let seen = verdict(&waits_for_a_disk(), &[]);
    assert_eq!(seen.cause, Cause::DiskSlow);
    for fact in [HiddenFact::MemoryLimit, HiddenFact::IoLimits] {
        let hidden = verdict(&waits_for_a_disk(), &[fact]);
        assert_eq!(hidden.confidence, Confidence::Low, "{fact:?}");
        assert!(hidden.evidence.contains("hidden from the agent"));
    }
    // Its own group has no limit, those around it are out of sight.
    let outer = verdict(&waits_for_a_disk(), &[HiddenFact::OuterIoLimits]);
    assert_eq!(outer.confidence, seen.confidence);
    assert!(outer.evidence.contains("the I/O limits of the parents"));
}
