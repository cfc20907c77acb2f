//! Requests in flight and outstanding calls: the status of every connection, aggregated by endpoint.
//!
//! [`requests`](super::requests) decides the status of one connection. This module keeps that of all connections, and
//! counts them for the queues of [`inflight`](super::inflight) (accepted connections) and
//! [`downstream`](super::downstream) (opened connections). A scan of all connections counts from zero; a sample of some of
//! them adjusts the counts by what changed.

use std::{collections::BTreeSet, net::SocketAddr};

use rustc_hash::FxHashMap;

use super::{
    AcceptedCount, Hidden, Kind, NewConnections, PendingRequest, Previous, Sink, Source, Targets,
    downstream::{self, LocalListeners},
    endpoint::{Endpoint, Groups, state},
    inflight,
    requests::{Conversation, Role, Seen, Status},
};
use crate::{
    ewma::{Ewma, Spread},
    in_order::InOrder,
    sample::{Connection, Sample, TargetId},
};

/// Pending requests listed per endpoint, oldest first. It bounds the work of a diagnosis.
const MAX_PENDING_PER_ENDPOINT: usize = 1_024;
/// Time constant of the size of a response, and of the usual number of unanswered requests, ns: 300 scans at the default interval.
pub const SIZE_TIME_CONSTANT_NS: f64 = 3e10;
/// Number of samples from which the size is known.
const MIN_SIZE_SAMPLES: u32 = 10;
/// Responses are alike if the means of the samples differ from their mean by at most this fraction, on average.
pub const MAX_SIZE_DEVIATION: f64 = 0.25;

#[derive(Default)]
pub(super) struct Conversations {
    connections: InOrder<Known>,
    groups: Groups<Group>,
    listeners: LocalListeners,
    /// Number of file scans so far.
    scans: u64,
    /// Number of samples so far. It identifies the groups that the current sample touched.
    samples: u64,
    /// The scan that first saw each target. A connection that is new at a later scan was opened in between.
    first_scan: FxHashMap<TargetId, u64>,
}

/// State kept per connection.
struct Known {
    group: usize,
    /// The last scan that saw it.
    scan: u64,
    conversation: Conversation,
    status: Status,
    began_ns: u64,
    tgid: u32,
    fd: u32,
    remote: SocketAddr,
}

/// The connections of one endpoint.
#[derive(Default)]
pub(super) struct Group {
    sample: u64,
    /// Network namespace of the newest connection, or of the latest accept count.
    netns: u32,
    pub(super) counts: ConnectionCounts,
    /// Start time, ns, and connection cookie of each unanswered request; sorted.
    waiting: Vec<(u64, u64)>,
    /// What happened since the last scan of all connections.
    pub(super) since: Activity,
    pub(super) response_size: ResponseSize,
    /// Accepted connections that no scan has seen. Negative if a connection was seen before it was counted as accepted.
    unseen: i64,
    /// The same for the whole network namespace.
    unseen_in_namespace: i64,
    /// The number of connections accepted since the last scan of all connections is unknown.
    is_unknown: bool,
    /// Since then, the service was not idle while connections were accepted in the namespace.
    may_have_served: bool,
    /// Time of the last scan of all connections.
    scanned_ns: Option<u64>,
    /// The highest number of simultaneously unanswered requests.
    pub(super) peak: u64,
    /// For opened connections: the process at the remote end, if it is on this node.
    pub(super) peer: Option<downstream::LocalPeer>,
}

/// Number of connections by status.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ConnectionCounts {
    pub(super) idle: u64,
    pub(super) unread: u64,
    pub(super) working: u64,
    pub(super) outstanding: u64,
    pub(super) sending: u64,
    pub(super) unknown: u64,
    pub(super) push: u64,
    pub(super) closed: u64,
}

/// Requests begun and answered within a period.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Activity {
    pub(super) begun: u64,
    pub(super) answered: u64,
    /// Upper estimate of the responses: see [`Seen::responses`].
    responses: u64,
    /// See [`Seen::exchanges`].
    exchanges: u64,
    answer_bytes: u64,
    /// `begun` and `answered` are lower bounds.
    pub(super) at_least: bool,
    /// Connections may have come and gone of which nothing is known.
    unknown_connections: bool,
    /// An upper bound of their number, while the service used CPU time.
    pub(super) unseen_at_most: u64,
    /// Sum of the response times that are known.
    took_ns: u128,
    /// Number of the response times that are known.
    timed: u64,
    /// Connections that ended with an unanswered request.
    pub(super) lost: u64,
}

/// A group at one sample.
pub(super) struct GroupSample<'a> {
    pub(super) group: &'a Group,
    pub(super) now_ns: u64,
    /// Time since the previous scan of all connections. `None` unless this sample is a scan, and not the first.
    pub(super) elapsed_ns: Option<u64>,
    pub(super) threads: u32,
    /// Process, descriptor and remote address of the connection with the oldest unanswered request.
    pub(super) oldest: Option<(u32, u32, SocketAddr)>,
}

impl Source for Conversations {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if let Some(listening) = &sample.listening {
            self.listeners.replace(listening);
        }
        let all = sample.scans.files;
        if !all && !sample.scans.focused_sockets {
            return;
        }
        self.samples += 1;
        self.count_unseen(sink.previous);
        if all {
            self.scans += 1;
            self.first_scan.retain(|id, _| targets.get(*id).is_some());
            for target in targets.all() {
                self.first_scan.entry(target.id).or_insert(self.scans);
            }
            self.groups.for_each(|group| {
                group.counts = ConnectionCounts::default();
                group.waiting.clear();
            });
        }
        for connection in &sample.connections {
            if !matches!(connection.state, state::SYN_SENT | state::SYN_RECV) {
                self.observe(connection, sample.mono_ns, all, targets);
            }
        }
        if all {
            self.forget_gone(targets);
        }
        self.report(sample.mono_ns, all, targets, sink);
        if !sink.focus_scope.is_empty() {
            sink.out.pending_requests = Some(self.pending(sink.focus_scope));
        }
        if all {
            sink.forget_unseen(Kind::Inflight);
            sink.forget_unseen(Kind::Downstream);
        }
    }
}

impl Conversations {
    /// Unanswered requests of these targets; at most [`MAX_PENDING_PER_ENDPOINT`] of each endpoint, oldest first.
    fn pending(&self, focus_scope: &BTreeSet<TargetId>) -> Vec<PendingRequest> {
        let mut pending = Vec::new();
        for (target, endpoint, group) in self.groups.iter() {
            if !focus_scope.contains(&target) {
                continue;
            }
            for (began_ns, cookie) in group.waiting.iter().take(MAX_PENDING_PER_ENDPOINT) {
                if let Some(known) = self.connections.get(*cookie) {
                    pending.push(PendingRequest {
                        target,
                        tgid: known.tgid,
                        cookie: *cookie,
                        accepted: matches!(endpoint, Endpoint::Served(_)),
                        read: known.status != Status::Unread,
                        began_ns: *began_ns,
                    });
                }
            }
        }
        pending
    }

    fn observe(&mut self, connection: &Connection, now_ns: u64, all: bool, targets: &Targets) {
        let cookie = connection.cookie;
        let (slot, seen, before) = match self.connections.next(cookie) {
            Some(known) => {
                let usual_bytes = self.groups.at(known.group).response_size.usual_bytes();
                let seen = known.conversation.observe(connection, usual_bytes, now_ns);
                let before = (known.status, known.began_ns);
                known.scan = self.scans;
                known.status = seen.status;
                known.began_ns = seen.began_ns;
                known.tgid = connection.tgid;
                known.fd = connection.fd;
                (known.group, seen, (!all).then_some(before))
            }
            None => {
                let Some((slot, seen)) = self.register(connection, now_ns, all, targets) else {
                    return;
                };
                (slot, seen, None)
            }
        };
        let group = self.groups.at(slot);
        group.sample = self.samples;
        group.since.add(&seen);
        group.count(cookie, before, &seen, all);
    }

    /// Registers a new connection. Returns the slot of its group and its status; `None` if it belongs to no target.
    fn register(
        &mut self,
        connection: &Connection,
        now_ns: u64,
        all: bool,
        targets: &Targets,
    ) -> Option<(usize, Seen)> {
        let target = targets.of(connection.tgid)?;
        let endpoint = Endpoint::of(connection, targets);
        let role = match endpoint {
            Endpoint::Served(_) => Role::Accepted,
            Endpoint::Opened(_) => Role::Opened,
        };
        let first = self.first_scan.get(&target);
        let fresh = first.is_some_and(|first| *first < self.scans || !all);
        let (conversation, seen) = Conversation::first(connection, role, fresh, now_ns);
        let slot = self.groups.slot(target, endpoint);
        let group = self.groups.at(slot);
        if let Endpoint::Opened(remote) = endpoint {
            let peer = || downstream::LocalPeer::new(connection, remote);
            group.peer.get_or_insert_with(peer);
        }
        group.netns = connection.netns;
        let known = Known {
            group: slot,
            scan: self.scans,
            conversation,
            status: seen.status,
            began_ns: seen.began_ns,
            tgid: connection.tgid,
            fd: connection.fd,
            remote: connection.remote,
        };
        self.connections.insert(connection.cookie, known);
        Some((slot, seen))
    }

    /// Counts connections that were opened and closed between two scans. Each is counted as one answered request: it may have
    /// carried more, or none (a TCP health check).
    fn count_unseen(&mut self, previous: &Previous) {
        // Several ports of a target share the count of their namespace: it is given to the first.
        let mut counted = None;
        for ((target, netns, port), accepted) in &previous.accepted {
            let endpoint = Endpoint::Served(*port);
            let is_first = counted.replace((*target, *netns)) != Some((*target, *netns));
            let may_have_served =
                is_first && accepted.in_namespace > 0 && previous.working.contains(target);
            let serves = accepted.count.map_or(may_have_served, |count| count > 0);
            // A service that accepts connections gets a queue even if all of them are too short for the scans to see.
            if !serves && !self.groups.has(*target, endpoint) {
                continue;
            }
            let slot = self.groups.slot(*target, endpoint);
            let group = self.groups.at(slot);
            group.netns = *netns;
            group.count_unseen(*port, *accepted, may_have_served, previous.new.as_ref());
        }
    }

    /// After a scan of all connections: forgets those that it did not see, and counts their requests as answered.
    fn forget_gone(&mut self, targets: &Targets) {
        let (scan, groups) = (self.scans, &mut self.groups);
        self.connections.retain(|known| {
            let stays = known.scan == scan;
            if !stays && known.status.is_pending() {
                let since = &mut groups.at(known.group).since;
                since.answered += 1;
                since.responses += 1;
                since.at_least = true;
            }
            stays
        });
        let samples = self.samples;
        self.groups.retain(|target, endpoint, group| {
            // A listening service keeps its queue while it has no connections.
            let serves =
                matches!(endpoint, Endpoint::Served(port) if targets.listens(group.netns, port));
            group.sample == samples || (serves && targets.get(target).is_some())
        });
    }

    fn report(&mut self, now_ns: u64, all: bool, targets: &Targets, sink: &mut Sink<'_>) {
        let (samples, listeners) = (self.samples, &self.listeners);
        self.groups.for_each(|group| {
            if all {
                group.waiting.sort_unstable();
                let elapsed_ns = now_ns.saturating_sub(group.scanned_ns.unwrap_or(now_ns));
                let depth = group.depth();
                group.response_size.add(&group.since, depth, elapsed_ns);
            }
            if all || group.sample == samples {
                group.peak = group.peak.max(group.waiting.len() as u64);
                if let Some(peer) = &mut group.peer {
                    peer.refresh(listeners);
                }
            }
        });
        for (target, endpoint, group) in self.groups.iter() {
            if targets.get(target).is_none() || !(all || group.sample == samples) {
                continue;
            }
            let oldest = group.waiting.first();
            let oldest = oldest.and_then(|(_, cookie)| self.connections.get(*cookie));
            let scanned_ns = group.scanned_ns.filter(|_| all);
            let sample = GroupSample {
                group,
                now_ns,
                elapsed_ns: scanned_ns.map(|scanned_ns| now_ns.saturating_sub(scanned_ns)),
                threads: targets.threads(target),
                oldest: oldest.map(|known| (known.tgid, known.fd, known.remote)),
            };
            let id = endpoint.id();
            match endpoint {
                Endpoint::Served(_) => {
                    sink.put_with(target, Kind::Inflight, &id, || inflight::reading(&sample));
                }
                Endpoint::Opened(_) => {
                    sink.put_with(target, Kind::Downstream, &id, || {
                        downstream::reading(&sample)
                    });
                }
            }
        }
        if all {
            self.groups.for_each(|group| {
                group.since = Activity::default();
                group.scanned_ns = Some(now_ns);
            });
        }
    }
}

/// Subtracts the connections that a scan has seen from a balance; returns what remains, and takes it. A connection may be seen one
/// sample before it is counted: only so many are carried over.
fn take_unseen(balance: &mut i64, seen: u64) -> u64 {
    let unseen = balance.saturating_sub_unsigned(seen);
    let owed = i64::try_from(seen).unwrap_or(i64::MAX);
    *balance = unseen.clamp(-owed, 0);
    u64::try_from(unseen).unwrap_or(0)
}

impl Group {
    /// Adds the connections that were accepted, and at a scan of all subtracts those that are `new`, and so were seen.
    fn count_unseen(
        &mut self,
        port: u16,
        accepted: AcceptedCount,
        may_have_served: bool,
        new: Option<&NewConnections>,
    ) {
        // If one of the numbers since the last scan is unknown, the sum is unknown.
        self.since.unknown_connections |= accepted.count.is_none();
        self.is_unknown |= accepted.count.is_none();
        self.may_have_served |= may_have_served;
        self.unseen = self
            .unseen
            .saturating_add_unsigned(accepted.count.unwrap_or(0));
        let in_namespace = self.unseen_in_namespace;
        self.unseen_in_namespace = in_namespace.saturating_add_unsigned(accepted.in_namespace);
        // The connections that still exist are known only after a scan of all.
        let Some(new) = new else { return };
        let seen = new.get(&(self.netns, port)).copied().unwrap_or(0);
        let unseen = take_unseen(&mut self.unseen, seen);
        let all = new.iter().filter(|((netns, _), _)| *netns == self.netns);
        let seen = all.map(|(_, count)| count).sum();
        let in_namespace = take_unseen(&mut self.unseen_in_namespace, seen);
        let may_have_served = std::mem::take(&mut self.may_have_served);
        if std::mem::take(&mut self.is_unknown) {
            self.unseen = 0;
            if may_have_served {
                let sum = self.since.unseen_at_most.saturating_add(in_namespace);
                self.since.unseen_at_most = sum;
            }
        } else if unseen > 0 {
            self.since.begun = self.since.begun.saturating_add(unseen);
            self.since.answered = self.since.answered.saturating_add(unseen);
            self.since.responses = self.since.responses.saturating_add(unseen);
            self.since.at_least = true;
        }
    }

    /// Counts one connection. At a scan of all it is added; otherwise it replaces its own earlier status.
    fn count(&mut self, cookie: u64, before: Option<(Status, u64)>, seen: &Seen, all: bool) {
        let now = (seen.status, seen.began_ns);
        if before == Some(now) {
            return;
        }
        if let Some((status, began_ns)) = before {
            let count = self.counts.of(status);
            *count = count.saturating_sub(1);
            if status.is_pending()
                && let Ok(place) = self.waiting.binary_search(&(began_ns, cookie))
            {
                self.waiting.remove(place);
            }
        }
        *self.counts.of(seen.status) += 1;
        if seen.status.is_pending() {
            let entry = (seen.began_ns, cookie);
            if all {
                self.waiting.push(entry);
            } else if let Err(place) = self.waiting.binary_search(&entry) {
                self.waiting.insert(place, entry);
            }
        }
    }

    /// Ages of the unanswered requests, ns, oldest first.
    pub(super) fn ages_ns(&self, now_ns: u64) -> impl Iterator<Item = u64> {
        self.waiting
            .iter()
            .map(move |(began_ns, _)| now_ns.saturating_sub(*began_ns))
    }

    pub(super) fn depth(&self) -> u64 {
        self.waiting.len() as u64
    }

    /// Median age of the unanswered requests, ns.
    pub(super) fn median_age_ns(&self, now_ns: u64) -> Option<u64> {
        self.ages_ns(now_ns).nth(self.waiting.len() / 2)
    }
}

impl ConnectionCounts {
    fn of(&mut self, status: Status) -> &mut u64 {
        match status {
            Status::Idle => &mut self.idle,
            Status::Unread => &mut self.unread,
            Status::Working => &mut self.working,
            Status::Outstanding => &mut self.outstanding,
            Status::Sending => &mut self.sending,
            Status::Unknown => &mut self.unknown,
            Status::Push => &mut self.push,
            Status::Closed => &mut self.closed,
        }
    }

    /// Connections that carry, or may carry, requests and responses.
    pub(super) fn request_response(&self) -> u64 {
        self.idle + self.unread + self.working + self.outstanding + self.sending + self.unknown
    }
}

impl Activity {
    fn add(&mut self, seen: &Seen) {
        self.begun += u64::from(seen.begun);
        self.answered += u64::from(seen.answered);
        self.responses += u64::from(seen.responses);
        self.exchanges += u64::from(seen.exchanges);
        self.answer_bytes += u64::from(seen.answer_bytes);
        self.at_least |= seen.at_least;
        self.lost += u64::from(seen.lost);
        if let Some(took_ns) = seen.took_ns {
            self.took_ns += u128::from(took_ns);
            self.timed += 1;
        }
    }

    /// Requests that may have been begun and answered beyond those counted.
    pub(super) fn hidden(&self) -> Hidden {
        match self.responses.checked_sub(self.answered) {
            _ if self.unknown_connections => Hidden::Unknown,
            Some(more @ 1..) => Hidden::AtMost(more),
            _ => Hidden::Nothing,
        }
    }

    /// Upper estimate of the responses per second over this period: the segments include those of interim answers.
    pub(super) fn responses_per_s(&self, elapsed_ns: u64) -> Option<f64> {
        per_s(self.responses, elapsed_ns)
    }

    /// Bytes of all answers per second.
    pub(super) fn answer_bytes_per_s(&self, elapsed_ns: u64) -> Option<f64> {
        per_s(self.answer_bytes, elapsed_ns)
    }

    /// Mean response time of the requests answered, ns.
    pub(super) fn response_time_ns(&self) -> Option<f64> {
        (self.timed > 0).then(|| self.took_ns as f64 / self.timed as f64)
    }
}

fn per_s(count: u64, elapsed_ns: u64) -> Option<f64> {
    (elapsed_ns > 0).then(|| count as f64 * 1e9 / elapsed_ns as f64)
}

/// Size of the responses of one endpoint. It is measured only while the depth is at most one above its mean. Responses can be
/// counted by segments then, and an interim answer is mostly sent together with its response.
#[derive(Clone, Copy, Debug)]
pub(super) struct ResponseSize {
    /// Bytes of each sample.
    bytes: Spread,
    /// Mean number of unanswered requests.
    usual_depth: Ewma,
}

impl Default for ResponseSize {
    fn default() -> Self {
        Self {
            bytes: Spread::mean_of(0, 0.0, SIZE_TIME_CONSTANT_NS),
            usual_depth: Ewma::mean_of(0, 0.0, SIZE_TIME_CONSTANT_NS),
        }
    }
}

impl ResponseSize {
    /// Adds what happened between two scans of all connections, which were this far apart.
    fn add(&mut self, since: &Activity, depth: u64, elapsed_ns: u64) {
        let depth = depth as f64;
        let is_usual = depth <= self.usual_depth.value() + 1.0;
        self.usual_depth.update(depth, elapsed_ns);
        // An interim answer is an exchange without a response.
        if !is_usual || since.exchanges == 0 || since.answer_bytes == 0 || since.responses == 0 {
            return;
        }
        let bytes = since.answer_bytes as f64 / since.responses as f64;
        self.bytes.update(bytes, elapsed_ns);
    }

    /// The mean, if responses are alike.
    fn usual_bytes(&self) -> Option<u32> {
        let mean = self.bytes.mean_within(MAX_SIZE_DEVIATION)?;
        (self.bytes.samples() >= MIN_SIZE_SAMPLES && mean >= 1.0).then_some(mean as u32)
    }
}

#[cfg(test)]
mod tests;
