//! Requests in flight and calls outstanding: what every connection is about, summed up by endpoint.
//!
//! [`requests`](super::requests) judges one connection; here they are remembered, and counted for the queues of
//! [`inflight`](super::inflight) (connections that a service accepted) and [`downstream`](super::downstream) (those that it
//! opened). A walk over all connections counts anew; a look at a few of them corrects the count by what changed.

use std::{collections::BTreeSet, net::SocketAddr};

use rustc_hash::FxHashMap;

use super::{
    Awaited, Before, Kind, Sink, Source, Targets,
    downstream::{self, Nearby},
    endpoint::{Endpoint, Groups, state},
    inflight,
    requests::{Conversation, Role, Seen, Standing},
};
use crate::{
    in_order::InOrder,
    sample::{Connection, Sample, TargetId},
};

/// Requests of one endpoint that are told one by one.
const MAX_AWAITED: usize = 1_024;

#[derive(Default)]
pub(super) struct Conversations {
    connections: InOrder<Known>,
    groups: Groups<Group>,
    nearby: Nearby,
    /// Walks over files so far.
    walks: u64,
    /// Samples so far: tells the groups that a sample touched from the rest.
    samples: u64,
    /// The walk at which a target was first there: what is new at a later one came in between.
    since: FxHashMap<TargetId, u64>,
}

/// What is remembered of one connection.
struct Known {
    group: usize,
    walk: u64,
    conversation: Conversation,
    standing: Standing,
    began_ns: u64,
    tgid: u32,
    fd: u32,
    remote: SocketAddr,
}

/// The connections of one endpoint.
#[derive(Default)]
pub(super) struct Group {
    sample: u64,
    /// Where the first of them is.
    netns: u32,
    pub(super) tally: Tally,
    /// When each request that waits began to, and its connection; in this order.
    waiting: Vec<(u64, u64)>,
    /// Since the last walk over all connections.
    pub(super) since: Since,
    /// Connections taken that no walk has seen, so far as is known: fewer than none where one was seen before it was counted.
    unseen: i64,
    /// When that was.
    walked_ns: Option<u64>,
    /// The most that ever waited at once.
    pub(super) most: u64,
    /// Opened: who listens at the other end, where it is on this node.
    pub(super) behind: Option<downstream::Behind>,
}

/// Connections by what they are about.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) idle: u64,
    pub(super) unread: u64,
    pub(super) working: u64,
    pub(super) outstanding: u64,
    pub(super) sending: u64,
    pub(super) unknown: u64,
    pub(super) push: u64,
    pub(super) closed: u64,
}

/// What happened in a stretch of time, at least.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Since {
    pub(super) begun: u64,
    pub(super) answered: u64,
    /// As many as there can have been: see `requests`.
    answers: u64,
    pub(super) at_least: bool,
    /// Sum and number of those of which it is known how long they took.
    took_ns: u128,
    timed: u64,
    pub(super) lost: u64,
}

/// What a group tells at one sample.
pub(super) struct Told<'a> {
    pub(super) group: &'a Group,
    pub(super) now_ns: u64,
    /// Since the previous walk; `None` where this sample did not see all connections, or is the first that did.
    pub(super) elapsed_ns: Option<u64>,
    pub(super) threads: u32,
    /// Process and descriptor of the connection whose request waits longest, and its other end.
    pub(super) oldest: Option<(u32, u32, SocketAddr)>,
}

impl Source for Conversations {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if let Some(listening) = &sample.listening {
            self.nearby.replace(listening);
        }
        let all = sample.walks.files;
        if !all && !sample.walks.marked {
            return;
        }
        self.samples += 1;
        self.count_unseen(sink.before);
        if all {
            self.walks += 1;
            self.since.retain(|id, _| targets.get(*id).is_some());
            for target in targets.all() {
                self.since.entry(target.id).or_insert(self.walks);
            }
            self.groups.for_each(|group| {
                group.tally = Tally::default();
                group.waiting.clear();
            });
        }
        for connection in &sample.connections {
            if !matches!(connection.state, state::SYN_SENT | state::SYN_RECV) {
                self.look(connection, sample.mono_ns, all, targets);
            }
        }
        if all {
            self.forget_gone(targets);
        }
        self.tell(sample.mono_ns, all, targets, sink);
        if !sink.focus_scope.is_empty() {
            sink.out.awaited = Some(self.awaited(sink.focus_scope));
        }
        if all {
            sink.forget_unseen(Kind::Inflight);
            sink.forget_unseen(Kind::Downstream);
        }
    }
}

impl Conversations {
    /// What waits for an answer, of these targets; at most [`MAX_AWAITED`] of each endpoint, oldest first.
    fn awaited(&self, focus_scope: &BTreeSet<TargetId>) -> Vec<Awaited> {
        let mut awaited = Vec::new();
        for (target, endpoint, group) in self.groups.iter() {
            if !focus_scope.contains(&target) {
                continue;
            }
            for (began_ns, cookie) in group.waiting.iter().take(MAX_AWAITED) {
                if let Some(known) = self.connections.get(*cookie) {
                    awaited.push(Awaited {
                        target,
                        tgid: known.tgid,
                        cookie: *cookie,
                        accepted: matches!(endpoint, Endpoint::Served(_)),
                        read: known.standing != Standing::Unread,
                        began_ns: *began_ns,
                    });
                }
            }
        }
        awaited
    }

    fn look(&mut self, connection: &Connection, now_ns: u64, all: bool, targets: &Targets) {
        let cookie = connection.cookie;
        let (place, seen, before) = match self.connections.next(cookie) {
            Some(known) => {
                let seen = known.conversation.look(connection, now_ns);
                let before = (known.standing, known.began_ns);
                known.walk = self.walks;
                known.standing = seen.standing;
                known.began_ns = seen.began_ns;
                known.tgid = connection.tgid;
                known.fd = connection.fd;
                (known.group, seen, (!all).then_some(before))
            }
            None => {
                let Some((place, seen)) = self.meet(connection, now_ns, all, targets) else {
                    return;
                };
                (place, seen, None)
            }
        };
        let group = self.groups.at(place);
        group.sample = self.samples;
        group.since.add(&seen);
        group.count(cookie, before, &seen, all);
    }

    /// At first sight: its group's place, and what it is about. `None`: not of a target.
    fn meet(
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
        let walked = self.since.get(&target);
        let fresh = walked.is_some_and(|first| *first < self.walks || !all);
        let (conversation, seen) = Conversation::first(connection, role, fresh, now_ns);
        let place = self.groups.place(target, endpoint);
        let group = self.groups.at(place);
        if let Endpoint::Opened(remote) = endpoint {
            let behind = || downstream::Behind::new(connection, remote);
            group.behind.get_or_insert_with(behind);
        }
        group.netns = connection.netns;
        let known = Known {
            group: place,
            walk: self.walks,
            conversation,
            standing: seen.standing,
            began_ns: seen.began_ns,
            tgid: connection.tgid,
            fd: connection.fd,
            remote: connection.remote,
        };
        self.connections.insert(connection.cookie, known);
        Some((place, seen))
    }

    /// Connections that came and went between two looks: each brought a request at least, which was answered.
    fn count_unseen(&mut self, before: &Before) {
        for ((target, netns, port), count) in &before.accepted {
            let endpoint = Endpoint::Served(*port);
            let serves = count.is_some_and(|count| count > 0);
            // A service none of whose connections was ever seen has a queue, too, when it serves.
            if !serves && !self.groups.has(*target, endpoint) {
                continue;
            }
            let place = self.groups.place(*target, endpoint);
            let group = self.groups.at(place);
            group.netns = *netns;
            group.unseen = match count {
                Some(count) => group.unseen.saturating_add_unsigned(*count),
                None => 0,
            };
            // Those that are still there are known when all were looked at.
            let Some(new) = &before.new else { continue };
            let seen = new.get(&(*netns, *port)).copied().unwrap_or(0);
            group.unseen = group.unseen.saturating_sub_unsigned(seen);
            if let Ok(unseen @ 1..) = u64::try_from(group.unseen) {
                group.unseen = 0;
                group.since.begun = group.since.begun.saturating_add(unseen);
                group.since.answered = group.since.answered.saturating_add(unseen);
                group.since.answers = group.since.answers.saturating_add(unseen);
                group.since.at_least = true;
            }
        }
    }

    /// After a walk over all: connections that it did not see are gone, and what waited on them has left.
    fn forget_gone(&mut self, targets: &Targets) {
        let (walk, groups) = (self.walks, &mut self.groups);
        self.connections.retain(|known| {
            let stays = known.walk == walk;
            if !stays && known.standing.waits() {
                let since = &mut groups.at(known.group).since;
                since.answered += 1;
                since.answers += 1;
                since.at_least = true;
            }
            stays
        });
        let samples = self.samples;
        self.groups.retain(|target, endpoint, group| {
            // A service that nobody is connected to right now is still there.
            let serves =
                matches!(endpoint, Endpoint::Served(port) if targets.listens(group.netns, port));
            group.sample == samples || (serves && targets.get(target).is_some())
        });
    }

    fn tell(&mut self, now_ns: u64, all: bool, targets: &Targets, sink: &mut Sink<'_>) {
        let (samples, nearby) = (self.samples, &self.nearby);
        self.groups.for_each(|group| {
            if all {
                group.waiting.sort_unstable();
            }
            if all || group.sample == samples {
                group.most = group.most.max(group.waiting.len() as u64);
                if let Some(behind) = &mut group.behind {
                    behind.refresh(nearby);
                }
            }
        });
        for (target, endpoint, group) in self.groups.iter() {
            if targets.get(target).is_none() || !(all || group.sample == samples) {
                continue;
            }
            let oldest = group.waiting.first();
            let oldest = oldest.and_then(|(_, cookie)| self.connections.get(*cookie));
            let walked_ns = group.walked_ns.filter(|_| all);
            let told = Told {
                group,
                now_ns,
                elapsed_ns: walked_ns.map(|walked_ns| now_ns.saturating_sub(walked_ns)),
                threads: targets.threads(target),
                oldest: oldest.map(|known| (known.tgid, known.fd, known.remote)),
            };
            let id = endpoint.id();
            match endpoint {
                Endpoint::Served(_) => {
                    sink.put_with(target, Kind::Inflight, &id, || inflight::reading(&told));
                }
                Endpoint::Opened(_) => {
                    sink.put_with(target, Kind::Downstream, &id, || downstream::reading(&told));
                }
            }
        }
        if all {
            self.groups.for_each(|group| {
                group.since = Since::default();
                group.walked_ns = Some(now_ns);
            });
        }
    }
}

impl Group {
    /// Takes in one connection: at a walk over all it is added, else it takes the place of what it was before.
    fn count(&mut self, cookie: u64, before: Option<(Standing, u64)>, seen: &Seen, all: bool) {
        let now = (seen.standing, seen.began_ns);
        if before == Some(now) {
            return;
        }
        if let Some((standing, began_ns)) = before {
            let count = self.tally.of(standing);
            *count = count.saturating_sub(1);
            if standing.waits()
                && let Ok(place) = self.waiting.binary_search(&(began_ns, cookie))
            {
                self.waiting.remove(place);
            }
        }
        *self.tally.of(seen.standing) += 1;
        if seen.standing.waits() {
            let entry = (seen.began_ns, cookie);
            if all {
                self.waiting.push(entry);
            } else if let Err(place) = self.waiting.binary_search(&entry) {
                self.waiting.insert(place, entry);
            }
        }
    }

    /// Ages of what waits, ns, oldest first.
    pub(super) fn ages_ns(&self, now_ns: u64) -> impl Iterator<Item = u64> {
        self.waiting
            .iter()
            .map(move |(began_ns, _)| now_ns.saturating_sub(*began_ns))
    }

    pub(super) fn depth(&self) -> u64 {
        self.waiting.len() as u64
    }

    /// The age that half of what waits has reached, ns.
    pub(super) fn median_age_ns(&self, now_ns: u64) -> Option<u64> {
        self.ages_ns(now_ns).nth(self.waiting.len() / 2)
    }
}

impl Tally {
    fn of(&mut self, standing: Standing) -> &mut u64 {
        match standing {
            Standing::Idle => &mut self.idle,
            Standing::Unread => &mut self.unread,
            Standing::Working => &mut self.working,
            Standing::Outstanding => &mut self.outstanding,
            Standing::Sending => &mut self.sending,
            Standing::Unknown => &mut self.unknown,
            Standing::Push => &mut self.push,
            Standing::Closed => &mut self.closed,
        }
    }

    /// Connections on which one asks and the other answers, or may.
    pub(super) fn conversations(&self) -> u64 {
        self.idle + self.unread + self.working + self.outstanding + self.sending + self.unknown
    }
}

impl Since {
    fn add(&mut self, seen: &Seen) {
        self.begun += u64::from(seen.begun);
        self.answered += u64::from(seen.answered);
        self.answers += u64::from(seen.answers);
        self.at_least |= seen.at_least;
        self.lost += u64::from(seen.lost);
        if let Some(took_ns) = seen.took_ns {
            self.took_ns += u128::from(took_ns);
            self.timed += 1;
        }
    }

    /// Answers per second over so long.
    pub(super) fn responses_per_s(&self, elapsed_ns: u64) -> Option<f64> {
        (elapsed_ns > 0).then(|| self.answers as f64 * 1e9 / elapsed_ns as f64)
    }

    /// How long those took that were answered, on average, ns.
    pub(super) fn answer_ns(&self) -> Option<f64> {
        (self.timed > 0).then(|| self.took_ns as f64 / self.timed as f64)
    }
}

#[cfg(test)]
mod tests;
