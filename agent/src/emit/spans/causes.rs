//! Spans of causes: for the affected service and for each service on its wait chain, with links to the culprit.

use std::sync::Arc;

use opentelemetry::trace::{Link, SpanContext, TraceFlags, TraceState};
use opentelemetry_sdk::trace::SpanLinks;

use super::{Attributes, Batch, Draft, Spans, batch, onset_id, span_id};
use crate::{
    event::{CauseStretch, Hop, Verdict},
    sample::TargetId,
};

/// Maximum number of hops of a wait chain that become spans.
const MAX_HOPS: usize = 8;

impl Spans {
    /// The span of one cause over one stretch of time, and one for each service on the wait chain without an episode.
    pub(super) fn cause(&mut self, stretch: &CauseStretch) -> Vec<Batch> {
        // A cause that was just found has no duration yet; its span follows later.
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
            return self.orphan();
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
        for (position, hop) in self.hops(key.target, verdict) {
            let Some((target, resource)) = hop
                .target
                .and_then(|target| Some((target, Arc::clone(self.targets.get(&target)?))))
            else {
                continue;
            };
            let span_id = span_id(&[episode, "cause", &index, "hop", &position.to_string()]);
            let attributes = Attributes::default().hop(stretch, hop);
            let span = draft(span_id, hop.cause.name()).finish(&self.scope, attributes);
            if let Some(incident) = self.open.get_mut(id) {
                incident.add_chain_span(target, span_id);
            }
            batches.push(batch(resource, vec![span]));
        }
        let span = draft(span_id(&[episode, "cause", &index]), verdict.cause.name());
        let mut span = span.finish(&self.scope, Attributes::default().cause(stretch));
        span.links = self.links(id, key.target, Some(verdict));
        batches.push(batch(resource, vec![span]));
        batches
    }

    /// The hops in services without an open episode, with their indices.
    fn hops<'v>(&self, own: TargetId, verdict: &'v Verdict) -> Vec<(usize, &'v Hop)> {
        let has_open_episode = |target: TargetId| {
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
            target.is_some_and(|target| !has_open_episode(target))
        };
        verdict
            .path
            .iter()
            .enumerate()
            .filter(|(_, hop)| is_wanted(hop))
            .take(MAX_HOPS)
            .collect()
    }

    /// A link from an affected service to its culprit: to the onset of the culprit's episode, which was sent before, or
    /// else to the culprit's span on the wait chain.
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
        // Prefer the same incident, then open episodes, then the first to fill; else an open episode of another incident.
        let own = self.open.get(incident);
        let onsets = self.open.iter().flat_map(|(id, it)| {
            let is_other = id != incident;
            it.onsets
                .iter()
                .filter(move |(_, onset)| onset.target == culprit)
                .filter(move |(_, onset)| !(is_other && onset.has_ended))
                .map(move |(episode, onset)| {
                    ((is_other, onset.has_ended, onset.index, episode), it.trace)
                })
        });
        let onset = onsets
            .min_by_key(|(rank, _)| *rank)
            .map(|((.., id), trace)| context(trace, onset_id(id)));
        let chain_span = || {
            let own = own?;
            Some(context(own.trace, *own.chain_spans.get(&culprit)?))
        };
        links.links = onset
            .or_else(chain_span)
            .map(Link::with_context)
            .into_iter()
            .collect();
        links
    }
}

#[cfg(test)]
mod tests;
