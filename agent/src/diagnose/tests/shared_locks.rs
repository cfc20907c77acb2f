//! Verdicts on locks that processes share: on files, and in shared memory.

use super::{
    scene::{Scene, filling, thread},
    verdicts::culprit,
};
use crate::{
    cause::Cause,
    event::{Activity, Confidence, CulpritKind, Verdict},
    sample::{Detail, LockHolder, LockWait, SharedLock, State, Wait},
};

/// The verdict on one service whose processes are these, after 60 samples.
fn judged(tgids: &[u32], waits: &[LockWait], threads: &[Wait]) -> Verdict {
    let mut scene = Scene::of(&[tgids]);
    scene.sample().lock_waits = Some(waits.to_vec());
    scene.take_samples(60, threads);
    scene.verdict(&filling())
}

/// A wait of the first thread of a process for a lock on a file that another process holds.
fn file_lock(tgid: u32, holder: LockHolder, polled: bool) -> LockWait {
    LockWait {
        tgid,
        tid: tgid,
        voluntary: 1,
        id: 99,
        lock: SharedLock::File {
            path: Some("/var/lib/sessions/a1".to_owned()),
            polled,
        },
        holder,
        holder_name: "holder".to_owned(),
    }
}

fn locks_a_file(tgid: u32) -> Wait {
    thread(tgid, 0).call(libc::SYS_flock, [5, 2, 0, 0])
}

#[test]
fn a_lock_on_a_file_leads_to_what_its_holder_waits_for() {
    let mut scene = Scene::of(&[&[10, 11, 12, 13]]);
    scene.calls(1, (13, 5), "10.0.0.9:5432".parse().unwrap());
    scene.awaits(1);
    let waits = [10, 11, 12].map(|tgid| file_lock(tgid, LockHolder::Process(13), false));
    scene.sample().lock_waits = Some(waits.to_vec());
    let mut threads = [10, 11, 12].map(locks_a_file).to_vec();
    threads.push(thread(13, 0).call(libc::SYS_poll, [0x1000, 1, 1_000, 0]));
    let call = Detail::Poll(vec![(5, 1)]);
    threads[3] = threads[3].clone().with(call);
    scene.take_samples(60, &threads);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
    assert_eq!(culprit(&verdict).2, "10.0.0.9:5432");
    threads[3] = thread(13, 0).on_cpu();
    let verdict = judged(&[10, 11, 12, 13], &waits, &threads);
    assert_eq!(verdict.cause, Cause::LockContention);
    assert_eq!(culprit(&verdict).1, Some(13));
    threads[3] = thread(13, 0).state(State::Stopped);
    let verdict = judged(&[10, 11, 12, 13], &waits, &threads);
    assert_eq!(verdict.cause, Cause::ConsumerStalled);
    assert_eq!(culprit(&verdict).1, Some(13));
}

#[test]
fn the_holder_of_a_file_lock_need_not_be_sampled() {
    let waits = [10, 11].map(|tgid| file_lock(tgid, LockHolder::Process(77), false));
    let verdict = judged(&[10, 11], &waits, &[10, 11].map(locks_a_file));
    assert_eq!(verdict.cause, Cause::LockContention);
    assert_eq!(
        culprit(&verdict),
        (CulpritKind::Process, Some(77), "holder (77)")
    );
}

#[test]
fn a_file_lock_without_a_known_holder_has_no_culprit_and_is_not_sure() {
    let mut scene = Scene::of(&[&[10, 11]]);
    scene.take_samples(60, &[10, 11].map(locks_a_file));
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::LockContention);
    assert_eq!(
        (verdict.culprit, verdict.confidence),
        (None, Confidence::Medium)
    );
}

#[test]
fn processes_that_hold_a_file_lock_in_turn_are_not_a_deadlock() {
    let mut scene = Scene::of(&[&[10, 11, 12]]);
    for round in 0..60 {
        let holder = 10 + round % 3;
        let waiting = [10, 11, 12].into_iter().filter(|tgid| *tgid != holder);
        let waits = waiting.map(|tgid| file_lock(tgid, LockHolder::Process(holder), false));
        scene.sample().lock_waits = Some(waits.collect());
        let threads = [10, 11, 12].map(|tgid| {
            if tgid == holder {
                thread(tgid, 0).on_cpu()
            } else {
                locks_a_file(tgid)
            }
        });
        scene.take_samples(1, &threads);
    }
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::LockContention);
}

#[test]
fn a_thread_that_has_been_woken_does_not_wait_for_the_holder_seen_before() {
    let waits = [file_lock(10, LockHolder::Process(11), false)];
    let mut woken = locks_a_file(10);
    woken.voluntary = 2;
    let verdict = judged(&[10, 11], &waits, &[woken, thread(11, 0).on_cpu()]);
    assert_ne!(verdict.culprit.and_then(|culprit| culprit.pid), Some(11));
}

#[test]
fn a_thread_that_sleeps_between_attempts_waits_for_the_lock() {
    let mut scene = Scene::of(&[&[10, 11], &[20]]);
    let waits = [10, 11].map(|tgid| file_lock(tgid, LockHolder::Process(20), true));
    scene.sample().lock_waits = Some(waits.to_vec());
    let asleep = |tgid| thread(tgid, 0).call(libc::SYS_clock_nanosleep, [0; 4]);
    scene.take_samples(60, &[asleep(10), asleep(11), thread(20, 0).on_cpu()]);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::LockContention);
    assert_eq!(
        (culprit(&verdict).1, verdict.confidence),
        (Some(20), Confidence::Medium)
    );
}

/// Waits for a mutex in shared memory that this thread holds.
fn locks_shared_memory_of(tgid: u32, owner: u32) -> Wait {
    let word = 0x8000_0000 | owner;
    thread(tgid, 0)
        .call(libc::SYS_futex, [0x1000, 0, u64::from(word), 0])
        .with(Detail::Futex { word, owner: 0 })
}

fn locks_shared_memory(tgid: u32) -> Wait {
    locks_shared_memory_of(tgid, 13)
}

fn shared_mutex(tgid: u32, holder: LockHolder) -> LockWait {
    LockWait {
        lock: SharedLock::Memory { address: 0x1000 },
        ..file_lock(tgid, holder, false)
    }
}

#[test]
fn a_shared_mutex_leads_to_the_process_that_holds_it() {
    let holder = LockHolder::Thread { tgid: 13, tid: 13 };
    let waits = [10, 11, 12].map(|tgid| shared_mutex(tgid, holder));
    let mut threads = [10, 11, 12].map(locks_shared_memory).to_vec();
    threads.push(thread(13, 0).state(State::Stopped));
    let verdict = judged(&[10, 11, 12, 13], &waits, &threads);
    assert_eq!(verdict.cause, Cause::ConsumerStalled);
    assert_eq!(culprit(&verdict).1, Some(13));
}

#[test]
fn workers_that_take_turns_at_accepting_are_idle() {
    let holder = LockHolder::Thread { tgid: 13, tid: 13 };
    let waits = [10, 11, 12].map(|tgid| shared_mutex(tgid, holder));
    let mut threads = [10, 11, 12].map(locks_shared_memory).to_vec();
    threads.push(thread(13, 0).call(libc::SYS_accept4, [3, 0, 0, 0]));
    let verdict = judged(&[10, 11, 12, 13], &waits, &threads);
    assert_eq!(verdict.shares, [(Activity::Idle, 1.0)]);
}

#[test]
fn a_shared_mutex_that_has_changed_hands_leads_to_its_present_holder_or_nobody() {
    let before = LockHolder::Thread { tgid: 13, tid: 13 };
    let waits = [10, 11, 12].map(|tgid| shared_mutex(tgid, before));
    let threads = [
        locks_shared_memory_of(10, 11),
        locks_shared_memory_of(12, 11),
        thread(11, 0).on_cpu(),
        thread(13, 0).state(State::Stopped),
    ];
    let verdict = judged(&[10, 11, 12, 13], &waits, &threads);
    assert_eq!(culprit(&verdict).1, Some(11));
    let threads = [
        locks_shared_memory_of(10, 77),
        locks_shared_memory_of(11, 77),
    ];
    let verdict = judged(&[10, 11, 12, 13], &waits, &threads);
    assert_eq!(culprit(&verdict).0, CulpritKind::Lock);
    assert_eq!(verdict.confidence, Confidence::Medium);
}

#[test]
fn a_shared_mutex_whose_holder_has_exited_is_never_released() {
    let waits = [10, 11].map(|tgid| shared_mutex(tgid, LockHolder::Exited(4_711)));
    let threads = [10, 11].map(|tgid| locks_shared_memory_of(tgid, 4_711));
    let verdict = judged(&[10, 11], &waits, &threads);
    assert_eq!(
        (verdict.cause, verdict.confidence),
        (Cause::ConsumerStalled, Confidence::Medium)
    );
    assert!(
        verdict.evidence.contains("thread 4711"),
        "{}",
        verdict.evidence
    );
}
