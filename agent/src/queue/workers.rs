//! Groups of like threads: how many there are, and how many are busy, with what.
//!
//! Threads are alike when their names differ in digits alone. A worker is idle where it waits for work: in accept, in
//! epoll_wait, on a condition variable. A thread of an event loop is no worker: it serves many at once.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{
    Kind, Reading, Sink, Source, Targets,
    eventloop::Residence,
    syscalls::{Does, Futex, Lock, call_of, descriptor},
};
use crate::sample::{Detail, Sample, State, Syscall, TargetId, Wait};

#[derive(Default)]
pub(super) struct Workers {
    threads: HashMap<(u32, u32), Residence>,
    roles: HashMap<(u32, u32), Role>,
}

/// Who began a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Accepted,
    Opened,
}

/// What a worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Running,
    Runnable,
    /// It waits for work.
    Idle,
    /// It waits for work, or for a result that another thread makes: on a futex of its own nobody can tell.
    Parked,
    /// It reads from a connection that it serves: the client has it, and does not need it now.
    Client,
    Downstream,
    Lock,
    Disk,
    Other,
    /// The kernel does not say.
    Unknown,
}

/// One group in one look.
#[derive(Default)]
struct Group {
    size: u64,
    running: u64,
    runnable: u64,
    idle: u64,
    parked: u64,
    client: u64,
    downstream: u64,
    lock: u64,
    disk: u64,
    other: u64,
    unknown: u64,
    /// Members that live in epoll_wait, and those that are their process's only thread.
    loops: u64,
    alone: u64,
}

impl Source for Workers {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if sample.walks.files {
            self.learn_roles(sample, targets);
        }
        if !sample.walks.waits {
            return;
        }
        let looks = Looks::of(sample);
        let mut groups: BTreeMap<(TargetId, String), Group> = BTreeMap::new();
        let mut threads = HashMap::with_capacity(sample.waits.len());
        for wait in &sample.waits {
            let Some(target) = targets.of(wait.tgid).filter(|_| wait.state != State::Dead) else {
                continue;
            };
            let key = (wait.tgid, wait.tid);
            let mut residence = self.threads.get(&key).copied().unwrap_or_default();
            let doing = self.doing(wait, &looks);
            let in_epoll = matches!(call_of(wait), Some((_, Does::Epoll)));
            let parked = matches!(doing, Doing::Idle | Doing::Parked) && !in_epoll;
            residence.look(in_epoll, parked);
            threads.insert(key, residence);
            let group = groups.entry((target, like(&wait.comm))).or_default();
            group.add(doing);
            group.loops += u64::from(residence.lives());
            group.alone += u64::from(looks.threads_of(wait.tgid) == 1);
        }
        self.threads = threads;
        for ((target, name), group) in &groups {
            if group.is_pool(targets.threads(*target)) {
                sink.put(*target, Kind::Workers, name, group.reading());
            }
        }
        sink.forget_unseen(Kind::Workers);
    }
}

/// What has to be known of all threads before one can be judged.
struct Looks {
    threads: HashMap<u32, u32>,
    own_tids: HashSet<(u32, u32)>,
    /// Threads asleep on each futex.
    sleepers: HashMap<(u32, u64), u32>,
}

impl Looks {
    fn of(sample: &Sample) -> Self {
        let mut looks = Self {
            threads: HashMap::new(),
            own_tids: HashSet::new(),
            sleepers: HashMap::new(),
        };
        for wait in &sample.waits {
            *looks.threads.entry(wait.tgid).or_default() += 1;
            looks.own_tids.insert((wait.tgid, wait.own_tid));
            if let Some((_, Does::Futex)) = call_of(wait)
                && let Some(Syscall { args, .. }) = &wait.syscall
            {
                *looks.sleepers.entry((wait.tgid, args[0])).or_default() += 1;
            }
        }
        looks
    }

    fn threads_of(&self, tgid: u32) -> u32 {
        self.threads.get(&tgid).copied().unwrap_or(0)
    }
}

impl Workers {
    fn learn_roles(&mut self, sample: &Sample, targets: &Targets) {
        let role = |accepted| {
            if accepted {
                Role::Accepted
            } else {
                Role::Opened
            }
        };
        self.roles = sample
            .connections
            .iter()
            .map(|connection| {
                let accepted = targets.listens(connection.netns, connection.local.port());
                ((connection.tgid, connection.fd), role(accepted))
            })
            .collect();
    }

    fn doing(&self, wait: &Wait, looks: &Looks) -> Doing {
        match wait.state {
            State::Running => return Doing::Running,
            State::Runnable => return Doing::Runnable,
            State::Stopped | State::Dead => return Doing::Other,
            State::Uninterruptible if wait.io => return Doing::Disk,
            State::Uninterruptible | State::Sleeping => {}
        }
        let Some(syscall) = &wait.syscall else {
            return match wait.state {
                State::Uninterruptible => Doing::Other,
                _ => Doing::Unknown,
            };
        };
        let file_wait = wait.state == State::Uninterruptible;
        match call_of(wait) {
            Some((_, Does::Sync)) => Doing::Disk,
            Some((_, Does::Read | Does::Write | Does::Path)) if file_wait => Doing::Disk,
            Some((_, Does::Accept | Does::Epoll | Does::Sleep)) => Doing::Idle,
            Some((_, Does::Poll)) => self.polling(wait.tgid, &syscall.detail),
            Some((_, Does::Read)) => match self.role(wait.tgid, descriptor(syscall)) {
                Some(Role::Accepted) => Doing::Client,
                Some(Role::Opened) => Doing::Downstream,
                None => Doing::Other,
            },
            Some((_, Does::Futex)) => {
                let is_thread = |tid| looks.own_tids.contains(&(wait.tgid, tid));
                let futex = Futex::of(wait, is_thread);
                let sleepers = looks.sleepers.get(&(wait.tgid, syscall.args[0]));
                match futex.map(|futex| futex.lock) {
                    Some(Lock::Yes { .. }) => Doing::Lock,
                    _ if sleepers.is_some_and(|sleepers| *sleepers > 1) => Doing::Idle,
                    _ => Doing::Parked,
                }
            }
            _ => Doing::Other,
        }
    }

    /// A call that is awaited counts before a client that is; a listener alone is work that has not come.
    fn polling(&self, tgid: u32, detail: &Detail) -> Doing {
        let Detail::Poll(entries) = detail else {
            return Doing::Idle;
        };
        let roles = entries
            .iter()
            .filter_map(|(fd, _)| self.role(tgid, u32::try_from(*fd).ok()?));
        roles.fold(Doing::Idle, |doing, role| match (doing, role) {
            (_, Role::Opened) | (Doing::Downstream, _) => Doing::Downstream,
            (_, Role::Accepted) => Doing::Client,
        })
    }

    fn role(&self, tgid: u32, fd: u32) -> Option<Role> {
        self.roles.get(&(tgid, fd)).copied()
    }
}

/// A thread's name with `#` in place of each run of digits: `worker-12` is like `worker-3`.
fn like(comm: &str) -> String {
    let mut out = String::with_capacity(comm.len());
    for letter in comm.chars() {
        if !letter.is_ascii_digit() {
            out.push(letter);
        } else if !out.ends_with('#') {
            out.push('#');
        }
    }
    out
}

impl Group {
    fn add(&mut self, doing: Doing) {
        self.size += 1;
        let counter = match doing {
            Doing::Running => &mut self.running,
            Doing::Runnable => &mut self.runnable,
            Doing::Idle => &mut self.idle,
            Doing::Parked => {
                self.parked += 1;
                &mut self.idle
            }
            Doing::Client => &mut self.client,
            Doing::Downstream => &mut self.downstream,
            Doing::Lock => &mut self.lock,
            Doing::Disk => &mut self.disk,
            Doing::Other => &mut self.other,
            Doing::Unknown => &mut self.unknown,
        };
        *counter += 1;
    }

    /// Several threads, or the only one of its service; not event loops, unless each is a process of its own: those may
    /// serve one request at a time (prefork).
    fn is_pool(&self, threads_of_target: u32) -> bool {
        if self.size == 1 {
            return threads_of_target == 1 && self.loops == 0;
        }
        self.loops < self.size || self.alone == self.size
    }

    fn reading(&self) -> Reading {
        let not_busy = self.idle + self.client + self.unknown;
        let mut extra = vec![
            ("running", self.running as f64),
            ("runnable", self.runnable as f64),
            ("waiting_lock", self.lock as f64),
            ("waiting_disk", self.disk as f64),
            ("waiting_downstream", self.downstream as f64),
            ("waiting_client", self.client as f64),
            ("waiting_other", self.other as f64),
            ("idle", self.idle as f64),
            ("parked", self.parked as f64),
        ];
        if self.unknown > 0 {
            extra.push(("unknown", self.unknown as f64));
            extra.push(("at_least", 1.0));
        }
        let busy = self.size.saturating_sub(not_busy);
        Reading {
            depth: busy,
            limit: Some(self.size),
            fill: Some(busy as f64 / self.size.max(1) as f64),
            servers: u32::try_from(self.size).unwrap_or(u32::MAX),
            extra,
            ..Reading::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Kind, Model, Reading,
        syscalls::tests::{asleep, locked},
    };
    use super::like;
    use crate::sample::{
        Connection, Detail, Listener, Sample, State, Syscall, Target, Thread, Wait, Walks,
    };

    fn connection(fd: u32, port: u16) -> Connection {
        Connection {
            cookie: u64::from(fd),
            tgid: 10,
            fd,
            netns: 1,
            local: format!("10.0.0.1:{port}").parse().unwrap(),
            remote: "10.0.0.2:5432".parse().unwrap(),
            state: 1,
            rcv_nxt: 0,
            copied_seq: 0,
            write_seq: 0,
            snd_una: 0,
            snd_nxt: 0,
            snd_wnd: 0,
            rmem_alloc: 0,
            rcvbuf: 0,
            wmem_queued: 0,
            sndbuf: 0,
            drops: 0,
            snd_wl1: 0,
            since_received_ns: 0,
            since_sent_ns: 0,
            since_heard_ns: 0,
        }
    }

    /// Descriptor 5 is a connection that was accepted, 6 one that was opened.
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
            walks: Walks {
                files: true,
                threads: true,
                waits: true,
                ..Walks::default()
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
            .map(|(key, reading)| (key.name.clone(), reading))
            .collect()
    }

    fn extra(reading: &Reading, key: &str) -> Option<f64> {
        let found = reading.extra.iter().find(|(name, _)| *name == key);
        found.map(|(_, value)| *value)
    }

    fn named(wait: Wait, comm: &str) -> Wait {
        Wait {
            comm: comm.to_owned(),
            ..wait
        }
    }

    #[test]
    fn names_that_differ_in_digits_alone_are_alike() {
        assert_eq!(like("worker-12"), "worker-#");
        assert_eq!(like("http-8080-exec1"), "http-#-exec#");
        assert_eq!(like("main"), "main");
    }

    #[test]
    fn a_pool_is_counted_by_what_its_threads_do() {
        let polls = |fd: i32| {
            let mut wait = asleep(18, libc::SYS_ppoll, [0; 4]);
            wait.syscall = Some(Syscall {
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
    fn where_the_calls_are_not_known_only_what_is_certain_counts_as_busy() {
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
    fn event_loops_are_no_pool_but_processes_of_one_thread_each_are() {
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
    fn one_thread_among_others_is_no_pool_and_a_lone_server_is() {
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
}
