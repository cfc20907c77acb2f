//! Whether a connection carries a request that is not answered: told by the kernel's own sequence numbers, with no
//! knowledge of the protocol.
//!
//! `snd_wl1` is the sequence number of the segment that last advanced our acknowledgement or window. It equals
//! `rcv_nxt` when that was a bare ACK and differs when the segment carried data:
//!
//! - A connection that was **accepted** waits for our answer when all that we sent is acknowledged and `snd_wl1` is
//!   not `rcv_nxt`: the last that came was data.
//! - A connection that was **opened** waits for the peer's answer when not all that we sent is acknowledged, or
//!   `snd_wl1` is `rcv_nxt`: the last that came was the bare ACK of our call.
//!
//! Answers to keep-alive probes are bare ACKs as well. So only data changes the state: the rule is asked when data
//! moved, and else what was known stays. Where a bare ACK came long after the last data, the rule is not asked at all.
//! A FIN takes a sequence number and is not data.

use super::{advance, endpoint::state};
use crate::sample::Connection;

/// Keep-alive probes are at least a second apart. A bare ACK that came so much later than the last data is the answer
/// to one.
const PROBE_NS: u64 = 900_000_000;
/// The coarsest timer tick in use (HZ 100): times that are nearer to each other may be equal.
const RESOLUTION_NS: u64 = 10_000_000;
/// Data that comes after a silence of so long is a new message, not the rest of the last one.
const PAUSE_NS: u64 = 200_000_000;
/// So many messages that nobody answered make a one-way connection, where answered ones are rare.
const ONE_WAY_MESSAGES: u8 = 8;
const ONE_WAY_RATIO: u8 = 4;
/// What flows one way for so long without a pause is no request, unless the connection was seen to answer before.
const ONE_WAY_FLOW_NS: u64 = 10_000_000_000;
/// Evidence is halved here: what a connection is used for may change.
const EVIDENCE_MAX: u8 = 200;

/// Who asks on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// We accepted it: the peer asks.
    Accepted,
    /// We opened it: we ask.
    Opened,
}

/// What a connection is about at one look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// All is answered, or nothing was ever asked.
    Idle,
    /// Accepted: a request, or a part of one, is there that the service has not read.
    Unread,
    /// Accepted: the service has read a request and not begun to answer.
    Working,
    /// Opened: we wait for an answer.
    Outstanding,
    /// Accepted: the answer has begun and is still being sent.
    Sending,
    /// It was first seen in the middle, or what happened between two looks can be read in two ways.
    Unknown,
    /// Not request and answer: data goes one way.
    Push,
    /// Reset, or given up by the kernel.
    Closed,
}

impl Standing {
    /// Whether it is a request that waits for its answer.
    pub(super) fn waits(self) -> bool {
        matches!(self, Self::Unread | Self::Working | Self::Outstanding)
    }
}

/// What one look tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) standing: Standing,
    /// When what waits began to, CLOCK_MONOTONIC, ns.
    pub(super) began_ns: u64,
    /// Requests begun and answered since the last look, at least.
    pub(super) begun: u8,
    pub(super) answered: u8,
    /// Both directions moved, so that more requests may hide between the two looks.
    pub(super) at_least: bool,
    /// Requests answered since the last look: as many as there can have been where more may hide. Each takes a segment there
    /// and one back, at least.
    pub(super) answers: u32,
    /// How long one of those that were answered took, where two looks bound it well, ns.
    pub(super) took_ns: Option<u64>,
    /// The connection ended with a request on it that nobody answered.
    pub(super) lost: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Quiet,
    Pending,
    Unknown,
}

impl From<Option<bool>> for Phase {
    fn from(pending: Option<bool>) -> Self {
        match pending {
            Some(true) => Self::Pending,
            Some(false) => Self::Quiet,
            None => Self::Unknown,
        }
    }
}

/// What is remembered of one connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conversation {
    role: Role,
    /// Where the data ends, FINs left out.
    received: u32,
    written: u32,
    /// As of the connection.
    segments: u32,
    phase: Phase,
    began_ns: u64,
    seen_ns: u64,
    habit: Habit,
}

impl Conversation {
    /// At first sight. `fresh`: it came since the last look at all connections, so that no probe was sent yet.
    pub(super) fn first(
        connection: &Connection,
        role: Role,
        fresh: bool,
        now_ns: u64,
    ) -> (Self, Seen) {
        let facts = Facts::of(connection, role);
        let pending = if facts.over {
            Some(false)
        } else if facts.unread {
            Some(true)
        } else if fresh && !facts.half_closed {
            Some(facts.rule())
        } else if facts.times.is_none() {
            None
        } else {
            facts.decide()
        };
        let mut conversation = Self {
            role,
            received: facts.received,
            written: facts.written,
            segments: connection.segments,
            phase: pending.into(),
            began_ns: now_ns.saturating_sub(facts.since_asked().unwrap_or(0)),
            seen_ns: now_ns,
            habit: Habit::default(),
        };
        conversation.habit.asked_ns = conversation.began_ns;
        let standing = conversation.standing(&facts, false, now_ns);
        let seen = Seen {
            standing,
            began_ns: conversation.began_ns,
            begun: u8::from(fresh && standing.waits()),
            answered: 0,
            answers: 0,
            at_least: false,
            took_ns: None,
            lost: false,
        };
        (conversation, seen)
    }

    /// At each further look.
    pub(super) fn look(&mut self, connection: &Connection, now_ns: u64) -> Seen {
        let facts = Facts::of(connection, self.role);
        let before = self.phase;
        let last_ns = self.seen_ns;
        let received = moved(&mut self.received, facts.received);
        let written = moved(&mut self.written, facts.written);
        let (asked, answered) = match self.role {
            Role::Accepted => (received, written),
            Role::Opened => (written, received),
        };
        let was_waiting = before == Phase::Pending;
        self.phase = self.next_phase(&facts, asked, answered);
        self.seen_ns = now_ns;

        // Between the last look and this one: the clocks of the two differ by a timer tick.
        let within = |since: Option<u64>| {
            let at = now_ns.saturating_sub(since.unwrap_or(0));
            at.max(last_ns).min(now_ns)
        };
        let answered_ns = within(facts.since_answered());
        let took_ns = self.took_ns(&facts, was_waiting, (asked, answered), last_ns, answered_ns);
        if asked && (answered || !was_waiting) {
            self.began_ns = within(facts.since_asked());
        }
        self.habit
            .take_in(was_waiting, asked, answered, facts.over, now_ns);

        let is_waiting = self.phase == Phase::Pending;
        let (begun, done): (u8, u32) = match (was_waiting, asked, answered, is_waiting) {
            // Answered, and asked again.
            (true, true, true, true) | (false, true, true, false) => (1, 1),
            (true, .., false) => (0, 1),
            // What was answered may be the end of an earlier answer.
            (false, .., true) => (1, 0),
            _ => (0, 0),
        };
        let standing = self.standing(&facts, answered, now_ns);
        let exchanges = exchanges(self.segments, connection.segments);
        self.segments = connection.segments;
        let answers = if asked && answered {
            exchanges.max(done)
        } else {
            done
        };
        let counts = standing != Standing::Push;
        Seen {
            standing,
            began_ns: self.began_ns,
            begun: if counts { begun } else { 0 },
            answered: if counts { done as u8 } else { 0 },
            answers: if counts { answers } else { 0 },
            at_least: counts && asked && answered,
            took_ns: took_ns.filter(|_| counts),
            lost: counts && was_waiting && facts.over && facts.cut_off && !answered,
        }
    }

    fn next_phase(&self, facts: &Facts, asked: bool, answered: bool) -> Phase {
        if facts.over {
            return Phase::Quiet;
        }
        match (asked, answered) {
            (false, false) if self.phase == Phase::Unknown && facts.unread => Phase::Pending,
            (false, false) => self.phase,
            (false, true) => Phase::Quiet,
            // What comes while our answer is still on its way to the peer belongs to it (window updates of HTTP/2).
            (true, false) => match (self.phase, self.role) {
                (Phase::Quiet | Phase::Unknown, Role::Accepted) if !facts.acknowledged => {
                    Phase::Quiet
                }
                _ => Phase::Pending,
            },
            (true, true) => facts.decide().into(),
        }
    }

    fn took_ns(
        &self,
        facts: &Facts,
        was_waiting: bool,
        (asked, answered): (bool, bool),
        last_ns: u64,
        answered_ns: u64,
    ) -> Option<u64> {
        let is_waiting = self.phase == Phase::Pending;
        match (was_waiting, asked, answered) {
            (true, false, true) => Some(answered_ns.saturating_sub(self.began_ns)),
            // More may hide in between; that is no matter where the first took longer than the time between the looks.
            (true, true, true) => {
                let least = last_ns.saturating_sub(self.began_ns);
                let between = self.seen_ns.saturating_sub(last_ns);
                (least >= between).then(|| answered_ns.saturating_sub(self.began_ns))
            }
            (false, true, true) if !is_waiting => {
                let (asked, answered) = (facts.since_asked()?, facts.since_answered()?);
                asked.checked_sub(answered)
            }
            _ => None,
        }
    }

    fn standing(&self, facts: &Facts, answered: bool, now_ns: u64) -> Standing {
        if facts.closed {
            return Standing::Closed;
        }
        let is_waiting = self.phase == Phase::Pending;
        if self.habit.is_one_way(is_waiting, self.began_ns, now_ns) {
            return Standing::Push;
        }
        match (self.phase, self.role) {
            (_, Role::Accepted) if facts.unread && !facts.over => Standing::Unread,
            (Phase::Pending, Role::Accepted) => Standing::Working,
            (Phase::Pending, Role::Opened) => Standing::Outstanding,
            (Phase::Unknown, _) => Standing::Unknown,
            (Phase::Quiet, Role::Accepted) if answered || !facts.acknowledged => Standing::Sending,
            (Phase::Quiet, _) => Standing::Idle,
        }
    }
}

/// Takes in a new position. One step back is no movement: state and sequence number were read on both sides of a FIN.
fn moved(position: &mut u32, now: u32) -> bool {
    match now.wrapping_sub(*position) {
        0 | u32::MAX => false,
        _ => {
            *position = now;
            true
        }
    }
}

/// How many requests and answers fit into the segments between two looks: each has one at least. That is their number where
/// requests, or else answers, are not longer than a segment, and come one after the other.
fn exchanges(before: u32, now: u32) -> u32 {
    let half = |before: u32, now: u32| u32::from((now as u16).wrapping_sub(before as u16));
    half(before, now).min(half(before >> 16, now >> 16))
}

/// `a` is before `b`, modulo 2^32.
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// What one look at a connection says, FINs left out.
struct Facts {
    role: Role,
    received: u32,
    written: u32,
    unread: bool,
    /// All data that we wrote is acknowledged.
    acknowledged: bool,
    /// The last segment that told us something carried data.
    data_came_last: bool,
    /// No answer can come any more.
    over: bool,
    /// By the other end, or by the network.
    cut_off: bool,
    closed: bool,
    /// A FIN of the asking end: it, or its ACK, looks like the bare ACK that the rule asks for.
    half_closed: bool,
    times: Option<Times>,
}

struct Times {
    received_ns: u64,
    sent_ns: u64,
    heard_ns: u64,
}

impl Facts {
    fn of(connection: &Connection, role: Role) -> Self {
        let closed = connection.state == state::CLOSE;
        let fin_sent = matches!(
            connection.state,
            state::FIN_WAIT1
                | state::FIN_WAIT2
                | state::TIME_WAIT
                | state::LAST_ACK
                | state::CLOSING
        );
        let fin_received = matches!(
            connection.state,
            state::TIME_WAIT | state::CLOSE_WAIT | state::LAST_ACK | state::CLOSING
        );
        let received = connection.rcv_nxt.wrapping_sub(u32::from(fin_received));
        let written = connection.write_seq.wrapping_sub(u32::from(fin_sent));
        let unread = advance(connection.copied_seq, received);
        let times = Times {
            received_ns: connection.since_received_ns,
            sent_ns: connection.since_sent_ns,
            heard_ns: connection.since_heard_ns,
        };
        let known = times.received_ns > 0 || times.sent_ns > 0 || times.heard_ns > 0;
        let (over, half_closed) = match role {
            Role::Accepted => (fin_sent, fin_received),
            Role::Opened => (fin_received, fin_sent),
        };
        Self {
            role,
            received,
            written,
            // Sequence numbers of two moments can cross; a "negative" distance is no data.
            unread: role == Role::Accepted && (1..1 << 31).contains(&unread),
            acknowledged: !before(connection.snd_una, written),
            // Ahead of `rcv_nxt`: data that came before what it follows.
            data_came_last: connection.snd_wl1 != received,
            over: over || closed,
            cut_off: closed || role == Role::Opened,
            closed,
            half_closed,
            times: known.then_some(times),
        }
    }

    /// Whether a request waits for its answer, by sequence numbers alone.
    fn rule(&self) -> bool {
        match self.role {
            Role::Accepted => self.acknowledged && self.data_came_last,
            Role::Opened => !self.acknowledged || !self.data_came_last,
        }
    }

    /// The same where the last bare ACK may be no answer to data: then the times decide, if they can.
    fn decide(&self) -> Option<bool> {
        let probed = self.times.as_ref().is_some_and(|times| {
            let data_ns = times.received_ns.min(times.sent_ns);
            data_ns.saturating_sub(times.heard_ns) >= PROBE_NS
        });
        if probed || self.half_closed {
            self.by_times()
        } else {
            Some(self.rule())
        }
    }

    fn by_times(&self) -> Option<bool> {
        let (asked, answered) = (self.since_asked()?, self.since_answered()?);
        (asked.abs_diff(answered) > RESOLUTION_NS).then_some(asked < answered)
    }

    fn since_asked(&self) -> Option<u64> {
        self.times.as_ref().map(|times| match self.role {
            Role::Accepted => times.received_ns,
            Role::Opened => times.sent_ns,
        })
    }

    fn since_answered(&self) -> Option<u64> {
        self.times.as_ref().map(|times| match self.role {
            Role::Accepted => times.sent_ns,
            Role::Opened => times.received_ns,
        })
    }
}

/// What tells a conversation from data that goes one way.
#[derive(Clone, Copy, Debug, Default)]
struct Habit {
    /// Looks that saw an answer.
    answered: u8,
    /// Messages that came while an earlier one was not answered.
    unanswered: u8,
    /// Answers that nobody had asked for.
    unasked: u8,
    /// The asking end has been silent for a while.
    paused: bool,
    /// When it was last seen to send.
    asked_ns: u64,
}

impl Habit {
    fn take_in(&mut self, was_waiting: bool, asked: bool, answered: bool, over: bool, now_ns: u64) {
        if over {
            return;
        }
        match (was_waiting, asked, answered) {
            (true, _, true) | (false, true, true) => self.answered += 1,
            (false, false, true) => self.unasked += 1,
            (true, true, false) if self.paused => self.unanswered += 1,
            _ => {}
        }
        if asked {
            self.asked_ns = now_ns;
            self.paused = false;
        } else if now_ns.saturating_sub(self.asked_ns) >= PAUSE_NS {
            self.paused = true;
        }
        if self.answered.max(self.unanswered).max(self.unasked) >= EVIDENCE_MAX {
            self.answered /= 2;
            self.unanswered /= 2;
            self.unasked /= 2;
        }
    }

    fn is_one_way(&self, is_waiting: bool, began_ns: u64, now_ns: u64) -> bool {
        let messages = self.unanswered >= ONE_WAY_MESSAGES
            && self.unanswered / ONE_WAY_RATIO >= self.answered.max(1);
        // An upload is a request, however long it takes, where the connection is known to answer.
        let patience_ns = ONE_WAY_FLOW_NS * (1 + u64::from(self.answered.min(5)));
        let flows = is_waiting
            && self.asked_ns.saturating_sub(began_ns) >= patience_ns
            && now_ns.saturating_sub(self.asked_ns) < ONE_WAY_FLOW_NS / 10;
        let tells = !is_waiting && self.answered == 0 && self.unasked >= ONE_WAY_MESSAGES;
        messages || flows || tells
    }
}

#[cfg(test)]
mod tests;
