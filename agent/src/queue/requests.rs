//! Decides whether a TCP connection carries an unanswered request, from the kernel's sequence numbers alone, without
//! knowledge of the protocol.
//!
//! `snd_wl1` is the sequence number of the peer's segment with which the kernel last updated our send window: one with a newer
//! sequence number, or with an acknowledgement of more of our data. It equals `rcv_nxt` if that segment was a bare ACK, and
//! differs if it carried data:
//!
//! - An **accepted** connection waits for our response if everything we sent is acknowledged and `snd_wl1` is not `rcv_nxt`:
//!   the last segment received was data.
//! - An **opened** connection waits for the peer's response if something we sent is unacknowledged, or `snd_wl1` is
//!   `rcv_nxt`: the last segment received was the bare ACK of our request.
//!
//! The peer's ACK of a keep-alive probe is a bare ACK, too. So the rule is applied only when data has moved; until then the
//! status stays as it is. If a bare ACK arrived long after the last data, it may be of a probe, and timestamps decide instead. A
//! FIN occupies a sequence number and is not data.
//!
//! Some answers are not the response: an HTTP/2 server acknowledges a request with a ping or a window update, an HTTP/1.1 server
//! with `100 Continue`. They are much smaller than the responses, and the requesting end sends data after them (its answer to
//! the ping, the body), so that by the rule a request is still unanswered. Such an *interim answer* does not end a request. It is
//! recognized only if the responses of an endpoint are about equally long.

use super::{advance, endpoint::state};
use crate::sample::Connection;

/// A bare ACK that arrived this long after the last data may be that of a keep-alive probe, ns. Probes are at least one second
/// apart (TCP_KEEPINTVL); 100 ms are left for timer granularity.
const KEEPALIVE_PROBE_NS: u64 = 900_000_000;
/// Resolution of the kernel's timestamps, ns: one timer tick at CONFIG_HZ=100, the coarsest in use. Times closer than that
/// cannot be ordered.
const RESOLUTION_NS: u64 = 10_000_000;
/// Data after a silence this long, ns, is a new message and not the rest of the previous one.
const MESSAGE_GAP_NS: u64 = 200_000_000;
/// A connection counts as one-way after this many messages without a response, if responses are rare; or after this many
/// answers without a request, if it has answered no request.
const ONE_WAY_MESSAGES: u8 = 8;
/// Responses are rare if there are this many messages without one for each message with one.
const ONE_WAY_RATIO: u8 = 4;
/// A request whose data has flowed for this long, ns, and still flows, is a one-way flow and not a request; on a connection
/// that has answered before, after up to 6 times as long.
const ONE_WAY_FLOW_NS: u64 = 10_000_000_000;
/// An answer smaller than the usual response by this factor, on a connection that still waits, is an interim one.
const INTERIM_FACTOR: u32 = 2;
/// Count at which all evidence of a connection's use is halved, so that it can follow a change of use.
const MAX_EVIDENCE: u8 = 200;

/// Which end of a connection sends the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The target accepted it: the peer sends requests.
    Accepted,
    /// The target opened it, and sends requests.
    Opened,
}

/// The state of the request/response exchange on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// No request is unanswered.
    Idle,
    /// Accepted: a request, or part of one, has arrived and the service has not read it.
    Unread,
    /// Accepted: the service has read a request and has not begun to respond.
    Working,
    /// Opened: a request is sent and has no response.
    Outstanding,
    /// Accepted: the response has begun and is still being sent.
    Sending,
    /// Undecided: the connection was first seen in mid-exchange, or the changes between two samples are ambiguous.
    Unknown,
    /// Not request and response: data flows one way.
    Push,
    /// Reset, or abandoned by the kernel.
    Closed,
}

impl Status {
    /// Whether a request is unanswered.
    pub(super) fn is_pending(self) -> bool {
        matches!(self, Self::Unread | Self::Working | Self::Outstanding)
    }
}

/// What one sample shows of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) status: Status,
    /// When the unanswered request began, CLOCK_MONOTONIC, ns.
    pub(super) began_ns: u64,
    /// Lower bound of the requests begun since the previous sample.
    pub(super) begun: u8,
    /// Lower bound of the requests answered since the previous sample.
    pub(super) answered: u8,
    /// Data moved in both directions, so there may have been more requests between the two samples.
    pub(super) at_least: bool,
    /// Upper estimate of the requests answered since the previous sample: each takes at least one segment in each
    /// direction.
    pub(super) responses: u32,
    /// Segments with data since the previous sample, in the direction with fewer; 0 where they are not counted, as in recordings.
    pub(super) exchanges: u32,
    /// Bytes of all answers since the previous sample.
    pub(super) answer_bytes: u32,
    /// Response time of one of the requests answered, if the two samples bound it well, ns.
    pub(super) took_ns: Option<u64>,
    /// The connection ended with an unanswered request.
    pub(super) lost: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// All requests are answered.
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

/// State kept per connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conversation {
    role: Role,
    /// Sequence numbers of the end of the data, FINs excluded.
    received: u32,
    written: u32,
    /// [`Connection::segments`] at the previous sample.
    segments: u32,
    phase: Phase,
    began_ns: u64,
    seen_ns: u64,
    pattern: TrafficPattern,
}

impl Conversation {
    /// The first sample of a connection. `fresh`: it was opened since the last scan of all connections, so no keep-alive
    /// probe has been sent yet.
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
            pattern: TrafficPattern::default(),
        };
        conversation.pattern.asked_ns = conversation.began_ns;
        let status = conversation.status(&facts, false, now_ns);
        let seen = Seen {
            status,
            began_ns: conversation.began_ns,
            begun: u8::from(fresh && status.is_pending()),
            answered: 0,
            responses: 0,
            exchanges: 0,
            answer_bytes: 0,
            at_least: false,
            took_ns: None,
            lost: false,
        };
        (conversation, seen)
    }

    /// Each later sample. `usual_bytes`: size of a response, if they are alike.
    pub(super) fn observe(
        &mut self,
        connection: &Connection,
        usual_bytes: Option<u32>,
        now_ns: u64,
    ) -> Seen {
        let facts = Facts::of(connection, self.role);
        let before = self.phase;
        let last_ns = self.seen_ns;
        let received = moved(&mut self.received, facts.received);
        let written = moved(&mut self.written, facts.written);
        let (asked, answer_bytes) = match self.role {
            Role::Accepted => (received > 0, written),
            Role::Opened => (written > 0, received),
        };
        let answered = answer_bytes > 0;
        let was_waiting = before == Phase::Pending;
        self.phase = self.next_phase(&facts, asked, answered);
        self.seen_ns = now_ns;
        let is_waiting = self.phase == Phase::Pending;
        let exchanges = exchanges(self.segments, connection.segments);
        self.segments = connection.segments;
        let is_interim = is_waiting
            && answered
            && usual_bytes.is_some_and(|usual| answer_bytes < usual / INTERIM_FACTOR);

        // Clamp to the interval between the samples: kernel timestamps are a timer tick coarse.
        let within = |since: Option<u64>| {
            let at = now_ns.saturating_sub(since.unwrap_or(0));
            at.max(last_ns).min(now_ns)
        };
        let answered_ns = within(facts.since_answered());
        let took_ns = self.took_ns(&facts, was_waiting, (asked, answered), last_ns, answered_ns);
        if asked && !(was_waiting && (is_interim || !answered)) {
            self.began_ns = within(facts.since_asked());
        }
        self.pattern
            .record(was_waiting, asked, answered, facts.over, now_ns);

        let (begun, done): (u8, u32) = match (was_waiting, asked, answered, is_waiting) {
            (false, true, true, true) if is_interim => (1, 0),
            _ if is_interim => (0, 0),
            // Answered, and the next request begun.
            (true, true, true, true) | (false, true, true, false) => (1, 1),
            (true, .., false) => (0, 1),
            // The answer may be the end of an earlier one.
            (false, .., true) => (1, 0),
            _ => (0, 0),
        };
        let status = self.status(&facts, answered, now_ns);
        let responses = if asked && answered && !is_interim {
            exchanges.max(done)
        } else {
            done
        };
        let counts = status != Status::Push;
        Seen {
            status,
            began_ns: self.began_ns,
            begun: if counts { begun } else { 0 },
            answered: if counts { done as u8 } else { 0 },
            responses: if counts { responses } else { 0 },
            exchanges: if counts { exchanges } else { 0 },
            answer_bytes: if counts { answer_bytes } else { 0 },
            at_least: counts && asked && answered,
            took_ns: took_ns.filter(|_| counts && !is_interim),
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
            // Data that arrives while our answer is in flight belongs to that exchange (HTTP/2 window updates).
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
            // More requests may have been answered in between. That is negligible if the first had already waited a sampling
            // interval at the previous sample.
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

    fn status(&self, facts: &Facts, answered: bool, now_ns: u64) -> Status {
        if facts.closed {
            return Status::Closed;
        }
        let is_waiting = self.phase == Phase::Pending;
        if self.pattern.is_one_way(is_waiting, self.began_ns, now_ns) {
            return Status::Push;
        }
        match (self.phase, self.role) {
            (_, Role::Accepted) if facts.unread && !facts.over => Status::Unread,
            (Phase::Pending, Role::Accepted) => Status::Working,
            (Phase::Pending, Role::Opened) => Status::Outstanding,
            (Phase::Unknown, _) => Status::Unknown,
            (Phase::Quiet, Role::Accepted) if answered || !facts.acknowledged => Status::Sending,
            (Phase::Quiet, _) => Status::Idle,
        }
    }
}

/// Updates a position and returns by how much it moved. One step back does not count: state and sequence number were
/// read on either side of a FIN.
fn moved(position: &mut u32, now: u32) -> u32 {
    match now.wrapping_sub(*position) {
        0 | u32::MAX => 0,
        bytes => {
            *position = now;
            bytes
        }
    }
}

/// Upper bound of the exchanges between two samples: each has at least one segment in each direction. The bound is exact
/// if requests, or responses, fit in one segment and follow one another.
fn exchanges(before: u32, now: u32) -> u32 {
    let half = |before: u32, now: u32| u32::from((now as u16).wrapping_sub(before as u16));
    half(before, now).min(half(before >> 16, now >> 16))
}

/// Whether `a` is before `b`, modulo 2^32.
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// The facts of one sample of a connection, FINs excluded.
struct Facts {
    role: Role,
    received: u32,
    written: u32,
    unread: bool,
    /// All data that the target wrote is acknowledged.
    acknowledged: bool,
    /// The segment with which the kernel last updated our send window carried data.
    data_came_last: bool,
    /// No further answer is possible.
    over: bool,
    /// The connection was ended by the peer or the network.
    cut_off: bool,
    closed: bool,
    /// The requesting end has sent a FIN. It, or its ACK, is indistinguishable from the bare ACK of the rule.
    half_closed: bool,
    times: Option<Times>,
}

/// Times since the last event of each kind, ns.
struct Times {
    /// Data received.
    received_ns: u64,
    /// Data sent.
    sent_ns: u64,
    /// Any segment received.
    any_segment_ns: u64,
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
            any_segment_ns: connection.since_any_segment_ns,
        };
        let known = times.received_ns > 0 || times.sent_ns > 0 || times.any_segment_ns > 0;
        let (over, half_closed) = match role {
            Role::Accepted => (fin_sent, fin_received),
            Role::Opened => (fin_received, fin_sent),
        };
        Self {
            role,
            received,
            written,
            // The sequence numbers are not read at one instant and can cross. A negative distance means that there is no data.
            unread: role == Role::Accepted && (1..1 << 31).contains(&unread),
            acknowledged: !before(connection.snd_una, written),
            // Also true if it is ahead of `rcv_nxt`: data that arrived out of order.
            data_came_last: connection.snd_wl1 != received,
            over: over || closed,
            cut_off: closed || role == Role::Opened,
            closed,
            half_closed,
            times: known.then_some(times),
        }
    }

    /// Whether a request is unanswered, by sequence numbers alone: the rule of the module.
    fn rule(&self) -> bool {
        match self.role {
            Role::Accepted => self.acknowledged && self.data_came_last,
            Role::Opened => !self.acknowledged || !self.data_came_last,
        }
    }

    /// Like `rule`. But if the last bare ACK possibly acknowledges a keep-alive probe or a FIN, timestamps decide.
    /// `None` if they are too close to be ordered.
    fn decide(&self) -> Option<bool> {
        let probed = self.times.as_ref().is_some_and(|times| {
            let data_ns = times.received_ns.min(times.sent_ns);
            data_ns.saturating_sub(times.any_segment_ns) >= KEEPALIVE_PROBE_NS
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

/// Evidence that distinguishes request/response traffic from one-way traffic.
#[derive(Clone, Copy, Debug, Default)]
struct TrafficPattern {
    /// Samples that saw an answer.
    answered: u8,
    /// Messages that arrived while an earlier one was unanswered.
    unanswered: u8,
    /// Answers without a request.
    unasked: u8,
    /// The requesting end has been silent for [`MESSAGE_GAP_NS`].
    paused: bool,
    /// When the requesting end last sent.
    asked_ns: u64,
}

impl TrafficPattern {
    fn record(&mut self, was_waiting: bool, asked: bool, answered: bool, over: bool, now_ns: u64) {
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
        } else if now_ns.saturating_sub(self.asked_ns) >= MESSAGE_GAP_NS {
            self.paused = true;
        }
        if self.answered.max(self.unanswered).max(self.unasked) >= MAX_EVIDENCE {
            self.answered /= 2;
            self.unanswered /= 2;
            self.unasked /= 2;
        }
    }

    fn is_one_way(&self, is_waiting: bool, began_ns: u64, now_ns: u64) -> bool {
        let messages = self.unanswered >= ONE_WAY_MESSAGES
            && self.unanswered / ONE_WAY_RATIO >= self.answered.max(1);
        // A long upload is a request if the connection is known to answer.
        let max_flow_ns = ONE_WAY_FLOW_NS * (1 + u64::from(self.answered.min(5)));
        let flows = is_waiting
            && self.asked_ns.saturating_sub(began_ns) >= max_flow_ns
            && now_ns.saturating_sub(self.asked_ns) < ONE_WAY_FLOW_NS / 10;
        let pushes = !is_waiting && self.answered == 0 && self.unasked >= ONE_WAY_MESSAGES;
        messages || flows || pushes
    }
}

#[cfg(test)]
mod tests;
