use super::super::{Kind, Model, Reading, syscalls::tests::asleep, watched::TICK};
use crate::sample::{
    Connection, Epoll, Listener, Network, Sample, Scans, State, Target, Wait,
    fixture::silent_connection,
};

fn connection(cookie: u64, copied_seq: u32) -> Connection {
    Connection {
        cookie,
        fd: 5 + cookie as u32,
        rcv_nxt: copied_seq,
        copied_seq,
        ..silent_connection()
    }
}

/// One sample of a loop with `connections` connections, of which `moved` are read between samples.
fn sample(model: &mut Model, tick: u64, wait: Wait, connections: (u64, u64)) -> Option<Reading> {
    sample_with_ready(model, tick, wait, connections, Vec::new())
}

fn sample_with_ready(
    model: &mut Model,
    tick: u64,
    wait: Wait,
    connections: (u64, u64),
    epolls: Vec<Epoll>,
) -> Option<Reading> {
    sample_with(model, tick, wait, connections, (epolls, Vec::new()))
}

fn sample_with(
    model: &mut Model,
    tick: u64,
    wait: Wait,
    (connections, moved): (u64, u64),
    (epolls, networks): (Vec<Epoll>, Vec<Network>),
) -> Option<Reading> {
    let target = Target {
        id: 1,
        tgids: vec![10],
        ..Target::default()
    };
    let at = |cookie| if cookie < moved { tick as u32 } else { 0 };
    let readings = model.read(&Sample {
        mono_ns: (tick + 1) * TICK,
        targets: (tick == 0).then(|| vec![target]),
        scans: Scans {
            waits: true,
            files: true,
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
        connections: (0..connections)
            .map(|cookie| connection(cookie, at(cookie)))
            .collect(),
        waits: vec![wait],
        epolls,
        networks,
        ..Sample::default()
    });
    let mut queues = readings.queues.into_iter();
    queues
        .find(|(key, _)| key.kind == Kind::Eventloop)
        .map(|(key, reading)| {
            assert_eq!(key.name(), "worker/11");
            reading
        })
}

fn idle(voluntary: u64, cpu_ns: u64) -> Wait {
    Wait {
        voluntary,
        cpu_ns,
        ..asleep(11, libc::SYS_epoll_pwait, [4, 0, 0, 0])
    }
}

fn computing(voluntary: u64, cpu_ns: u64) -> Wait {
    Wait {
        state: State::Running,
        syscall: None,
        ..idle(voluntary, cpu_ns)
    }
}

/// A loop that is recognized, and then computes without sleeping.
fn never_sleeping(tick: u64) -> Wait {
    if tick < 4 {
        idle(tick, 0)
    } else {
        computing(4, tick * TICK)
    }
}

fn delay(reading: &Reading) -> u64 {
    reading.wait_ns.max(reading.oldest_age_ns).unwrap_or(0)
}

#[test]
fn a_loop_is_recognized_after_a_few_samples_and_an_idle_one_has_no_wait() {
    let mut model = Model::default();
    for tick in 0..20 {
        let reading = sample(&mut model, tick, idle(tick, tick * 1000), (20, 0));
        assert_eq!(reading.is_some(), tick >= 2);
        if let Some(reading) = reading {
            assert_eq!((reading.depth, delay(&reading)), (0, 0));
        }
    }
}

#[test]
fn a_healthy_loop_at_80_percent_is_not_saturated() {
    let mut model = Model::default();
    for tick in 0..60 {
        // 16 requests of 5 ms each per tick, in a few busy periods.
        let (voluntary, cpu) = (tick * 3, tick * TICK * 8 / 10);
        let wait = if tick % 5 < 2 {
            idle(voluntary, cpu)
        } else {
            computing(voluntary, cpu)
        };
        if let Some(reading) = sample(&mut model, tick, wait, (50, 16)) {
            assert_eq!(delay(&reading), 0, "{tick}: {reading:?}");
        }
    }
}

#[test]
fn a_loop_that_never_sleeps_but_serves_is_not_saturated() {
    let mut model = Model::default();
    for tick in 0..60 {
        let wait = never_sleeping(tick);
        if let Some(reading) = sample(&mut model, tick, wait, (50, 20)) {
            assert_eq!(delay(&reading), 0, "{tick}: {reading:?}");
        }
    }
}

#[test]
fn connections_that_come_and_go_between_two_scans_are_turns() {
    // Whether or not listeners that are not watched share the counter.
    for others in [0, 1] {
        let mut model = Model::default();
        for tick in 0..60 {
            let wait = never_sleeping(tick);
            let network = Network {
                netns: 1,
                others,
                passive_opens: 40 * tick,
                ..Network::default()
            };
            // One connection is open at each scan and read; the others took 2.5 ms each.
            let reading = sample_with(&mut model, tick, wait, (2, 1), (Vec::new(), vec![network]));
            if let Some(reading) = reading.filter(|_| tick > 6) {
                assert_eq!(delay(&reading), 0, "{others}, {tick}: {reading:?}");
            }
        }
    }
}

#[test]
fn a_turn_that_computes_without_progress_ages() {
    let mut model = Model::default();
    let mut last = None;
    for tick in 0..40 {
        let wait = if tick < 8 {
            idle(tick, 0)
        } else {
            computing(8, tick * TICK)
        };
        last = sample(&mut model, tick, wait, (50, if tick < 8 { 5 } else { 0 }));
    }
    let last = last.unwrap();
    assert_eq!(last.depth, 1);
    assert!(last.oldest_age_ns >= Some(30 * TICK), "{last:?}");
    assert_eq!(last.worst.as_deref(), Some("in a turn, running"));
}

#[test]
fn a_turn_is_no_older_than_what_it_has_computed() {
    let mut model = Model::default();
    for tick in 0..8 {
        sample(&mut model, tick, idle(tick, 0), (50, 5));
    }
    // It woke up just before the sample.
    let last = sample(&mut model, 8, computing(7, 1_000_000), (50, 0)).unwrap();
    assert!(last.oldest_age_ns <= Some(1_000_000), "{last:?}");
    let last = sample(&mut model, 9, computing(7, 1_000_000 + TICK), (50, 0)).unwrap();
    assert!(last.oldest_age_ns >= Some(TICK), "{last:?}");
}

#[test]
fn a_loop_that_repeatedly_sleeps_in_its_handler_has_long_turns() {
    let mut model = Model::default();
    let mut last = None;
    for tick in 0..40 {
        // Turns of 300 ms, each followed by a short epoll_wait that no sample sees.
        let wait = if tick < 4 {
            idle(tick, 0)
        } else {
            Wait {
                voluntary: 4 + tick / 3 * 2,
                ..asleep(11, libc::SYS_clock_nanosleep, [0; 4])
            }
        };
        last = sample(&mut model, tick, wait, (50, u64::from(tick % 3 == 0)));
    }
    let last = last.unwrap();
    assert!(delay(&last) >= 50_000_000, "{last:?}");
    assert_eq!(last.worst.as_deref(), Some("in a turn, in clock_nanosleep"));
}

#[test]
fn a_worker_with_one_connection_at_a_time_delays_nobody() {
    let mut model = Model::default();
    for tick in 0..40 {
        let wait = never_sleeping(tick);
        if let Some(reading) = sample(&mut model, tick, wait, (1, 0)) {
            assert_eq!((reading.wait_ns, reading.oldest_age_ns), (None, None));
        }
    }
}

#[test]
fn a_thread_that_parks_after_polling_is_not_a_blocked_loop() {
    let mut model = Model::default();
    let mut last = None;
    for tick in 0..40 {
        let wait = if tick < 10 {
            idle(tick, 0)
        } else {
            asleep(11, libc::SYS_futex, [0xc000, 128, 0, 0])
        };
        last = sample(&mut model, tick, wait, (50, 5));
        if let Some(reading) = &last {
            assert_eq!(delay(reading), 0, "{reading:?}");
        }
    }
    assert!(last.is_none());
}

#[test]
fn the_depth_of_a_turn_is_the_number_of_ready_files_of_its_own_epoll_instance() {
    let epoll = |fd, ready| Epoll {
        tgid: 10,
        fd,
        ready,
        more: false,
    };
    let mut model = Model::default();
    for tick in 0..20 {
        sample(&mut model, tick, idle(tick, tick * 1000), (20, 0));
    }
    for (tick, epolls, depth) in [
        (20, vec![epoll(4, 12), epoll(9, 50)], 12),
        (21, vec![epoll(4, 0)], 1),
        (22, Vec::new(), 1),
    ] {
        let wait = computing(20, 20_000);
        let reading = sample_with_ready(&mut model, tick, wait, (20, 0), epolls);
        assert_eq!(reading.unwrap().depth, depth, "{tick}");
    }
    let reading = sample_with_ready(&mut model, 23, idle(21, 0), (20, 0), vec![epoll(4, 3)]);
    assert_eq!(reading.unwrap().depth, 0, "they wake it");
}
