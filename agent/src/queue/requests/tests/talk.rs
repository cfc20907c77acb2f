//! Simulated clients and servers on the simulated TCP connection. They know the true state that the rule must find.

use super::tcp::{CLIENT, Net, Numbers, SERVER, Tcp};
use crate::sample::Connection;

/// The behaviour of client and server. Times are in µs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    pub(super) net: Net,
    pub(super) think_us: u64,
    pub(super) work_us: u64,
    /// Time from the arrival of a request until the server reads it.
    pub(super) unread_us: u64,
    pub(super) request: u32,
    pub(super) answer: u32,
    /// Number of pieces that an answer is written in.
    pub(super) pieces: u32,
    /// Time between the pieces.
    pub(super) gap_us: u64,
    /// Bytes that the server sends when the connection is established.
    pub(super) greeting: u32,
    pub(super) starts: [u32; 2],
}

impl Default for Style {
    fn default() -> Self {
        Self {
            net: Net {
                delay_us: 50,
                delayed_ack_us: 40_000,
                ..Net::default()
            },
            think_us: 300_000,
            work_us: 300_000,
            unread_us: 50,
            request: 300,
            answer: 1_000,
            pieces: 1,
            gap_us: 0,
            greeting: 0,
            starts: [u32::MAX - 2_000, u32::MAX - 50_000],
        }
    }
}

/// The true state at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Truth {
    pub(super) waits: bool,
    pub(super) unread: bool,
    pub(super) began_us: u64,
    /// Requests begun and answered so far.
    pub(super) begun: u64,
    pub(super) answered: u64,
}

enum Step {
    Think(u64),
    /// Until the server has received the whole request.
    Ask,
    Read(u64),
    Work(u64),
    Answer {
        pieces: u32,
        at_us: u64,
    },
    /// Until the client has received the whole answer.
    Receive,
}

pub(super) struct Talk {
    pub(super) tcp: Tcp,
    style: Style,
    numbers: Numbers,
    step: Step,
    asked_to: u32,
    asked_from: u32,
    answer_from: u32,
    answer_to: u32,
    /// By end.
    truth: [Truth; 2],
}

fn reached(position: u32, to: u32) -> bool {
    position.wrapping_sub(to) as i32 >= 0
}

impl Talk {
    pub(super) fn new(style: Style, seed: u64) -> Self {
        let mut tcp = Tcp::new(style.net, style.starts, seed);
        tcp.write(SERVER, style.greeting);
        let truth = Truth {
            waits: false,
            unread: false,
            began_us: 0,
            begun: 0,
            answered: 0,
        };
        let mut numbers = Numbers(seed ^ 0x9e37_79b9);
        let think = tcp.now_us + 1_000 + numbers.below(style.think_us);
        Self {
            tcp,
            style,
            numbers,
            step: Step::Think(think),
            asked_from: 0,
            asked_to: 0,
            answer_from: 0,
            answer_to: 0,
            truth: [truth; 2],
        }
    }

    pub(super) fn observe(&self, end: usize) -> (Connection, Truth) {
        (self.tcp.observe(end), self.truth[end])
    }

    fn due(&self) -> Option<u64> {
        match self.step {
            Step::Think(at) | Step::Read(at) | Step::Work(at) | Step::Answer { at_us: at, .. } => {
                Some(at)
            }
            Step::Ask | Step::Receive => None,
        }
    }

    pub(super) fn run_to(&mut self, until_us: u64) {
        loop {
            let next = self.due().into_iter().chain(self.tcp.next_us()).min();
            match next {
                Some(at_us) if at_us <= until_us => {
                    self.tcp.run_to(at_us.max(self.tcp.now_us));
                    self.arrivals();
                    self.step();
                }
                _ => return self.tcp.run_to(until_us),
            }
        }
    }

    /// Updates the truth when the first byte of a request reaches the server, or of an answer the client.
    fn arrivals(&mut self) {
        let now_us = self.tcp.now_us;
        let [client, server] = &mut self.truth;
        let arrived = |position: u32, from: u32| (position.wrapping_sub(from) as i32) > 0;
        if client.begun > server.begun && arrived(self.tcp.ends[SERVER].rcv_nxt, self.asked_from) {
            *server = Truth {
                waits: true,
                unread: true,
                began_us: now_us,
                begun: client.begun,
                ..*server
            };
        }
        if server.answered > client.answered
            && arrived(self.tcp.ends[CLIENT].rcv_nxt, self.answer_from)
        {
            *client = Truth {
                waits: false,
                answered: server.answered,
                ..*client
            };
        }
        self.tcp.read(CLIENT);
    }

    fn step(&mut self) {
        let now_us = self.tcp.now_us;
        if self.due().is_some_and(|at| at > now_us) {
            return;
        }
        let some = |numbers: &mut Numbers, us: u64| now_us + us / 4 + numbers.below(us * 3 / 2 + 1);
        let (style, numbers) = (self.style, &mut self.numbers);
        match self.step {
            Step::Think(_) => {
                self.asked_from = self.tcp.ends[CLIENT].write_seq;
                let begun = self.truth[CLIENT].begun + 1;
                self.truth[CLIENT] = Truth {
                    waits: true,
                    began_us: now_us,
                    begun,
                    ..self.truth[CLIENT]
                };
                let bytes = 1 + numbers.below(2 * u64::from(style.request)) as u32;
                self.tcp.write(CLIENT, bytes);
                self.asked_to = self.tcp.ends[CLIENT].write_seq;
                self.step = Step::Ask;
            }
            Step::Ask => {
                if reached(self.tcp.ends[SERVER].rcv_nxt, self.asked_to) {
                    self.step = Step::Read(some(numbers, style.unread_us));
                }
            }
            Step::Read(_) => {
                self.tcp.read(SERVER);
                self.truth[SERVER].unread = false;
                self.step = Step::Work(some(numbers, style.work_us));
            }
            Step::Work(_) => {
                self.answer_from = self.tcp.ends[SERVER].write_seq;
                self.truth[SERVER].waits = false;
                self.truth[SERVER].answered += 1;
                self.step = Step::Answer {
                    pieces: style.pieces,
                    at_us: now_us,
                };
                self.step();
            }
            Step::Answer { pieces, .. } => {
                let bytes = 1 + numbers.below(2 * u64::from(style.answer)) as u32;
                self.tcp.write(SERVER, bytes);
                self.answer_to = self.tcp.ends[SERVER].write_seq;
                self.step = if pieces > 1 {
                    Step::Answer {
                        pieces: pieces - 1,
                        at_us: some(numbers, style.gap_us),
                    }
                } else {
                    Step::Receive
                };
            }
            Step::Receive => {
                if reached(self.tcp.ends[CLIENT].rcv_nxt, self.answer_to) {
                    self.step = Step::Think(some(numbers, style.think_us));
                }
            }
        }
    }
}
