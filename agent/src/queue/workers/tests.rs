use super::super::{
    Kind, Model, Reading,
    syscalls::tests::{asleep, locked},
    watched::extra,
};
use super::pool_name;
use crate::sample::{
    Architecture, Connection, Detail, Listener, Sample, Scans, State, Syscall, Target, Thread,
    Wait, fixture::silent_connection,
};

fn connection(fd: u32, port: u16) -> Connection {
    Connection {
        cookie: u64::from(fd),
        fd,
        local: format!("10.0.0.1:{port}").parse().unwrap(),
        remote: "10.0.0.2:5432".parse().unwrap(),
        ..silent_connection()
    }
}

/// Descriptor 5 is an accepted connection, 6 an opened one.
fn read(model: &mut Model, tick: u64, waits: Vec<Wait>) -> Vec<(String, Reading)> {
    let target = Target {
        id: 1,
        tgids: vec![10, 20, 30],
        ..Target::default()
    };
    let thread = |wait: &Wait| Thread {
        tgid: wait.tgid,
        tid: wait.tid,
        runnable: false,
        on_cpu: false,
        run_delay_ns: 0,
        dispatches: 0,
        cpu_ns: 0,
    };
    let readings = model.read(&Sample {
        mono_ns: (tick + 1) * 100_000_000,
        targets: (tick == 0).then(|| vec![target]),
        scans: Scans {
            files: true,
            threads: true,
            waits: true,
            ..Scans::default()
        },
        listeners: vec![Listener {
            cookie: 1000,
            tgid: 10,
            netns: 1,
            address: "0.0.0.0:80".parse().unwrap(),
            depth: 0,
            limit: 10,
            drops: 0,
            half_open: None,
            seen_ns: 0,
            ages_ns: Vec::new(),
        }],
        connections: vec![connection(5, 80), connection(6, 40_000)],
        threads: waits.iter().map(thread).collect(),
        waits,
        ..Sample::default()
    });
    let queues = readings.queues.into_iter();
    queues
        .filter(|(key, _)| key.kind == Kind::Workers)
        .map(|(key, reading)| (key.name().to_owned(), reading))
        .collect()
}

fn named(wait: Wait, comm: &str) -> Wait {
    Wait {
        comm: comm.to_owned(),
        ..wait
    }
}

#[test]
fn names_that_differ_only_in_digits_are_one_pool() {
    assert_eq!(pool_name("worker-12"), "worker-#");
    assert_eq!(pool_name("http-8080-exec1"), "http-#-exec#");
    assert_eq!(pool_name("main"), "main");
}

#[test]
fn the_threads_of_a_pool_are_counted_by_activity() {
    let polls = |fd: i32| {
        let mut wait = asleep(18, libc::SYS_ppoll, [0; 4]);
        wait.syscall = Some(Syscall {
            architecture: Architecture::OWN,
            number: libc::SYS_ppoll as i32,
            args: [0; 4],
            detail: Detail::Poll(vec![(fd, 1)]),
        });
        wait
    };
    let running = Wait {
        state: State::Running,
        syscall: None,
        ..asleep(11, 0, [0; 4])
    };
    let disk = Wait {
        state: State::Uninterruptible,
        io: true,
        ..asleep(12, libc::SYS_fsync, [0; 4])
    };
    let waits = vec![
        running,
        disk,
        locked(13, 0x1000, 11),
        asleep(14, libc::SYS_accept4, [3, 0, 0, 0]),
        asleep(15, libc::SYS_recvfrom, [5, 0, 0, 0]),
        asleep(16, libc::SYS_recvfrom, [6, 0, 0, 0]),
        asleep(17, libc::SYS_futex, [0x2000, 128 | 9, 0, 0]),
        polls(6),
        asleep(19, libc::SYS_write, [1, 0, 0, 0]),
    ];
    let readings = read(&mut Model::default(), 0, waits);
    let [(name, pool)] = readings.as_slice() else {
        panic!("{readings:?}")
    };
    assert_eq!(name, "worker");
    assert_eq!((pool.depth, pool.limit), (6, Some(9)));
    for (key, count) in [
        ("running", 1.0),
        ("waiting_disk", 1.0),
        ("waiting_lock", 1.0),
        ("waiting_client", 1.0),
        ("waiting_downstream", 2.0),
        ("waiting_other", 1.0),
        ("idle", 2.0),
        ("parked", 1.0),
    ] {
        assert_eq!(extra(pool, key), Some(count), "{key}");
    }
    assert_eq!(extra(pool, "at_least"), None);
}

#[test]
fn without_known_calls_only_certainly_busy_threads_count() {
    let blind = |tid, state| Wait {
        state,
        syscall: None,
        ..asleep(tid, 0, [0; 4])
    };
    let waits = vec![
        blind(11, State::Sleeping),
        blind(12, State::Sleeping),
        blind(13, State::Running),
    ];
    let readings = read(&mut Model::default(), 0, waits);
    assert_eq!(readings[0].1.depth, 1);
    assert_eq!(extra(&readings[0].1, "unknown"), Some(2.0));
    assert_eq!(extra(&readings[0].1, "at_least"), Some(1.0));
}

#[test]
fn event_loops_are_not_a_pool_but_single_threaded_processes_are() {
    let waiting = |tgid, tid| Wait {
        tgid,
        ..asleep(tid, libc::SYS_epoll_pwait, [4, 0, 0, 0])
    };
    let (mut loops, mut prefork) = (Model::default(), Model::default());
    for tick in 0..6 {
        let pools = read(&mut loops, tick, vec![waiting(10, 11), waiting(10, 12)]);
        assert_eq!(pools.is_empty(), tick >= 2, "{pools:?}");
        let pools = read(&mut prefork, tick, vec![waiting(20, 20), waiting(30, 30)]);
        assert_eq!((pools[0].1.depth, pools[0].1.limit), (0, Some(2)));
    }
}

#[test]
fn one_thread_among_others_is_not_a_pool_but_a_single_threaded_server_is() {
    let main = || named(asleep(10, libc::SYS_accept4, [3, 0, 0, 0]), "main");
    let others = [11, 12].map(|tid| asleep(tid, libc::SYS_futex, [0x10, 128, 0, 0]));
    let waits = std::iter::once(main()).chain(others).collect();
    let names: Vec<String> = read(&mut Model::default(), 0, waits)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names, ["worker"]);
    let alone = read(&mut Model::default(), 0, vec![main()]);
    assert_eq!((alone[0].0.as_str(), alone[0].1.depth), ("main", 0));
}
