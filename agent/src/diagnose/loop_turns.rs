//! The turns of event loops: how long a thread has computed since it last slept.

use crate::hash::{HashMap, HashSet};
use std::collections::BTreeSet;

use super::{classify::Thread, inputs::LONG_TURN_NS};
use crate::{
    queue::{
        Kind, QueueId, QueueKey, Readings,
        syscalls::{CallClass, call_of},
    },
    sample::{State, Wait},
};

/// Maximum number of threads that are tracked, and that are counted in one second; further ones are ignored.
pub(super) const MAX_THREADS: usize = 4_096;

/// The present turn of each thread in focus.
#[derive(Default)]
pub(super) struct Turns {
    present: HashMap<Thread, Turn>,
    /// Threads that run an event loop, by tid: known before their service is focused.
    loops: HashSet<u32>,
    woken: HashSet<Thread>,
}

/// What a thread has done since it last slept.
#[derive(Clone, Copy)]
struct Turn {
    /// Count of its voluntary context switches: if this has changed, it has slept in between.
    voluntary: u64,
    /// Its CPU time when it woke, ns.
    cpu_at_wake_ns: u64,
    /// It last slept in epoll_wait.
    is_of_a_loop: bool,
    /// It runs an event loop, and was under way when it was first seen.
    is_under_way: bool,
}

/// Event-loop threads that have computed for [`LONG_TURN_NS`] or more without sleeping.
#[derive(Default)]
pub(super) struct LongTurns {
    /// Since they slept in epoll_wait.
    whole: BTreeSet<Thread>,
    /// Since they were first seen. An overloaded loop never sleeps, so this alone does not prove a long turn.
    under_way: BTreeSet<Thread>,
}

impl LongTurns {
    pub(super) fn extend(&mut self, more: &Self) {
        self.whole.extend(&more.whole);
        self.under_way.extend(&more.under_way);
    }
    pub(super) fn has_whole(&self, thread: Thread) -> bool {
        self.whole.contains(&thread)
    }

    pub(super) fn has_under_way(&self, thread: Thread) -> bool {
        self.under_way.contains(&thread)
    }
}

impl Turns {
    /// Learns which threads run an event loop: profiling may begin in the middle of a long turn.
    pub(super) fn read_loops(&mut self, readings: &Readings) {
        let loop_thread = |key: &QueueKey| match (key.kind, &key.id) {
            (Kind::Eventloop, QueueId::Thread { tid, .. }) => Some(*tid),
            _ => None,
        };
        for (key, _) in &readings.queues {
            if self.loops.len() < MAX_THREADS {
                self.loops.extend(loop_thread(key));
            }
        }
        for tid in readings.gone.iter().filter_map(|key| loop_thread(key)) {
            self.loops.remove(&tid);
        }
    }

    /// Adds the threads of one sample. Returns those whose present turn is long.
    pub(super) fn read(&mut self, waits: &[Wait], in_focus: &impl Fn(u32) -> bool) -> LongTurns {
        let mut long = LongTurns::default();
        for wait in waits.iter().filter(|wait| in_focus(wait.tgid)) {
            let thread = (wait.tgid, wait.tid);
            let runs = matches!(wait.state, State::Running | State::Runnable);
            let before = self.present.get(&thread).copied();
            let is_woken = runs || before.is_some_and(|turn| turn.voluntary != wait.voluntary);
            if is_woken && self.woken.len() < MAX_THREADS {
                self.woken.insert(thread);
            }
            let turn = match before {
                Some(turn) if runs && turn.voluntary == wait.voluntary => turn,
                Some(turn) if runs => Turn {
                    voluntary: wait.voluntary,
                    cpu_at_wake_ns: wait.cpu_ns,
                    is_under_way: false,
                    ..turn
                },
                _ => Turn {
                    voluntary: wait.voluntary,
                    cpu_at_wake_ns: wait.cpu_ns,
                    is_of_a_loop: matches!(call_of(wait), Some((_, CallClass::Epoll))),
                    is_under_way: runs && before.is_none() && self.loops.contains(&wait.tid),
                },
            };
            // By CPU time: a thread that waits for a CPU is not busy.
            let busy_ns = wait.cpu_ns.saturating_sub(turn.cpu_at_wake_ns);
            if busy_ns >= LONG_TURN_NS {
                if turn.is_of_a_loop {
                    long.whole.insert(thread);
                } else if turn.is_under_way {
                    long.under_way.insert(thread);
                }
            }
            if before.is_some() || self.present.len() < MAX_THREADS {
                self.present.insert(thread, turn);
            }
        }
        long
    }

    /// Threads that were once seen awake, or slept anew between two samples.
    pub(super) fn woken(&self) -> &HashSet<Thread> {
        &self.woken
    }

    /// Forgets the threads of all other processes.
    pub(super) fn retain(&mut self, stays: impl Fn(u32) -> bool) {
        self.present.retain(|(tgid, _), _| stays(*tgid));
        self.woken.retain(|(tgid, _)| stays(*tgid));
    }
}
