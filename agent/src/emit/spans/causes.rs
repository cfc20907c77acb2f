//! The spans of causes: on the service that suffers, on those that the jam leads through, and the links between them.

use std::sync::Arc;

use opentelemetry::trace::{Link, SpanContext, TraceFlags, TraceState};
use opentelemetry_sdk::trace::SpanLinks;

use super::{Attributes, Batch, Draft, Spans, batch, onset_id, span_id};
use crate::{
    event::{CauseStretch, Hop, Verdict},
    sample::TargetId,
};

/// Steps of a path that become spans.
const MAX_HOPS: usize = 8;

impl Spans {
    /// One stretch of one cause, and the same of each service on the way to its head that has no episode to show itself.
    pub(super) fn cause(&mut self, stretch: &CauseStretch) -> Vec<Batch> {
        // A cause that is told when it is first seen has not lasted yet: its stretch is still to come.
        if stretch.to <= stretch.from {
            return Vec::new();
        }
        let CauseStretch {
            incident: id,
            episode,
            key,
            verdict,
            index,
            ..
        } = stretch;
        let index = index.to_string();
        let Some((trace, resource)) = self.open.get(id).and_then(|incident| {
            let onset = incident.open(episode)?;
            Some((incident.trace, Arc::clone(&onset.resource)))
        }) else {
            return self.stray();
        };
        let draft = |id, cause: &str| Draft {
            trace,
            id,
            parent: onset_id(episode),
            name: format!("queue.cause {cause}").into(),
            from: stretch.from,
            to: stretch.to,
        };
        let mut batches = Vec::new();
        for (place, hop) in self.hops(key.target, verdict) {
            let Some((target, resource)) = hop
                .target
                .and_then(|target| Some((target, Arc::clone(self.targets.get(&target)?))))
            else {
                continue;
            };
            let span_id = span_id(&[episode, "cause", &index, "hop", &place.to_string()]);
            let attributes = Attributes::default().hop(stretch, hop);
            let span = draft(span_id, hop.cause.name()).finish(&self.scope, attributes);
            if let Some(incident) = self.open.get_mut(id) {
                incident.lead_through(target, span_id);
            }
            batches.push(batch(resource, vec![span]));
        }
        let span = draft(span_id(&[episode, "cause", &index]), verdict.cause.name());
        let mut span = span.finish(&self.scope, Attributes::default().cause(stretch));
        span.links = self.links(id, key.target, Some(verdict));
        batches.push(batch(resource, vec![span]));
        batches
    }

    /// Steps of the path in services that have no episode open, with their places in it.
    fn hops<'v>(&self, own: TargetId, verdict: &'v Verdict) -> Vec<(usize, &'v Hop)> {
        let shows_itself = |target: TargetId| {
            let onsets = self.open.values().flat_map(|it| it.onsets.values());
            target == own
                || onsets
                    .into_iter()
                    .any(|it| it.target == target && !it.has_ended)
        };
        let is_wanted = |hop: &Hop| {
            let target = hop
                .target
                .filter(|target| self.targets.contains_key(target));
            target.is_some_and(|target| !shows_itself(target))
        };
        verdict
            .path
            .iter()
            .enumerate()
            .filter(|(_, hop)| is_wanted(hop))
            .take(MAX_HOPS)
            .collect()
    }

    /// From a victim to its culprit: where that has an episode, to its onset, which was sent already; where the jam only
    /// led to it, to the span that says so.
    pub(super) fn links(
        &self,
        incident: &str,
        victim: TargetId,
        verdict: Option<&Verdict>,
    ) -> SpanLinks {
        let mut links = SpanLinks::default();
        let culprit = verdict.and_then(|verdict| verdict.culprit.as_ref()?.target);
        let Some(culprit) = culprit.filter(|culprit| *culprit != victim) else {
            return links;
        };
        let context =
            |trace, id| SpanContext::new(trace, id, TraceFlags::SAMPLED, false, TraceState::NONE);
        // An episode of the same incident, the open ones and of those the first to fill; else an open one of another.
        let own = self.open.get(incident);
        let onsets = self.open.iter().flat_map(|(id, it)| {
            let is_other = id != incident;
            it.onsets
                .iter()
                .filter(move |(_, onset)| onset.target == culprit)
                .filter(move |(_, onset)| !(is_other && onset.has_ended))
                .map(move |(episode, onset)| {
                    ((is_other, onset.has_ended, onset.place, episode), it.trace)
                })
        });
        let onset = onsets
            .min_by_key(|(rank, _)| *rank)
            .map(|((.., id), trace)| context(trace, onset_id(id)));
        let led_to = || {
            let own = own?;
            Some(context(own.trace, *own.led_through.get(&culprit)?))
        };
        links.links = onset
            .or_else(led_to)
            .map(Link::with_context)
            .into_iter()
            .collect();
        links
    }
}

#[cfg(test)]
mod tests;
