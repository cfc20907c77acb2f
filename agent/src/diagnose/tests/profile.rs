//! Shares of threads' wall time.

use super::{
    super::{profile::count_with_share, thread_set::ThreadSet},
    scene::{Scene, thread},
};
use crate::{
    event::Activity,
    queue::{Kind, Reading},
    sample::{State, Wait},
};

fn share(shares: &[(Activity, f64)], activity: Activity) -> f64 {
    let found = shares.iter().find(|(one, _)| *one == activity);
    found.map_or(0.0, |(_, share)| *share)
}

fn run_queue(extra: &[(&'static str, f64)]) -> Reading {
    Reading {
        depth: 1,
        extra: extra.to_vec(),
        ..Reading::default()
    }
}

#[test]
fn shares_add_up_to_one_whatever_the_threads_do() {
    let mut seed = 0x5eed_u64;
    let mut below = |bound: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % bound
    };
    for round in 0..30 {
        let mut scene = Scene::of(&[&[10]]);
        scene.accepts(1, (10, 5), 80);
        if round % 2 == 0 {
            let split = [
                ("foreign_share", 0.3),
                ("own_share", 0.1),
                ("quota_share", 0.2),
                ("steal_share", 0.4),
            ];
            scene.queue(1, Kind::Runqueue, "threads", run_queue(&split));
        }
        let count = 1 + below(9) as u32;
        for _ in 0..10 {
            let observation = |index| {
                let thread = thread(10, index);
                match below(8) {
                    0 => thread.on_cpu(),
                    1 => thread.state(State::Runnable),
                    2 => thread.reads(5),
                    3 => thread.locked(0x1000, 10),
                    4 => thread.parked(),
                    5 => thread.state(State::Stopped),
                    6 => thread.state(State::Dead),
                    _ => thread,
                }
            };
            let waits: Vec<Wait> = (0..count).map(observation).collect();
            scene.take_samples(1, &waits);
        }
        let window = scene.window();
        let threads = ThreadSet::of((0..count).map(|index| (10, 10 + index)));
        let shares = threads.shares(&window, Some(1));
        let sum: f64 = shares.iter().map(|(_, share)| share).sum();
        assert!((sum - 1.0).abs() < 1e-9, "round {round}: {shares:?}");
        assert!(shares.is_sorted_by(|a, b| a.1 >= b.1), "{shares:?}");
        assert!(shares.iter().all(|(_, share)| *share > 0.0), "{shares:?}");
    }
}

#[test]
fn each_thread_has_the_same_weight_however_many_samples_it_has() {
    let mut scene = Scene::of(&[&[10]]);
    scene.take_samples(30, &[thread(10, 0).on_cpu()]);
    scene.take_samples(10, &[thread(10, 1).parked()]);
    let threads = ThreadSet::of([(10, 10), (10, 11)]);
    let shares = threads.shares(&scene.window(), None);
    assert_eq!(shares, [(Activity::Idle, 0.5), (Activity::OnCpu, 0.5)]);
}

#[test]
fn run_delay_is_split_by_who_had_the_cpu() {
    let mut scene = Scene::of(&[&[10]]);
    let split = [("foreign_share", 0.75), ("quota_share", 0.25)];
    scene.queue(1, Kind::Runqueue, "threads", run_queue(&split));
    scene.take_samples(20, &[thread(10, 0).on_cpu()]);
    scene.take_samples(20, &[thread(10, 0).state(State::Runnable)]);
    let threads = ThreadSet::of([(10, 10)]);
    let shares = threads.shares(&scene.window(), Some(1));
    assert!((share(&shares, Activity::OnCpu) - 0.5).abs() < 1e-9);
    assert!((share(&shares, Activity::RunnableForeign) - 0.375).abs() < 1e-9);
    assert!((share(&shares, Activity::Throttled) - 0.125).abs() < 1e-9);
    // Without a run queue it is not known who had the CPU: own threads are assumed.
    let shares = threads.shares(&scene.window(), None);
    assert!((share(&shares, Activity::RunnableOwn) - 0.5).abs() < 1e-9);
}

#[test]
fn a_window_holds_only_the_samples_of_its_time() {
    let mut scene = Scene::of(&[&[10]]);
    scene.take_samples(80, &[thread(10, 0).on_cpu()]);
    let between = scene.now().mono_ns;
    scene.take_samples(120, &[thread(10, 0).parked()]);
    let all = scene.window();
    assert_eq!(all.of((10, 10)).unwrap().samples, 200);
    let threads = ThreadSet::of([(10, 10)]);
    let early = threads.shares(&scene.over(0, between - 1_000_000_000), None);
    assert_eq!(early, [(Activity::OnCpu, 1.0)]);
    let late = threads.shares(&scene.over(between + 1_000_000_000, u64::MAX), None);
    assert_eq!(late, [(Activity::Idle, 1.0)]);
}

#[test]
fn threads_without_samples_have_no_shares() {
    let scene = Scene::of(&[&[10]]);
    let threads = ThreadSet::of([(10, 10)]);
    assert_eq!(threads.shares(&scene.window(), Some(1)), []);
}

#[test]
fn a_lock_holder_is_counted_only_while_others_wait_for_the_lock() {
    let mut scene = Scene::of(&[&[10]]);
    let holds = thread(10, 2);
    scene.take_samples(30, &[holds.clone().parked(), thread(10, 1).parked()]);
    scene.take_samples(10, &[holds.on_cpu(), thread(10, 1).locked(0x1000, 12)]);
    let window = scene.window();
    let holders = window.holders((10, 0x1000)).unwrap();
    let time = &holders[&(10, 12)];
    assert_eq!((time.samples, time.share_of(Activity::OnCpu)), (10, 1.0));
    assert_eq!(window.of((10, 12)).unwrap().samples, 40);
}

#[test]
fn threads_that_poll_in_turn_are_no_spare_workers_while_they_are_parked() {
    let shares = |first: fn(Wait) -> Wait, second: fn(Wait) -> Wait| {
        let mut scene = Scene::of(&[&[10]]);
        scene.accepts(1, (10, 5), 80);
        scene.awaits(1);
        scene.take_samples(30, &[first(thread(10, 0)), second(thread(10, 1))]);
        scene.take_samples(10, &[second(thread(10, 0)), first(thread(10, 1))]);
        scene.take_samples(1, &[thread(10, 0).on_cpu(), thread(10, 1).parked()]);
        let threads = ThreadSet::of([(10, 10), (10, 11)]);
        threads.shares(&scene.window(), None)
    };
    let in_turn = shares(Wait::serves_all, Wait::parked);
    assert!(share(&in_turn, Activity::Inside) > 0.9, "{in_turn:?}");
    assert!(
        (share(&in_turn, Activity::Idle)).abs() < 1e-9,
        "{in_turn:?}"
    );
    // The threads of a pool that never poll are spare ones.
    let pool = shares(Wait::on_cpu, Wait::parked);
    assert!(share(&pool, Activity::Idle) > 0.4, "{pool:?}");
}

#[test]
fn a_loop_that_is_never_woken_while_another_is_does_not_serve_the_requests() {
    let shares = |wakes: fn(u64) -> [u64; 2]| {
        let mut scene = Scene::of(&[&[10]]);
        scene.accepts(1, (10, 5), 80);
        scene.awaits(1);
        for turn in 1..=40 {
            let wakes = wakes(turn);
            let waits = [0, 1].map(|index| Wait {
                voluntary: wakes[index as usize],
                ..thread(10, index).serves_all()
            });
            scene.take_samples(1, &waits);
        }
        let threads = ThreadSet::of([(10, 10), (10, 11)]);
        let shares = threads.shares(&scene.window(), None);
        (
            share(&shares, Activity::Inside),
            share(&shares, Activity::Idle),
        )
    };
    assert_eq!(shares(|turn| [turn, 0]), (0.5, 0.5));
    assert_eq!(shares(|turn| [turn, turn]), (1.0, 0.0));
    // No loop is woken: any of them may be the one.
    assert_eq!(shares(|_| [0, 0]), (1.0, 0.0));
    // The second one served requests, and hangs now.
    assert_eq!(shares(|turn| [turn, turn.min(2)]), (1.0, 0.0));
}

#[test]
fn many_threads_with_few_turns_each_count_together() {
    let count = |counts: &[u32]| count_with_share(counts.iter().copied(), 0.04);
    assert_eq!(count(&[50, 30, 20]), 3);
    assert_eq!(count(&[98, 1, 1]), 1);
    assert_eq!(count(&[1; 100]), 25);
    assert_eq!(count(&[]), 0);
}
