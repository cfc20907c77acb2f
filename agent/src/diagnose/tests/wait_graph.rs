//! Wait chains: from blocked threads to the root cause.

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
fn a_chain_ends_at_the_service_that_waits_for_nobody() {
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
fn a_chain_follows_the_outstanding_calls_of_event_loops() {
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
fn a_chain_ends_at_a_remote_endpoint() {
    let mut scene = Scene::of(&[&[10]]);
    scene.calls(1, (10, 5), "10.0.0.9:5432".parse().unwrap());
    scene.awaits(1);
    scene.take_samples(40, &[thread(10, 0).reads(5)]);
    let remote = ChainEnd::Remote("10.0.0.9:5432".to_owned());
    assert_eq!(
        last(&scene.chain(1)),
        (10, Activity::Downstream, Some(remote))
    );
}

#[test]
fn a_chain_ends_at_a_process_that_is_not_sampled() {
    let mut scene = Scene::of(&[&[10]]);
    scene.calls(1, (10, 5), local(5432));
    scene.awaits(1);
    scene.unwatched_peer(99, 1);
    scene.take_samples(40, &[thread(10, 0).reads(5)]);
    let unsampled = Some(ChainEnd::Unsampled(99));
    assert_eq!(last(&scene.chain(1)), (10, Activity::Downstream, unsampled));
}

#[test]
fn a_connection_request_waits_for_the_process_that_listens_only_if_the_accept_queue_was_full() {
    // The server waits for the client, as one whose response does not get through.
    for (depth, is_full) in [(0, false), (100, false), (101, true)] {
        let mut scene = Scene::of(&[&[10], &[20]]);
        scene.joins(1, (20, 5), (10, 7), 7001);
        scene.awaits(1);
        scene.calls(3, (10, 6), local(9090)).state = 2;
        scene.accepts(4, (20, 8), 9090);
        let listener = scene.sample().listeners.last_mut().unwrap();
        listener.depth = depth;
        scene.listens(20, local(9090), "nginx");
        let connects = thread(10, 0).call(libc::SYS_connect, [6, 0, 16, 0]);
        scene.take_samples(60, &[connects, thread(20, 0).reads(5)]);
        let remote = ChainEnd::Remote("127.0.0.1:9090".to_owned());
        let end = last(&scene.chain(1)).2;
        let expected = if is_full { ChainEnd::Cycle } else { remote };
        assert_eq!(end, Some(expected), "depth {depth}");
    }
}

#[test]
fn a_thread_that_sends_waits_for_its_peer_only_if_that_has_something_to_read() {
    for (sent, unread, end) in [
        (65_536, 30_000, ChainEnd::Cycle),
        // All that fills the window is still on its way.
        (65_536, 0, ChainEnd::Reached),
        // The window has room.
        (10_000, 30_000, ChainEnd::Reached),
    ] {
        let mut scene = Scene::of(&[&[10], &[20]]);
        scene.joins(1, (10, 5), (20, 5), 7001);
        scene.awaits(1);
        let connections = &mut scene.sample().connections;
        connections[0].rcv_nxt = unread;
        connections[1].snd_nxt = sent;
        connections[1].write_seq = sent + 50_000;
        scene.take_samples(60, &[thread(10, 0).reads(5), thread(20, 0).writes(5)]);
        let (_, _, found) = last(&scene.chain(2));
        assert_eq!(found, Some(end), "{sent} sent, {unread} unread");
    }
}

#[test]
fn services_that_wait_for_each_other_are_a_cycle() {
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
fn threads_that_hold_each_others_locks_are_a_cycle() {
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
fn a_lock_leads_to_what_its_holder_does_while_holding_it() {
    let mut scene = Scene::of(&[&[10]]);
    let waiters = |owner| -> Vec<Wait> {
        (1..5)
            .map(|index| thread(10, index).locked(0x1000, owner))
            .collect()
    };
    // The holder is idle while nobody waits.
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
    let expected = [
        Activity::Lock,
        Activity::Downstream,
        Activity::Downstream,
        Activity::OnCpu,
    ];
    assert_eq!(activities, expected);
    assert_eq!(processes(&steps), [10, 10, 20, 30]);
}

#[test]
fn a_row_lock_leads_to_the_session_idle_in_a_transaction_for_longest() {
    let mut scene = Scene::of(&[&[10], &[20, 21, 22, 23]]);
    scene.joins(1, (10, 5), (21, 5), 5432);
    scene.awaits(1);
    scene.awaits(2);
    scene.set_title(21, "postgres: bob shop [local] UPDATE waiting");
    scene.set_title(23, "postgres: bob shop [local] idle in transaction");
    let threads = [
        thread(10, 0).reads(5),
        thread(20, 0).serves_all(),
        thread(21, 0).serves_all(),
        thread(22, 0).serves_all(),
        thread(23, 0).serves_all(),
    ];
    scene.take_samples(20, &threads);
    scene.set_title(22, "postgres: bob shop [local] idle in transaction");
    scene.take_samples(20, &threads);
    let steps = scene.chain(1);
    assert_eq!(processes(&steps), [10, 21, 23], "22 became idle later");
    assert_eq!(steps[1].activity, Activity::Lock);
}

#[test]
fn without_such_a_session_a_row_lock_leads_to_the_oldest_running_request() {
    let mut scene = Scene::of(&[&[20, 21, 22]]);
    scene.accepts(1, (21, 5), 5432);
    scene.accepts(2, (22, 5), 5432);
    scene.accepts(3, (20, 5), 5432);
    scene.awaits(1);
    scene.awaits(2).began_ns -= 5_000_000_000;
    scene.awaits(3);
    scene.set_title(21, "postgres: bob shop [local] UPDATE waiting");
    let threads = [
        thread(21, 0).serves_all(),
        thread(22, 0).on_cpu(),
        thread(20, 0).parked(),
    ];
    scene.take_samples(40, &threads);
    // Two kinds of work share the service: follow the process that waits.
    let steps = scene.chain_of_processes(&[21]);
    assert_eq!(processes(&steps), [21, 22]);
}

#[test]
fn a_pipe_leads_to_its_reader() {
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
fn threads_that_are_idle_in_every_sample_are_left_out() {
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
fn a_chain_follows_the_resource_with_most_of_the_waiting_time() {
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
fn without_samples_there_is_no_chain() {
    let mut scene = Scene::of(&[&[10]]);
    scene.take_samples(1, &[]);
    assert!(scene.chain(1).is_empty());
}
