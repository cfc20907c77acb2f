//! From a blocked thread to the head of the jam.

use super::{
    super::wait_graph::{ChainEnd, Step},
    scene::{Scene, local, thread},
};
use crate::{event::Activity, sample::Wait};

fn last(steps: &[Step]) -> (u32, Activity, Option<ChainEnd>) {
    let last = steps.last().unwrap();
    (last.tgid, last.activity, last.end.clone())
}

fn processes(steps: &[Step]) -> Vec<u32> {
    steps.iter().map(|step| step.tgid).collect()
}

/// Service 1 (process 10) calls service 2 (20), which calls service 3 (30).
fn chain() -> Scene {
    let mut scene = Scene::of(&[&[10], &[20], &[30]]);
    scene.joins(1, (10, 5), (20, 5), 7001);
    scene.joins(3, (20, 6), (30, 5), 7002);
    for cookie in 1..=4 {
        scene.awaits(cookie);
    }
    scene
}

#[test]
fn a_chain_leads_to_the_last_that_waits_for_nobody() {
    let mut scene = chain();
    let threads = [
        thread(10, 0).reads(5),
        thread(20, 0).reads(6),
        thread(30, 0).on_cpu(),
    ];
    scene.take_samples(40, &threads);
    let steps = scene.chain(1);
    assert_eq!(processes(&steps), [10, 20, 30]);
    assert_eq!(last(&steps), (30, Activity::OnCpu, Some(ChainEnd::Reached)));
    assert_eq!(steps[2].target, Some(3));
}

#[test]
fn event_loops_are_followed_by_the_calls_that_they_await() {
    let mut scene = chain();
    let threads = [
        thread(10, 0).serves_all(),
        thread(20, 0).serves_all(),
        thread(30, 0).on_cpu(),
    ];
    scene.accepts(9, (10, 9), 80);
    scene.awaits(9);
    scene.take_samples(40, &threads);
    assert_eq!(
        last(&scene.chain(1)),
        (30, Activity::OnCpu, Some(ChainEnd::Reached))
    );
}

#[test]
fn a_trail_ends_where_the_other_end_is_away() {
    let mut scene = Scene::of(&[&[10]]);
    scene.calls(1, (10, 5), "10.0.0.9:5432".parse().unwrap());
    scene.awaits(1);
    scene.take_samples(40, &[thread(10, 0).reads(5)]);
    let away = ChainEnd::Remote("10.0.0.9:5432".to_owned());
    assert_eq!(
        last(&scene.chain(1)),
        (10, Activity::Downstream, Some(away))
    );
}

#[test]
fn a_trail_ends_where_the_other_end_is_not_looked_at() {
    let mut scene = Scene::of(&[&[10]]);
    scene.calls(1, (10, 5), local(5432));
    scene.awaits(1);
    scene.unwatched_peer(99, 1);
    scene.take_samples(40, &[thread(10, 0).reads(5)]);
    let unseen = Some(ChainEnd::Unsampled(99));
    assert_eq!(last(&scene.chain(1)), (10, Activity::Downstream, unseen));
}

#[test]
fn who_waits_for_each_other_is_a_cycle() {
    let mut scene = Scene::of(&[&[10], &[20]]);
    scene.joins(1, (10, 5), (20, 5), 7001);
    scene.joins(3, (20, 6), (10, 6), 7002);
    for cookie in 1..=4 {
        scene.awaits(cookie);
    }
    scene.take_samples(40, &[thread(10, 0).reads(5), thread(20, 0).reads(6)]);
    let steps = scene.chain(1);
    assert_eq!(processes(&steps), [10, 20]);
    assert_eq!(steps[1].end, Some(ChainEnd::Cycle));
}

#[test]
fn threads_that_hold_what_the_other_wants_are_a_cycle() {
    let mut scene = Scene::of(&[&[10]]);
    let threads = [
        thread(10, 1).locked(0x1000, 12),
        thread(10, 2).locked(0x2000, 11),
        thread(10, 3).locked(0x1000, 12),
    ];
    scene.take_samples(40, &threads);
    let steps = scene.chain(1);
    assert_eq!(
        steps.last().unwrap().end,
        Some(ChainEnd::Cycle),
        "{steps:?}"
    );
}

#[test]
fn a_lock_leads_to_what_its_holder_does_while_it_holds_it() {
    let mut scene = Scene::of(&[&[10]]);
    let waiters = |owner| -> Vec<Wait> {
        (1..5)
            .map(|index| thread(10, index).locked(0x1000, owner))
            .collect()
    };
    // The holder idles when nobody waits.
    scene.take_samples(60, &[thread(10, 9).parked()]);
    let mut threads = waiters(19);
    threads.push(thread(10, 9).on_cpu());
    scene.take_samples(40, &threads);
    let steps = scene.chain(1);
    assert_eq!(steps[0].activity, Activity::Lock);
    assert_eq!(last(&steps), (10, Activity::OnCpu, Some(ChainEnd::Reached)));
    assert_eq!(steps[1].thread, Some((10, 19)));
    assert!((steps[1].share - 1.0).abs() < 1e-9, "{steps:?}");
}

#[test]
fn a_holder_that_waits_for_another_service_leads_there() {
    let mut scene = chain();
    let mut threads: Vec<Wait> = (1..5)
        .map(|index| thread(10, index).locked(0x1000, 10))
        .collect();
    threads.extend([
        thread(10, 0).reads(5),
        thread(20, 0).reads(6),
        thread(30, 0).on_cpu(),
    ]);
    scene.take_samples(40, &threads);
    let steps = scene.chain(1);
    let activities: Vec<Activity> = steps.iter().map(|step| step.activity).collect();
    let way = [
        Activity::Lock,
        Activity::Downstream,
        Activity::Downstream,
        Activity::OnCpu,
    ];
    assert_eq!(activities, way);
    assert_eq!(processes(&steps), [10, 10, 20, 30]);
}

#[test]
fn titles_that_wait_lead_to_the_oldest_that_is_idle_in_a_transaction() {
    let mut scene = Scene::of(&[&[10], &[20, 21, 22, 23]]);
    scene.joins(1, (10, 5), (21, 5), 5432);
    scene.awaits(1);
    scene.awaits(2);
    scene.says(21, "postgres: bob shop [local] UPDATE waiting");
    scene.says(23, "postgres: bob shop [local] idle in transaction");
    let threads = [
        thread(10, 0).reads(5),
        thread(20, 0).serves_all(),
        thread(21, 0).serves_all(),
        thread(22, 0).serves_all(),
        thread(23, 0).serves_all(),
    ];
    scene.take_samples(20, &threads);
    scene.says(22, "postgres: bob shop [local] idle in transaction");
    scene.take_samples(20, &threads);
    let steps = scene.chain(1);
    assert_eq!(processes(&steps), [10, 21, 23], "22 is idle since later");
    assert_eq!(steps[1].activity, Activity::Lock);
}

#[test]
fn without_such_a_title_the_oldest_request_that_does_not_wait_is_the_suspect() {
    let mut scene = Scene::of(&[&[20, 21, 22]]);
    scene.accepts(1, (21, 5), 5432);
    scene.accepts(2, (22, 5), 5432);
    scene.accepts(3, (20, 5), 5432);
    scene.awaits(1);
    scene.awaits(2).began_ns -= 5_000_000_000;
    scene.awaits(3);
    scene.says(21, "postgres: bob shop [local] UPDATE waiting");
    let threads = [
        thread(21, 0).serves_all(),
        thread(22, 0).on_cpu(),
        thread(20, 0).parked(),
    ];
    scene.take_samples(40, &threads);
    // Two kinds of work share the service; ask of those that wait.
    let steps = scene.chain_of_processes(&[21]);
    assert_eq!(processes(&steps), [21, 22]);
}

#[test]
fn a_pipe_leads_to_whoever_reads_it() {
    let mut scene = Scene::of(&[&[10], &[20]]);
    scene.pipe(77, (10, 1), 20);
    scene.take_samples(
        40,
        &[
            thread(10, 0).writes(1),
            thread(20, 0).call(libc::SYS_nanosleep, [0; 4]),
        ],
    );
    let steps = scene.chain(1);
    assert_eq!(steps[0].activity, Activity::Output);
    assert_eq!(
        last(&steps),
        (20, Activity::Asleep, Some(ChainEnd::Reached))
    );
}

#[test]
fn threads_that_always_wait_for_work_are_not_followed() {
    let mut scene = chain();
    let threads = [
        thread(10, 0).reads(5),
        thread(10, 1).parked(),
        thread(10, 2).parked(),
        thread(10, 3).parked(),
        thread(10, 4).parked(),
        thread(20, 0).on_cpu(),
    ];
    scene.take_samples(40, &threads);
    let steps = scene.chain(1);
    assert_eq!(steps[0].threads.len(), 1);
    assert_eq!(last(&steps), (20, Activity::OnCpu, Some(ChainEnd::Reached)));
}

#[test]
fn most_of_the_time_decides_where_a_trail_leads() {
    let mut scene = Scene::of(&[&[10], &[20], &[30]]);
    scene.joins(1, (10, 5), (20, 5), 7001);
    scene.joins(3, (10, 6), (30, 5), 7002);
    for cookie in 1..=4 {
        scene.awaits(cookie);
    }
    let there = [thread(20, 0).on_cpu(), thread(30, 0).on_cpu()];
    let at = |fd| [[thread(10, 0).reads(fd)].as_slice(), &there].concat();
    scene.take_samples(10, &at(5));
    scene.take_samples(30, &at(6));
    assert_eq!(processes(&scene.chain(1)), [10, 30]);
}

#[test]
fn nothing_that_was_looked_at_is_no_trail() {
    let mut scene = Scene::of(&[&[10]]);
    scene.take_samples(1, &[]);
    assert!(scene.chain(1).is_empty());
}
