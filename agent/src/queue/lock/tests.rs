use super::super::{
    Kind, Model, Reading,
    syscalls::tests::{asleep, locked, sample_waits},
    watched::{TICK, extra},
};
use crate::sample::{Detail, State, Wait};

fn read(model: &mut Model, tick: u64, waits: Vec<Wait>) -> Vec<(String, Reading)> {
    sample_waits(Kind::Lock, model, tick, waits)
}

#[test]
fn a_held_mutex_names_its_holder_and_the_holders_activity() {
    let mut model = Model::default();
    let mut last = Vec::new();
    for tick in 0..15 {
        let holder = asleep(12, libc::SYS_fsync, [3, 0, 0, 0]);
        let waits = vec![locked(13, 0x7f00, 12), locked(14, 0x7f00, 12), holder];
        last = read(&mut model, tick, waits);
    }
    let [(name, lock)] = last.as_slice() else {
        panic!("{last:?}")
    };
    assert_eq!(name, "0x7f00 of 10");
    assert_eq!((lock.depth, lock.limit), (2, Some(1)));
    assert_eq!(lock.oldest_age_ns, Some(14 * TICK));
    assert_eq!(extra(lock, "hold_ns"), Some(14.0 * TICK as f64));
    assert_eq!(
        lock.worst.as_deref(),
        Some("held by thread 12 (worker) of process 10, in fsync")
    );
}

#[test]
fn a_busy_lock_whose_waiters_take_turns_has_no_standing_delay() {
    let mut model = Model::default();
    for tick in 0..30 {
        let waits = (0..3).map(|thread| Wait {
            voluntary: tick * 50 + thread,
            ..locked(13 + thread as u32, 0x7f00, 12)
        });
        for (_, lock) in read(&mut model, tick, waits.collect()) {
            assert_eq!(lock.oldest_age_ns, Some(0), "{lock:?}");
            assert_eq!(lock.departures, (tick > 0).then_some(3));
        }
    }
}

#[test]
fn an_idle_pool_on_a_condition_variable_is_not_a_lock() {
    let mut model = Model::default();
    for tick in 0..30 {
        let pool = (0..8).map(|thread| {
            let mut wait = asleep(20 + thread, libc::SYS_futex, [0x9000, 128 | 9, 0, 0x10]);
            if let Some(syscall) = &mut wait.syscall {
                syscall.detail = Detail::Futex { word: 0, owner: 3 };
            }
            wait
        });
        assert_eq!(read(&mut model, tick, pool.collect()), []);
    }
}

#[test]
fn a_possible_counter_is_judged_only_after_behaving_like_a_lock() {
    let mut model = Model::default();
    let rust = |voluntary| {
        [13, 14].map(|tid| {
            let mut wait = locked(tid, 0x5000, 0);
            wait.voluntary = voluntary;
            if let Some(syscall) = &mut wait.syscall {
                syscall.args[1] = 128 | 9;
            }
            wait
        })
    };
    for tick in 0..20 {
        for (_, lock) in read(&mut model, tick, rust(1).to_vec()) {
            assert_eq!((lock.wait_ns, lock.oldest_age_ns), (None, None));
            assert_eq!(extra(&lock, "uncertain"), Some(1.0));
        }
    }
    read(&mut model, 20, rust(2).to_vec());
    let locks = read(&mut model, 22, rust(2).to_vec());
    assert_eq!(locks[0].1.oldest_age_ns, Some(2 * TICK));
}

#[test]
fn the_interpreter_lock_is_named_and_not_judged() {
    let mut model = Model::default();
    let mut last = Vec::new();
    for tick in 0..5 {
        let mut waits: Vec<Wait> = (0..4)
            .map(|thread| {
                let address = 0x55_5000 + u64::from(thread % 2) * 4;
                let args = [address, 128 | 9, 0, 0x7ffe];
                Wait {
                    voluntary: tick * 20,
                    cpu_ns: tick * TICK / 5,
                    ..asleep(20 + thread, libc::SYS_futex, args)
                }
            })
            .collect();
        waits.push(Wait {
            state: State::Running,
            syscall: None,
            cpu_ns: tick * TICK / 5,
            ..asleep(30, 0, [0; 4])
        });
        last = read(&mut model, tick, waits);
    }
    assert_eq!(extra(&last[0].1, "interpreter_lock"), Some(1.0));
    assert_eq!((last[0].1.depth, last[0].1.wait_ns), (4, None));
}

#[test]
fn an_idle_pool_with_timed_waits_is_not_a_lock() {
    let mut model = Model::default();
    for tick in 0..30 {
        let args = [0x55_5000, 128 | 9, 0, 0x7ffe];
        let pool = (0..8).map(|thread| Wait {
            voluntary: tick / 5,
            ..asleep(20 + thread, libc::SYS_futex, args)
        });
        assert_eq!(read(&mut model, tick, pool.collect()), []);
    }
}

#[test]
fn a_free_lock_is_reported_for_a_while_and_then_ends() {
    let mut model = Model::default();
    read(&mut model, 0, vec![locked(13, 0x7f00, 12)]);
    assert_eq!(read(&mut model, 1, vec![])[0].1.depth, 0);
    assert_eq!(read(&mut model, 60, vec![]), []);
}
