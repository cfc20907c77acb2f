//! Locks: futexes that threads wait for while another thread holds them.
//!
//! Most futexes are no locks: condition variables, semaphores and parked threads of an idle pool wait in futex, too.
//! What tells a lock is its value ([`Futex`]). A waiter that has not been woken since an earlier look (its voluntary
//! switches stand) has waited all the time.

use std::collections::{BTreeMap, HashMap};

use super::{
    Kind, Reading, Sink, Source, Targets,
    syscalls::{Futex, Lock, doing},
};
use crate::sample::{Sample, State, TargetId, Wait};

/// A lock that nobody waits for is shown for so long after: a busy one is free at every other look.
const KEEP_NS: u64 = 5_000_000_000;
/// Locks remembered at most.
const MAX_LOCKS: usize = 4096;
/// A waiter that is woken so often keeps asking: one for the interpreter lock of CPython gives up every 5 ms. Per second.
const ASKING_PER_S: u64 = 50;
/// Of one CPU, what threads use together that cannot run in parallel: at least and at most, over at least so long.
const ONE_CPU: (f64, f64) = (0.5, 1.2);
const PACE_NS: u64 = 50_000_000;
/// Both halves of a condition variable lie in one such block: its waiters change from one to the other.
const CONDITION_BLOCK: u64 = 8;

#[derive(Default)]
pub(super) struct Locks {
    /// By process and address.
    locks: BTreeMap<(u32, u64), Known>,
    /// By process and thread.
    waiters: HashMap<(u32, u32), Waiter>,
    /// By process.
    paces: HashMap<u32, Pace>,
    seen_ns: Option<u64>,
}

/// CPU time that all threads of a process used.
#[derive(Clone, Copy)]
struct Pace {
    since_ns: u64,
    cpu_ns: u64,
    /// As much as one CPU has.
    one_cpu: bool,
}

/// What is remembered of one lock.
struct Known {
    target: TargetId,
    /// When it last had a waiter.
    used_ns: u64,
    waiters: u64,
    owner: Option<u32>,
    /// Since when that owner was seen, and no waiter has left.
    held_since_ns: u64,
    /// A value that a counter may have, too, has proved to be a lock's.
    proven: bool,
}

/// What is remembered of one waiting thread.
#[derive(Clone, Copy)]
struct Waiter {
    address: u64,
    voluntary: u64,
    since_ns: u64,
}

/// One address in one look.
#[derive(Default)]
struct Look<'a> {
    waiters: u64,
    /// Waiters that waited here at the last look, and have not been woken since.
    stayed: u64,
    oldest_ns: u64,
    oldest: Option<&'a Wait>,
    owner: Option<u32>,
    certain: bool,
    proven: bool,
    /// Waiters that keep asking.
    asking: u64,
}

/// The threads of one process at one look.
#[derive(Default)]
struct Process<'a> {
    by_own_tid: HashMap<u32, &'a Wait>,
    running: u64,
    cpu_ns: u64,
    one_cpu: bool,
}

impl Source for Locks {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.walks.waits {
            return;
        }
        let now_ns = sample.mono_ns;
        let elapsed_ns = self.seen_ns.map(|before| now_ns.saturating_sub(before));
        self.seen_ns = Some(now_ns);
        let mut processes = processes(sample);
        self.pace(&mut processes, now_ns);
        let looks = self.look(sample, &processes, elapsed_ns);
        self.locks
            .retain(|_, known| now_ns.saturating_sub(known.used_ns) < KEEP_NS);
        for ((tgid, address), look) in &looks {
            let Some(process) = processes.get(tgid) else {
                continue;
            };
            let interpreter = look.is_interpreter(process);
            let known = self.locks.get(&(*tgid, *address));
            let is_new = known.is_none();
            let proven = look.proven || known.is_some_and(|known| known.proven);
            let may_be_one = look.oldest.is_some() && look.waiters > 1;
            let shown = look.certain || proven || interpreter || may_be_one;
            let Some(target) = targets.of(*tgid).filter(|_| shown) else {
                continue;
            };
            if is_new && self.locks.len() >= MAX_LOCKS {
                sink.out.beyond_bound += 1;
                continue;
            }
            let known = self
                .locks
                .entry((*tgid, *address))
                .or_insert_with(|| Known::first(target, now_ns));
            known.proven |= look.proven;
            let (left, hold_ns) = known.after(look, now_ns);
            let mut reading = look.reading(known, left, elapsed_ns.filter(|_| !is_new));
            let holder = look.owner.and_then(|owner| process.by_own_tid.get(&owner));
            reading.worst = look.worst(holder.copied(), *tgid);
            if look.owner.is_some() {
                reading.extra.push(("hold_ns", hold_ns as f64));
            }
            if interpreter {
                reading.extra.push(("interpreter_lock", 1.0));
            }
            sink.put(target, Kind::Lock, &name(*tgid, *address), reading);
        }
        for ((tgid, address), known) in &mut self.locks {
            if !looks.contains_key(&(*tgid, *address)) && targets.get(known.target).is_some() {
                let left = std::mem::take(&mut known.waiters);
                known.owner = None;
                sink.put(
                    known.target,
                    Kind::Lock,
                    &name(*tgid, *address),
                    free(left, elapsed_ns),
                );
            }
        }
        sink.forget_unseen(Kind::Lock);
    }
}

fn name(tgid: u32, address: u64) -> String {
    format!("{address:#x} of {tgid}")
}

fn processes(sample: &Sample) -> HashMap<u32, Process<'_>> {
    let mut processes: HashMap<u32, Process<'_>> = HashMap::new();
    for wait in &sample.waits {
        let process = processes.entry(wait.tgid).or_default();
        process.by_own_tid.insert(wait.own_tid, wait);
        process.cpu_ns = process.cpu_ns.saturating_add(wait.cpu_ns);
        process.running += u64::from(matches!(wait.state, State::Running | State::Runnable));
    }
    processes
}

impl Locks {
    fn pace(&mut self, processes: &mut HashMap<u32, Process<'_>>, now_ns: u64) {
        let mut paces = HashMap::with_capacity(processes.len());
        for (tgid, process) in processes {
            let mut pace = self.paces.get(tgid).copied().unwrap_or(Pace {
                since_ns: now_ns,
                cpu_ns: process.cpu_ns,
                one_cpu: false,
            });
            let elapsed_ns = now_ns.saturating_sub(pace.since_ns);
            if elapsed_ns >= PACE_NS {
                let used = process.cpu_ns.saturating_sub(pace.cpu_ns) as f64 / elapsed_ns as f64;
                pace = Pace {
                    since_ns: now_ns,
                    cpu_ns: process.cpu_ns,
                    one_cpu: used >= ONE_CPU.0 && used <= ONE_CPU.1,
                };
            }
            process.one_cpu = pace.one_cpu;
            paces.insert(*tgid, pace);
        }
        self.paces = paces;
    }

    /// All addresses that may be locks.
    fn look<'a>(
        &mut self,
        sample: &'a Sample,
        processes: &HashMap<u32, Process<'_>>,
        elapsed_ns: Option<u64>,
    ) -> BTreeMap<(u32, u64), Look<'a>> {
        let now_ns = sample.mono_ns;
        let mut looks: BTreeMap<(u32, u64), Look<'_>> = BTreeMap::new();
        let mut waiters = HashMap::new();
        for wait in &sample.waits {
            let is_thread = |tid: u32| {
                processes
                    .get(&wait.tgid)
                    .is_some_and(|process| process.by_own_tid.contains_key(&tid))
            };
            let Some(futex) = Futex::of(wait, is_thread) else {
                continue;
            };
            if futex.lock == Lock::No && !futex.timed {
                continue;
            }
            let address = match futex.lock {
                Lock::No => futex.address - futex.address % CONDITION_BLOCK,
                _ => futex.address,
            };
            let before = self
                .waiters
                .get(&(wait.tgid, wait.tid))
                .filter(|before| before.address == address);
            let stayed = before.filter(|before| before.voluntary == wait.voluntary);
            let since_ns = stayed.map_or(now_ns, |before| before.since_ns);
            waiters.insert(
                (wait.tgid, wait.tid),
                Waiter {
                    address,
                    voluntary: wait.voluntary,
                    since_ns,
                },
            );
            let look = looks.entry((wait.tgid, address)).or_default();
            let asks = before.is_some_and(|before| before.asks(wait, elapsed_ns));
            look.asking += u64::from(futex.timed && asks);
            match futex.lock {
                Lock::No => {
                    look.waiters += 1;
                    continue;
                }
                // A counter moves on when it wakes somebody; a lock's value is what it was.
                Lock::Maybe => look.proven |= before.is_some() && stayed.is_none() && !futex.timed,
                Lock::Yes { owner } => {
                    look.certain = true;
                    look.owner = look.owner.or(owner);
                }
            }
            look.waiters += 1;
            look.stayed += u64::from(stayed.is_some());
            let age_ns = now_ns.saturating_sub(since_ns);
            if look.oldest.is_none() || age_ns > look.oldest_ns {
                look.oldest = Some(wait);
                look.oldest_ns = age_ns;
            }
        }
        self.waiters = waiters;
        // Timed waits that are no lock's are of interest only where they look like the interpreter lock.
        looks.retain(|_, look| look.oldest.is_some() || look.asking > 0);
        looks
    }
}

impl Waiter {
    /// It has been woken again and again since the last look.
    fn asks(&self, wait: &Wait, elapsed_ns: Option<u64>) -> bool {
        let enough = elapsed_ns.map_or(u64::MAX, |elapsed| {
            (elapsed / (1_000_000_000 / ASKING_PER_S)).max(1)
        });
        wait.voluntary.saturating_sub(self.voluntary) >= enough
    }
}

impl Known {
    fn first(target: TargetId, now_ns: u64) -> Self {
        Self {
            target,
            used_ns: now_ns,
            waiters: 0,
            owner: None,
            held_since_ns: now_ns,
            proven: false,
        }
    }

    /// Takes in one look; answers how many waiters have left since the last one (at least), and how long the owner has
    /// held it (at least).
    fn after(&mut self, look: &Look<'_>, now_ns: u64) -> (u64, u64) {
        let left = self.waiters.saturating_sub(look.stayed);
        if self.owner != look.owner || left > 0 {
            self.held_since_ns = now_ns;
        }
        self.owner = look.owner;
        self.waiters = look.waiters;
        self.used_ns = now_ns;
        (left, now_ns.saturating_sub(self.held_since_ns))
    }
}

impl Look<'_> {
    /// Threads of an interpreter that keep asking for the one lock that lets them run, while one does (two, where the look
    /// falls between them): together they get no further than one CPU.
    fn is_interpreter(&self, process: &Process<'_>) -> bool {
        let one_runs = process.one_cpu && matches!(process.running, 1 | 2);
        self.oldest.is_none() && self.asking > 0 && one_runs
    }

    fn reading(&self, known: &Known, left: u64, elapsed_ns: Option<u64>) -> Reading {
        // What may be a counter, and what gives up and asks again, shows who waits, and is not judged.
        let is_lock = self.certain || known.proven;
        let arrived = self.waiters.saturating_sub(self.stayed);
        let age_ns = is_lock.then_some(self.oldest_ns);
        let mut extra = Vec::new();
        if !is_lock {
            extra.push(("uncertain", 1.0));
        }
        Reading {
            depth: self.waiters,
            limit: Some(1),
            arrivals: elapsed_ns.map(|_| arrived),
            departures: elapsed_ns.map(|_| left),
            elapsed_ns,
            served: elapsed_ns.map(|_| left),
            servers: 1,
            wait_ns: age_ns,
            oldest_ns: age_ns,
            extra,
            ..Reading::default()
        }
    }

    /// The holder and what it does; else the thread that has waited longest.
    fn worst(&self, holder: Option<&Wait>, tgid: u32) -> Option<String> {
        match (holder, self.owner, self.oldest) {
            (Some(holder), ..) => Some(format!(
                "thread {} ({}) of process {tgid} holds it, itself {}",
                holder.tid,
                holder.comm,
                doing(holder)
            )),
            (None, Some(owner), _) => Some(format!("thread {owner} of process {tgid} holds it")),
            (None, None, Some(oldest)) => Some(format!(
                "thread {} ({}) of process {tgid} waits",
                oldest.tid, oldest.comm
            )),
            (None, None, None) => None,
        }
    }
}

/// A lock that nobody waits for at this look.
fn free(left: u64, elapsed_ns: Option<u64>) -> Reading {
    Reading {
        depth: 0,
        limit: Some(1),
        arrivals: elapsed_ns.map(|_| 0),
        departures: elapsed_ns.map(|_| left),
        elapsed_ns,
        served: elapsed_ns.map(|_| left),
        servers: 1,
        wait_ns: Some(0),
        ..Reading::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Kind, Model, Reading,
        syscalls::tests::{asleep, locked},
    };
    use crate::sample::{Detail, Sample, State, Target, Wait, Walks};

    const TICK: u64 = 100_000_000;

    fn read(model: &mut Model, tick: u64, waits: Vec<Wait>) -> Vec<(String, Reading)> {
        let target = Target {
            id: 1,
            tgids: vec![10],
            ..Target::default()
        };
        let readings = model.read(&Sample {
            mono_ns: (tick + 1) * TICK,
            targets: (tick == 0).then(|| vec![target]),
            walks: Walks {
                waits: true,
                ..Walks::default()
            },
            waits,
            ..Sample::default()
        });
        let locks = readings.queues.into_iter();
        locks
            .filter(|(key, _)| key.kind == Kind::Lock)
            .map(|(key, reading)| (key.name.clone(), reading))
            .collect()
    }

    fn extra(reading: &Reading, key: &str) -> Option<f64> {
        reading
            .extra
            .iter()
            .find(|(name, _)| *name == key)
            .map(|(_, value)| *value)
    }

    #[test]
    fn a_held_mutex_names_its_holder_and_what_that_does() {
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
        assert_eq!(lock.oldest_ns, Some(14 * TICK));
        assert_eq!(extra(lock, "hold_ns"), Some(14.0 * TICK as f64));
        assert_eq!(
            lock.worst.as_deref(),
            Some("thread 12 (worker) of process 10 holds it, itself in fsync")
        );
    }

    #[test]
    fn a_busy_lock_whose_waiters_take_turns_does_not_stand() {
        let mut model = Model::default();
        for tick in 0..30 {
            let waits = (0..3).map(|thread| Wait {
                voluntary: tick * 50 + thread,
                ..locked(13 + thread as u32, 0x7f00, 12)
            });
            for (_, lock) in read(&mut model, tick, waits.collect()) {
                assert_eq!(lock.oldest_ns, Some(0), "{lock:?}");
                assert_eq!(lock.departures, (tick > 0).then_some(3));
            }
        }
    }

    #[test]
    fn an_idle_pool_on_a_condition_variable_is_no_lock() {
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
    fn what_may_be_a_counter_is_judged_only_when_it_has_proved_to_be_a_lock() {
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
                assert_eq!((lock.wait_ns, lock.oldest_ns), (None, None));
                assert_eq!(extra(&lock, "uncertain"), Some(1.0));
            }
        }
        read(&mut model, 20, rust(2).to_vec());
        let locks = read(&mut model, 22, rust(2).to_vec());
        assert_eq!(locks[0].1.oldest_ns, Some(2 * TICK));
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
    fn an_idle_pool_that_looks_at_the_clock_now_and_then_is_no_lock() {
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
    fn a_free_lock_is_shown_empty_for_a_while_and_then_gone() {
        let mut model = Model::default();
        read(&mut model, 0, vec![locked(13, 0x7f00, 12)]);
        assert_eq!(read(&mut model, 1, vec![])[0].1.depth, 0);
        assert_eq!(read(&mut model, 60, vec![]), []);
    }
}
