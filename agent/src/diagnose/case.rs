//! The input of a verdict: an episode and everything observed during it.

use super::{
    inputs::Inputs,
    listening_sockets::Uneven,
    served::Served,
    wait_graph::{Step, View},
};
use crate::{
    event::{Activity, Confidence, Episode, share_of},
    queue::Kind,
    sample::TargetId,
};

/// One episode, and what was observed during it.
#[derive(Clone, Copy)]
pub(super) struct Case<'a> {
    pub(super) view: View<'a>,
    pub(super) inputs: &'a Inputs,
    pub(super) episode: &'a Episode,
    /// More work arrived at this service than its baseline, as one of its queues shows.
    pub(super) surges: bool,
    /// Some listening sockets of the queue's address have a standing queue while others are empty.
    pub(super) uneven: Option<&'a Uneven>,
    /// The connections over which the service passes on the items of the queue, if it does.
    pub(super) served: Option<&'a Served>,
    /// The wait chain that begins at the threads that serve the queue. Empty where nothing was sampled.
    pub(super) steps: &'a [Step],
}

impl<'a> Case<'a> {
    /// The service that serves the queue: the one whose queue it is; of a queue inside a service, the one that takes items from it, if
    /// it is known.
    pub(super) fn target(self) -> TargetId {
        let key = &self.episode.key;
        let consumer = || self.first()?.target;
        let is_consumed = key.kind == Kind::App && self.served.is_none();
        let other = is_consumed.then(consumer).flatten();
        other.unwrap_or(key.target)
    }

    /// How sure the threads that serve a queue inside a service can make a verdict, and why not surer. Consumers on other machines, or
    /// whose address is unknown, may do something else than those that are sampled.
    pub(super) fn known_consumers(self) -> (Confidence, Option<String>) {
        let key = &self.episode.key;
        if let Some(served) = self.served {
            let fact = "the service does not name the servers of the queue: those of its only calls were taken for them";
            return match served.is_named || served.words().is_some() {
                true => (Confidence::High, served.words()),
                false => (Confidence::Medium, Some(fact.to_owned())),
            };
        }
        let named = self.view.consumers.of(key);
        if key.kind != Kind::App || named.is_empty() {
            return (Confidence::High, None);
        }
        let all = self.reported("consumers");
        let known = named.len();
        if let Some(all) = all.filter(|all| *all > known as f64) {
            let fact = format!("{known} of {all} consumers are known processes of this machine");
            return (Confidence::Medium, Some(fact));
        }
        let sampled = self.first().map(|first| first.threads.tgids());
        let is_other = |tgid: &u32| !named.contains(tgid);
        if sampled.iter().flatten().any(is_other) {
            let fact = "the consumers are idle themselves, so their service was observed";
            return (Confidence::Medium, Some(fact.to_owned()));
        }
        (Confidence::High, None)
    }

    /// A further measure that the service reports of the queue inside it.
    pub(super) fn reported(self, name: &str) -> Option<f64> {
        let key = &self.episode.key;
        let mut queues = self.inputs.of(key.target, Kind::App);
        let (_, reading) = queues.find(|(other, _)| *other == key)?;
        reading.extra(name)
    }

    /// The window in which it is judged, from and to, CLOCK_MONOTONIC, ns.
    pub(super) fn time(self) -> (u64, u64) {
        (self.view.window.from_ns, self.view.window.to_ns)
    }

    /// The threads that serve the queue.
    pub(super) fn first(self) -> Option<&'a Step> {
        self.steps.first()
    }

    /// The end of the wait chain.
    pub(super) fn last(self) -> Option<&'a Step> {
        self.steps.last()
    }

    /// The share of an activity in the wall time of the threads that serve the queue, 0 to 1.
    pub(super) fn share(self, activity: Activity) -> f64 {
        self.first()
            .map_or(0.0, |first| share_of(&first.shares, activity))
    }

    /// The number of samples of the threads that serve the queue.
    pub(super) fn samples(self) -> u64 {
        self.first()
            .map_or(0, |first| first.threads.samples(self.view.window))
    }

    /// The uneven sockets, if the threads that serve the queue are those that should accept from the ones with a standing
    /// queue.
    pub(super) fn uneven_workers(self) -> Option<&'a Uneven> {
        let is_known =
            |uneven: &&Uneven| !uneven.holders.is_empty() || self.threads() <= uneven.standing;
        self.uneven.filter(is_known)
    }

    /// The number of threads that serve the queue.
    pub(super) fn threads(self) -> usize {
        self.first().map_or(0, |first| first.threads.len())
    }
}
