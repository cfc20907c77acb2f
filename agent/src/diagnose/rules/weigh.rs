//! How much the time speaks for a cause, what else it may be, and how far the verdict can be trusted.

use super::Finding;
use crate::{
    diagnose::{Activity, Cause, Confidence, wait_graph::Step},
    event::share_of,
};

/// Shares by which a verdict is trusted much, and somewhat.
const SURE: f64 = 0.6;
const LIKELY: f64 = 0.35;
/// Looks without which a verdict is a suspicion.
const ENOUGH_LOOKS: u64 = 40;

pub(super) fn share(step: &Step, activity: Activity) -> f64 {
    share_of(&step.shares, activity)
}

/// Which cause an activity speaks for, where nothing more is known.
pub(in crate::diagnose) fn spoken_for(activity: Activity) -> Cause {
    match activity {
        Activity::Idle | Activity::Unknown => Cause::Unknown,
        Activity::OnCpu | Activity::RunnableOwn => Cause::CpuBound,
        Activity::RunnableForeign | Activity::Stolen => Cause::CpuStarved,
        Activity::Throttled => Cause::CpuThrottled,
        Activity::Downstream => Cause::DownstreamSlow,
        Activity::PeerRead => Cause::PeerNotReading,
        Activity::PeerSend => Cause::PeerNotSending,
        Activity::Lock => Cause::LockContention,
        Activity::Disk => Cause::DiskSlow,
        Activity::Output => Cause::OutputBlocked,
        Activity::Memory => Cause::MemoryStalled,
        Activity::Asleep | Activity::Inside => Cause::UndersizedLimit,
        Activity::Stopped => Cause::ConsumerStalled,
    }
}

/// The share of the time that speaks for a cause.
pub(super) fn speaks_for(shares: &[(Activity, f64)], cause: Cause) -> Option<f64> {
    let speaks = |activity: Activity| match cause {
        Cause::PoolExhausted => matches!(
            activity,
            Activity::Downstream | Activity::Idle | Activity::Inside
        ),
        Cause::EventLoopBlocked => activity == Activity::OnCpu,
        Cause::NetworkLimited => activity == Activity::PeerRead,
        Cause::ProducerSurge => activity != Activity::Idle,
        cause => spoken_for(activity) == cause,
    };
    let sum: f64 = shares
        .iter()
        .filter(|(activity, _)| speaks(*activity))
        .map(|(_, share)| share)
        .sum();
    (sum > 0.0).then_some(sum)
}

pub(super) fn runner_up(shares: &[(Activity, f64)], finding: &Finding) -> Option<(Cause, f64)> {
    let cause = finding.cause;
    const WORTH: f64 = 0.05;
    let mut sums: Vec<(Cause, f64)> = Vec::new();
    for (activity, share) in shares {
        let other = spoken_for(*activity);
        match sums.iter_mut().find(|(known, _)| *known == other) {
            Some((_, sum)) => *sum += share,
            None => sums.push((other, *share)),
        }
    }
    let local = |other: Cause| match cause {
        Cause::ProducerSurge | Cause::EventLoopBlocked => other == Cause::CpuBound,
        // Slow calls use a pool up as well: what is usual for them tells the two apart.
        Cause::PoolExhausted => other == Cause::DownstreamSlow && !is_blind(finding),
        _ => false,
    };
    sums.into_iter()
        .filter(|(other, share)| {
            *other != cause && *other != Cause::Unknown && *share >= WORTH && !local(*other)
        })
        .max_by(|a, b| a.1.total_cmp(&b.1))
}

/// It is not known whether calls over the pool take as long as ever.
fn is_blind(finding: &Finding) -> bool {
    finding.pool.as_ref().is_some_and(|pool| !pool.usual_known)
}

pub(super) fn confidence(finding: &Finding, looks: u64) -> Confidence {
    let by_time = match finding.share {
        Some(share) if share >= SURE => Confidence::High,
        Some(share) if share >= LIKELY => Confidence::Medium,
        Some(_) => Confidence::Low,
        // Told by something else than time: a limit that is reached, a window that is closed.
        None => Confidence::High,
    };
    match finding.cause {
        Cause::Unknown => Confidence::Low,
        _ if is_blind(finding) => by_time.min(Confidence::Medium),
        _ if looks < ENOUGH_LOOKS && finding.share.is_some() => by_time.min(Confidence::Medium),
        _ => by_time,
    }
}
