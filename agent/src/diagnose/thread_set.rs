//! Threads that are judged together, each with a weight.

use std::collections::BTreeSet;

use super::{
    classify::Thread,
    profile::{Lock, ThreadProfile, Window},
};
use crate::{event::Activity, sample::TargetId};

/// Threads, each with its weight.
#[derive(Clone, Debug, Default)]
pub(super) struct ThreadSet {
    pub(super) members: Vec<(Thread, f64)>,
    /// Only their time while they hold this lock counts.
    while_holding: Option<Lock>,
}

impl ThreadSet {
    /// Threads of equal weight.
    pub(super) fn of(threads: impl IntoIterator<Item = Thread>) -> Self {
        Self::weighted(threads.into_iter().map(|thread| (thread, 1.0)).collect())
    }

    pub(super) fn weighted(members: Vec<(Thread, f64)>) -> Self {
        Self {
            members,
            while_holding: None,
        }
    }

    /// The holders of a lock, weighted by how long each held it while others waited. `None`: no holder was seen.
    pub(super) fn holding(lock: Lock, window: &Window) -> Option<Self> {
        let holders = window.holders(lock)?;
        let weight = |profile: &ThreadProfile| f64::from(profile.samples);
        let members = holders
            .iter()
            .map(|(thread, profile)| (*thread, weight(profile)));
        Some(Self {
            members: members.collect(),
            while_holding: Some(lock),
        })
    }

    pub(super) fn while_holding(&self) -> Option<Lock> {
        self.while_holding
    }

    /// The processes that they belong to.
    pub(super) fn tgids(&self) -> BTreeSet<u32> {
        self.members.iter().map(|((tgid, _), _)| *tgid).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// Each thread with its weight and its profile over the time that counts. Threads without samples are left out.
    pub(super) fn profiles<'a>(
        &'a self,
        window: &'a Window,
    ) -> impl Iterator<Item = (Thread, f64, &'a ThreadProfile)> {
        let profile = move |thread: &Thread| match self.while_holding {
            Some(lock) => window.holders(lock)?.get(thread),
            None => window.of(*thread),
        };
        self.members
            .iter()
            .filter_map(move |(thread, weight)| Some((*thread, *weight, profile(thread)?)))
    }

    /// Samples of all threads.
    pub(super) fn samples(&self, window: &Window) -> u64 {
        self.profiles(window)
            .map(|(.., profile)| u64::from(profile.samples))
            .sum()
    }

    /// Shares of their wall time by activity, each thread by its weight; largest first, with a sum of 1. The run queue of
    /// `target` shows who had the CPU while they waited for one.
    pub(super) fn shares(&self, window: &Window, target: Option<TargetId>) -> Vec<(Activity, f64)> {
        window.shares(self.profiles(window), target)
    }
}
