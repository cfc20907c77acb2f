//! Classification of one sample of one thread.

use super::{
    super::classify::{Observation, Resource},
    scene::{Scene, local, thread},
};
use crate::{
    event::Activity,
    queue::{Kind, Reading},
    sample::{Detail, State, Wait},
};

fn is(activity: Activity, resource: Resource) -> Option<Observation> {
    Some(Observation { activity, resource })
}

fn plain(activity: Activity) -> Option<Observation> {
    is(activity, Resource::None)
}

fn file(path: &str) -> Detail {
    Detail::File {
        path: path.to_owned(),
        device: None,
    }
}

/// The observation of a thread whose service has no connections, locks or files.
fn alone(wait: Wait) -> Option<Observation> {
    Scene::of(&[&[10]]).observation(&[wait])
}

#[test]
fn a_running_thread_is_on_cpu_and_a_runnable_one_waits_for_a_cpu() {
    assert_eq!(alone(thread(10, 0).on_cpu()), plain(Activity::OnCpu));
    let runnable = thread(10, 0).state(State::Runnable);
    assert_eq!(alone(runnable), plain(Activity::RunnableOwn));
}

#[test]
fn a_stopped_thread_is_stopped_and_an_exiting_one_is_ignored() {
    let stopped = thread(10, 0).reads(3).state(State::Stopped);
    assert_eq!(alone(stopped), plain(Activity::Stopped));
    assert_eq!(alone(thread(10, 0).state(State::Dead)), None);
}

#[test]
fn a_system_call_that_waits_for_work_or_time_decides_alone() {
    let call = |number| alone(thread(10, 0).call(number, [3, 0, 0, 0]));
    assert_eq!(call(libc::SYS_accept4), plain(Activity::Idle));
    assert_eq!(call(libc::SYS_wait4), plain(Activity::Idle));
    assert_eq!(call(libc::SYS_nanosleep), plain(Activity::Asleep));
    assert_eq!(call(libc::SYS_semop), plain(Activity::Inside));
    assert_eq!(call(libc::SYS_sched_yield), plain(Activity::Unknown));
}

#[test]
fn an_unidentified_wait_is_unknown() {
    assert_eq!(alone(thread(10, 0)), plain(Activity::Unknown));
    assert_eq!(
        alone(thread(10, 0).call(100_000, [0; 4])),
        plain(Activity::Unknown)
    );
    let deep = thread(10, 0).state(State::Uninterruptible);
    assert_eq!(alone(deep), plain(Activity::Unknown));
}

#[test]
fn a_disk_wait_names_its_file() {
    let wal = Resource::File {
        path: "/db/wal".to_owned(),
        device: None,
    };
    let sync = thread(10, 0)
        .call(libc::SYS_fdatasync, [3, 0, 0, 0])
        .with(file("/db/wal"));
    assert_eq!(alone(sync.clone()), is(Activity::Disk, wal.clone()));
    assert_eq!(
        alone(sync.state(State::Uninterruptible)),
        is(Activity::Disk, wal.clone())
    );
    let cold = thread(10, 0).reads(3).with(file("/db/wal"));
    assert_eq!(
        alone(cold.state(State::Uninterruptible)),
        is(Activity::Disk, wal)
    );
    let mut page = thread(10, 0).state(State::Uninterruptible);
    page.io = true;
    assert_eq!(alone(page), plain(Activity::Disk), "a page fault");
}

#[test]
fn a_read_from_a_client_is_idle_unless_a_request_has_begun() {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(1, (10, 5), 80);
    let reads = [thread(10, 0).reads(5)];
    let client = is(Activity::Idle, Resource::Client(1));
    assert_eq!(scene.observation(&reads), client);
    scene.awaits(1).read = false;
    assert_eq!(
        scene.observation(&reads),
        is(Activity::PeerSend, Resource::Connection(1))
    );
}

#[test]
fn a_read_of_a_response_waits_for_another_service() {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(1, (10, 5), 80);
    scene.calls(2, (10, 6), local(5432));
    let reads = [thread(10, 0).reads(6)];
    assert_eq!(
        scene.observation(&reads),
        plain(Activity::Idle),
        "nothing was asked"
    );
    scene.awaits(2);
    let downstream = is(Activity::Downstream, Resource::Connection(2));
    assert_eq!(scene.observation(&reads), downstream);
}

#[test]
fn a_read_from_another_service_while_a_request_is_in_service_waits_for_that_service() {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(1, (10, 5), 80);
    scene.calls(2, (10, 6), local(5432));
    scene.awaits(1);
    let downstream = is(Activity::Downstream, Resource::Connection(2));
    assert_eq!(scene.observation(&[thread(10, 0).reads(6)]), downstream);
}

#[test]
fn a_connect_waits_for_another_service() {
    let mut scene = Scene::of(&[&[10]]);
    scene.calls(2, (10, 6), local(5432));
    let connects = thread(10, 0).call(libc::SYS_connect, [6, 0, 0, 0]);
    let downstream = is(Activity::Downstream, Resource::Connection(2));
    assert_eq!(scene.observation(&[connects]), downstream);
}

#[test]
fn an_event_loop_thread_does_what_its_process_has_in_progress() {
    let mut scene = Scene::of(&[&[10]]);
    let serves = [thread(10, 0).serves_all()];
    assert_eq!(scene.observation(&serves), plain(Activity::Idle));
    scene.accepts(1, (10, 5), 80);
    scene.calls(2, (10, 6), local(5432));
    scene.calls(3, (10, 7), local(5432));
    assert_eq!(
        scene.observation(&serves),
        plain(Activity::Idle),
        "all is answered"
    );
    scene.awaits(1);
    assert_eq!(
        scene.observation(&serves),
        is(Activity::Inside, Resource::Connection(1))
    );
    scene.awaits(2);
    scene.awaits(3).began_ns -= 1;
    let oldest = is(Activity::Downstream, Resource::Connection(3));
    assert_eq!(scene.observation(&serves), oldest);
}

#[test]
fn an_event_loop_thread_waits_for_a_client_that_does_not_read() {
    let mut scene = Scene::of(&[&[10]]);
    let client = scene.accepts(1, (10, 5), 80);
    (client.write_seq, client.snd_nxt, client.snd_wnd) = (100_000, 60_000, 60_000);
    let serves = [thread(10, 0).serves_all()];
    assert_eq!(
        scene.observation(&serves),
        is(Activity::PeerRead, Resource::Connection(1))
    );
}

#[test]
fn a_process_title_that_ends_in_waiting_is_a_row_lock() {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(1, (10, 5), 80);
    scene.awaits(1);
    scene.set_title(10, "postgres: bob shop [local] UPDATE waiting");
    let serves = [thread(10, 0).serves_all()];
    assert_eq!(
        scene.observation(&serves),
        is(Activity::Lock, Resource::RowLock)
    );
    scene.set_title(10, "postgres: bob waiting [local] UPDATE");
    assert_eq!(
        scene.observation(&serves),
        is(Activity::Inside, Resource::Connection(1))
    );
}

#[test]
fn in_poll_an_outstanding_call_takes_precedence_over_a_request() {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(1, (10, 5), 80);
    scene.calls(2, (10, 6), local(5432));
    let polls = |entries: &[(i32, i16)]| {
        [thread(10, 0)
            .call(libc::SYS_ppoll, [0; 4])
            .with(Detail::Poll(entries.to_vec()))]
    };
    assert_eq!(
        scene.observation(&polls(&[(5, 1), (-1, 1), (99, 1)])),
        plain(Activity::Idle)
    );
    scene.awaits(1).read = false;
    scene.awaits(2);
    let client = is(Activity::PeerSend, Resource::Connection(1));
    assert_eq!(scene.observation(&polls(&[(5, 1)])), client);
    let downstream = is(Activity::Downstream, Resource::Connection(2));
    assert_eq!(scene.observation(&polls(&[(5, 1), (6, 1)])), downstream);
    assert_eq!(scene.observation(&polls(&[(6, 1), (5, 1)])), downstream);
    let room = is(Activity::PeerRead, Resource::Connection(1));
    assert_eq!(
        scene.observation(&polls(&[(5, 4)])),
        room,
        "for room to write"
    );
}

#[test]
fn a_blocked_write_waits_for_its_reader() {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(1, (10, 5), 80);
    scene.pipe(77, (10, 1), 20);
    scene.unix((88, 89), (10, 2), 20);
    let mut writes = |fd| scene.observation(&[thread(10, 0).writes(fd)]);
    assert_eq!(writes(5), is(Activity::PeerRead, Resource::Connection(1)));
    assert_eq!(writes(1), is(Activity::Output, Resource::Pipe(77)));
    assert_eq!(writes(2), is(Activity::Output, Resource::Unix(88)));
    assert_eq!(writes(9), plain(Activity::Unknown));
}

#[test]
fn a_write_to_a_terminal_is_output_and_to_a_file_is_disk() {
    let writes = |path: &str| {
        let observation = alone(thread(10, 0).writes(1).with(file(path)));
        observation.unwrap().activity
    };
    assert_eq!(writes("/dev/pts/3"), Activity::Output);
    assert_eq!(writes("/dev/ttyS0"), Activity::Output);
    assert_eq!(writes("/dev/console"), Activity::Output);
    assert_eq!(writes("/var/log/shop"), Activity::Disk);
}

#[test]
fn a_contended_mutex_names_its_holder() {
    let lock = |owner| {
        is(
            Activity::Lock,
            Resource::Lock {
                tgid: 10,
                address: 0x1000,
                owner,
                interpreter: false,
            },
        )
    };
    let mut scene = Scene::of(&[&[10]]);
    let waits = thread(10, 1).locked(0x1000, 12);
    let both = [waits.clone(), thread(10, 2).on_cpu()];
    assert_eq!(scene.observation(&both), lock(Some(12)));
    assert_eq!(
        scene.observation(&[waits]),
        lock(None),
        "12 is not a thread"
    );
}

#[test]
fn a_lock_holder_is_translated_from_its_pid_namespace() {
    let mut waits = thread(10, 1).locked(0x1000, 3);
    let mut holds = thread(10, 2).on_cpu();
    (waits.own_tid, holds.own_tid) = (2, 3);
    let observation = Scene::of(&[&[10]]).observation(&[waits, holds]).unwrap();
    let Resource::Lock { owner, .. } = observation.resource else {
        panic!("{observation:?}");
    };
    assert_eq!(owner, Some(12));
}

#[test]
fn a_condition_variable_is_not_a_lock() {
    assert_eq!(
        alone(thread(10, 0).parked()),
        is(Activity::Idle, Resource::Parked)
    );
}

#[test]
fn a_timed_wait_next_to_an_interpreters_lock_is_the_lock_and_an_untimed_one_is_not() {
    let mut scene = Scene::of(&[&[10]]);
    let known = Reading {
        depth: 3,
        extra: vec![("interpreter_lock", 1.0)],
        ..Reading::default()
    };
    scene.queue(1, Kind::Lock, "0x2000 of 10", known);
    let asks = |timeout| thread(10, 1).call(libc::SYS_futex, [0x2004, 128 | 9, 7, timeout]);
    let lock = Resource::Lock {
        tgid: 10,
        address: 0x2000,
        owner: None,
        interpreter: true,
    };
    assert_eq!(scene.observation(&[asks(0x7ffc)]), is(Activity::Lock, lock));
    assert_eq!(
        scene.observation(&[asks(0)]),
        is(Activity::Idle, Resource::Parked)
    );
}

#[test]
fn a_file_lock_is_a_lock() {
    let waits = thread(10, 0).call(libc::SYS_flock, [3, 0, 0, 0]);
    assert_eq!(alone(waits), plain(Activity::Lock));
}
