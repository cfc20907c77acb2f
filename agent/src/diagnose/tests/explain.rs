//! Every rule behind a verdict, with the numbers that decided.

use super::scene::{Scene, bursts, filling, thread};
use crate::{
    cause::Cause,
    event::explain::{Explanation, RuleOutcome, RuleReport},
    sample::{State, Wait},
};

fn explanation(scene: &mut Scene) -> Explanation {
    scene.explain();
    let verdict = scene.verdict(&filling());
    Explanation::clone(verdict.explanation.as_ref().unwrap())
}

fn with(explanation: &Explanation, outcome: RuleOutcome) -> Vec<&RuleReport> {
    let rules = explanation.rules.iter();
    rules.filter(|rule| rule.outcome == outcome).collect()
}

/// A service that computes with two threads, seen in this many samples of each.
fn computing(samples: usize) -> Scene {
    let mut scene = Scene::of(&[&[10]]);
    let threads = [thread(10, 0).on_cpu(), thread(10, 1).on_cpu()];
    scene.take_samples(samples, &threads);
    scene
}

#[test]
fn nothing_is_recorded_unless_asked_for() {
    let scene = computing(60);
    assert_eq!(scene.verdict(&filling()).explanation, None);
}

#[test]
fn the_chosen_rule_is_the_verdict_and_shows_its_evidence() {
    let explanation = explanation(&mut computing(60));
    assert_eq!((explanation.threads, explanation.samples), (2, 120));
    let chosen = with(&explanation, RuleOutcome::Chosen);
    assert_eq!(chosen.len(), 1);
    assert_eq!(chosen[0].cause, Cause::CpuBound);
    let share = chosen[0].checks.last().unwrap();
    assert_eq!(
        (share.value, share.condition.unwrap().threshold),
        (Some(1.0), 0.2)
    );
}

#[test]
fn a_rule_that_does_not_fire_shows_which_number_failed() {
    let explanation = explanation(&mut computing(60));
    let silent = with(&explanation, RuleOutcome::DidNotFire);
    let throttled = silent.iter().find(|rule| rule.cause == Cause::CpuThrottled);
    let failed = throttled.unwrap().checks.iter();
    let failed: Vec<_> = failed
        .filter(|check| check.condition.is_some_and(|it| !it.holds))
        .map(|check| (check.name, check.value))
        .collect();
    assert_eq!(failed, [("time throttled by the CPU quota", Some(0.0))]);
}

#[test]
fn a_rule_after_the_one_that_decided_is_evaluated_as_well() {
    let mut scene = Scene::of(&[&[10]]);
    scene.take_samples(60, &[thread(10, 0).state(State::Stopped)]);
    let explanation = explanation(&mut scene);
    let chosen = with(&explanation, RuleOutcome::Chosen);
    assert_eq!(chosen[0].rule, "stopped for most of the time");
    let fired = with(&explanation, RuleOutcome::Fired);
    assert_eq!(fired[0].rule, "stopped at times");
}

#[test]
fn too_few_samples_withhold_the_verdict() {
    let mut scene = computing(2);
    assert_eq!(scene.verdict(&filling()).cause, Cause::Unknown);
    let explanation = explanation(&mut scene);
    assert!(with(&explanation, RuleOutcome::Chosen).is_empty());
    let withheld = with(&explanation, RuleOutcome::Withheld);
    assert_eq!(withheld[0].cause, Cause::CpuBound);
}

#[test]
fn rules_about_other_queues_and_activities_do_not_apply() {
    let mut scene = Scene::of(&[&[10]]);
    let idle = |wait: Wait| wait.call(libc::SYS_accept4, [3, 0, 0, 0]);
    scene.take_samples(60, &[idle(thread(10, 0)), idle(thread(10, 1))]);
    scene.explain();
    let verdict = scene.verdict(&bursts());
    let explanation = verdict.explanation.as_ref().unwrap();
    let chosen = with(explanation, RuleOutcome::Chosen);
    assert_eq!(chosen[0].rule, "the backlog is too small");
    let other = with(explanation, RuleOutcome::NotApplicable);
    assert!(other.iter().all(|rule| rule.checks.is_empty()));
    let causes: Vec<Cause> = other.iter().map(|rule| rule.cause).collect();
    assert!(causes.contains(&Cause::CpuBound) && causes.contains(&Cause::MemoryStalled));
}
