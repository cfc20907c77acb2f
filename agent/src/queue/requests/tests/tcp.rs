//! A simulated TCP connection between a client and a server: the fields that the kernel keeps at both ends, with delayed
//! acknowledgements, loss, retransmission, reordering, keep-alive probes and FINs. Times are in µs.

use std::collections::{BTreeMap, BinaryHeap};

use super::super::super::endpoint::state;
use crate::sample::Connection;

const MSS: u32 = 1448;
const RTO_US: u64 = 200_000;
/// One timer tick at CONFIG_HZ=250.
const JIFFY_US: u64 = 4_000;
pub(super) const CLIENT: usize = 0;
pub(super) const SERVER: usize = 1;

/// Reproducible pseudo-random numbers (xorshift64).
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(super) fn one_in(&mut self, many: u64) -> bool {
        many > 0 && self.below(many) == 0
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Net {
    pub(super) delay_us: u64,
    pub(super) jitter_us: u64,
    /// One in this many segments is lost; 0: none.
    pub(super) loss: u64,
    pub(super) delayed_ack_us: u64,
    /// Idle time after which both ends send a keep-alive probe; 0: never.
    pub(super) probe_us: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives {
        at: usize,
        seq: u32,
        len: u32,
        ack: u32,
        fin: bool,
    },
    DelayedAck {
        at: usize,
    },
    Retransmit {
        at: usize,
    },
    Probe {
        at: usize,
    },
}

/// One end, with the fields of the kernel.
#[derive(Clone, Default)]
pub(super) struct End {
    pub(super) rcv_nxt: u32,
    pub(super) copied_seq: u32,
    pub(super) write_seq: u32,
    pub(super) snd_una: u32,
    snd_wl1: u32,
    received_us: u64,
    sent_us: u64,
    any_segment_us: u64,
    fin_sent: bool,
    fin_received: bool,
    fin_acknowledged: bool,
    ack_due: bool,
    timer: bool,
    /// When the retransmission timer was last restarted.
    timed_us: u64,
    /// Segments received out of order: end and FIN by sequence number.
    later: BTreeMap<u32, (u32, bool)>,
    /// Sent and not acknowledged: length and FIN by sequence number, in the order of sending.
    unacknowledged: Vec<(u32, u32, bool)>,
}

pub(super) struct Tcp {
    pub(super) now_us: u64,
    pub(super) ends: [End; 2],
    net: Net,
    numbers: Numbers,
    queue: BinaryHeap<std::cmp::Reverse<(u64, u64, Event)>>,
    events: u64,
}

fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Tcp {
    /// A connection just established. `starts`: the sequence numbers at which the data of client and server begin.
    pub(super) fn new(net: Net, starts: [u32; 2], seed: u64) -> Self {
        let now_us = 1_000_000_000;
        let end = |mine: u32, theirs: u32, wl1: u32| End {
            rcv_nxt: theirs,
            copied_seq: theirs,
            write_seq: mine,
            snd_una: mine,
            snd_wl1: wl1,
            received_us: now_us,
            sent_us: now_us,
            any_segment_us: now_us,
            ..End::default()
        };
        let mut tcp = Self {
            now_us,
            ends: [
                // `snd_wl1` is set by the SYN-ACK at the client, and by its ACK at the server.
                end(starts[0], starts[1], starts[1].wrapping_sub(1)),
                end(starts[1], starts[0], starts[0]),
            ],
            net,
            numbers: Numbers(seed),
            queue: BinaryHeap::new(),
            events: 0,
        };
        if net.probe_us > 0 {
            tcp.after(net.probe_us, Event::Probe { at: CLIENT });
            tcp.after(net.probe_us, Event::Probe { at: SERVER });
        }
        tcp
    }

    fn after(&mut self, delay_us: u64, event: Event) {
        self.events += 1;
        let entry = (self.now_us + delay_us, self.events, event);
        self.queue.push(std::cmp::Reverse(entry));
    }

    /// Advances the time.
    pub(super) fn run_to(&mut self, until_us: u64) {
        while let Some(std::cmp::Reverse((at_us, _, event))) = self.queue.peek().copied() {
            if at_us > until_us {
                break;
            }
            self.queue.pop();
            self.now_us = at_us;
            self.happen(event);
        }
        self.now_us = until_us;
    }

    /// Time of the next event.
    pub(super) fn next_us(&self) -> Option<u64> {
        self.queue.peek().map(|entry| entry.0.0)
    }

    pub(super) fn write(&mut self, at: usize, bytes: u32) {
        let mut left = bytes;
        while left > 0 {
            let len = left.min(MSS);
            let seq = self.ends[at].write_seq;
            self.ends[at].write_seq = seq.wrapping_add(len);
            if self.ends[at].unacknowledged.is_empty() {
                self.ends[at].timed_us = self.now_us;
            }
            self.ends[at].unacknowledged.push((seq, len, false));
            self.transmit(at, seq, len, false);
            left -= len;
        }
    }

    /// shutdown(SHUT_WR).
    pub(super) fn shut_down(&mut self, at: usize) {
        let seq = self.ends[at].write_seq;
        self.ends[at].write_seq = seq.wrapping_add(1);
        self.ends[at].fin_sent = true;
        self.ends[at].unacknowledged.push((seq, 0, true));
        self.transmit(at, seq, 0, true);
    }

    /// Reads all data.
    pub(super) fn read(&mut self, at: usize) {
        self.ends[at].copied_seq = self.ends[at].rcv_nxt;
    }

    fn transmit(&mut self, at: usize, seq: u32, len: u32, fin: bool) {
        if len > 0 {
            self.ends[at].sent_us = self.now_us;
        }
        if !self.ends[at].timer && (len > 0 || fin) {
            self.ends[at].timer = true;
            self.ends[at].timed_us = self.now_us;
            self.after(RTO_US, Event::Retransmit { at });
        }
        self.ends[at].ack_due = false;
        if self.numbers.one_in(self.net.loss) {
            return;
        }
        let ack = self.ends[at].rcv_nxt;
        let delay_us = self.net.delay_us + self.numbers.below(self.net.jitter_us + 1);
        self.after(
            delay_us,
            Event::Arrives {
                at: 1 - at,
                seq,
                len,
                ack,
                fin,
            },
        );
    }

    fn acknowledge(&mut self, at: usize) {
        let seq = self.ends[at].write_seq;
        self.transmit(at, seq, 0, false);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrives {
                at,
                seq,
                len,
                ack,
                fin,
            } => self.arrive(at, seq, len, ack, fin),
            Event::DelayedAck { at } => {
                if self.ends[at].ack_due {
                    self.acknowledge(at);
                }
            }
            Event::Retransmit { at } => {
                let end = &mut self.ends[at];
                end.timer = false;
                let due_us = end.timed_us + RTO_US;
                let Some((seq, len, fin)) = end.unacknowledged.first().copied() else {
                    return;
                };
                if due_us > self.now_us {
                    end.timer = true;
                    self.after(due_us - self.now_us, Event::Retransmit { at });
                } else {
                    self.transmit(at, seq, len, fin);
                }
            }
            Event::Probe { at } => {
                let end = &self.ends[at];
                let silent = self.now_us - end.any_segment_us >= self.net.probe_us;
                if silent && end.unacknowledged.is_empty() {
                    let seq = end.snd_una.wrapping_sub(1);
                    self.transmit(at, seq, 0, false);
                }
                self.after(self.net.probe_us, Event::Probe { at });
            }
        }
    }

    fn arrive(&mut self, at: usize, seq: u32, len: u32, ack: u32, fin: bool) {
        let now_us = self.now_us;
        let end = &mut self.ends[at];
        end.any_segment_us = now_us;
        let till = seq.wrapping_add(len + u32::from(fin));
        if before(till, end.rcv_nxt) || (till == end.rcv_nxt && len > 0) {
            // Outside the window: a probe, or data already received (tcp_validate_incoming, tcp_data_queue).
            if len > 0 && before(end.snd_una, ack) {
                end.snd_una = ack;
            }
            return self.acknowledge(at);
        }
        // tcp_may_update_window.
        if before(end.snd_una, ack) || before(end.snd_wl1, seq) {
            end.snd_wl1 = seq;
        }
        if before(end.snd_una, ack) {
            end.snd_una = ack;
            end.timed_us = now_us;
            end.unacknowledged
                .retain(|(seq, len, fin)| before(ack, seq.wrapping_add(len + u32::from(*fin))));
            end.fin_acknowledged = end.fin_sent && end.snd_una == end.write_seq;
        }
        if len == 0 && !fin {
            return;
        }
        if before(end.rcv_nxt, seq) {
            end.later.insert(seq, (till, fin));
            return self.acknowledge(at);
        }
        let (mut till, mut fin) = (till, fin);
        let gap_was_filled = !end.later.is_empty();
        loop {
            end.rcv_nxt = till;
            end.fin_received |= fin;
            let next = end.later.iter().map(|(seq, last)| (*seq, *last));
            let next = next
                .filter(|(seq, _)| !before(till, *seq))
                .max_by_key(|(_, (end, _))| end.wrapping_sub(till) as i32);
            let rcv_nxt = end.rcv_nxt;
            end.later.retain(|seq, _| before(rcv_nxt, *seq));
            match next {
                Some((_, (end, last))) if before(till, end) => (till, fin) = (end, last),
                _ => break,
            }
        }
        if len > 0 {
            end.received_us = now_us;
        }
        if gap_was_filled || fin || self.net.delayed_ack_us == 0 || end.ack_due {
            return self.acknowledge(at);
        }
        end.ack_due = true;
        self.after(self.net.delayed_ack_us, Event::DelayedAck { at });
    }

    /// The sample of this end.
    pub(super) fn observe(&self, at: usize) -> Connection {
        let end = &self.ends[at];
        let jiffies = |us: u64| us / JIFFY_US;
        let since = |us: u64| (jiffies(self.now_us) - jiffies(us)) * JIFFY_US * 1_000;
        let state = match (end.fin_sent, end.fin_acknowledged, end.fin_received) {
            (false, _, false) => state::ESTABLISHED,
            (false, _, true) => state::CLOSE_WAIT,
            (true, false, false) => state::FIN_WAIT1,
            (true, true, false) => state::FIN_WAIT2,
            (true, false, true) => state::LAST_ACK,
            (true, true, true) => state::TIME_WAIT,
        };
        let [client, server] = ["10.0.0.9:40000", "10.0.0.5:8080"].map(|it| it.parse().unwrap());
        let (local, remote) = if at == CLIENT {
            (client, server)
        } else {
            (server, client)
        };
        Connection {
            cookie: 1 + at as u64,
            tgid: 7,
            fd: 3,
            netns: 1,
            local,
            remote,
            state,
            rcv_nxt: end.rcv_nxt,
            copied_seq: end.copied_seq,
            write_seq: end.write_seq,
            snd_una: end.snd_una,
            snd_nxt: end.write_seq,
            snd_wnd: 65_535,
            rmem_alloc: 0,
            rcvbuf: 0,
            wmem_queued: 0,
            sndbuf: 0,
            drops: 0,
            snd_wl1: end.snd_wl1,
            segments: 0,
            since_received_ns: since(end.received_us),
            since_sent_ns: since(end.sent_us),
            since_any_segment_ns: since(end.any_segment_us),
        }
    }
}
