//! The bounded queue of spans that wait for the collector. Pure.
//!
//! A span that does not fit is dropped on arrival, so queued spans are never evicted. A span whose parent was dropped is
//! dropped too: a trace may end early, but has no holes.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use opentelemetry::trace::SpanId;
use opentelemetry_proto::{
    tonic::trace::v1::Span, transform::trace::tonic::group_spans_by_resource_and_scope,
};
use opentelemetry_sdk::{Resource, trace::SpanData};
use prost::Message as _;

use crate::emit::spans::Batch;

/// Maximum number of bytes in one request, before compression: the default limit of gRPC servers for a received
/// message.
pub const MAX_REQUEST_BYTES: usize = 4 << 20;
/// Maximum number of spans in one request: if it is refused, all of them are lost. 512 is the batch size of
/// OpenTelemetry's SDKs.
const MAX_REQUEST_SPANS: usize = 512;
/// Maximum number of ids of lost spans remembered, by which their children are recognized.
const MAX_REMEMBERED: usize = 16_384;
/// Upper bound of protobuf's tag and length around a span, a scope or a resource.
const FRAME_BYTES: usize = 8;
/// Upper bound of the encoded instrumentation scope: its name and version.
const SCOPE_BYTES: usize = 64;

/// Why a span was not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The spool was full.
    SpoolFull,
    /// Its parent was lost.
    ParentLost,
    /// It alone exceeds the size limit of a request.
    TooLarge,
    /// The collector refused it.
    Refused,
    /// The collector's response was not valid OTLP.
    InvalidResponse,
    /// The agent ended before the span was delivered.
    Shutdown,
}

impl Reason {
    /// The reason's name in every output.
    pub fn name(self) -> &'static str {
        match self {
            Self::SpoolFull => "spool_full",
            Self::ParentLost => "parent_lost",
            Self::TooLarge => "too_large",
            Self::Refused => "refused",
            Self::InvalidResponse => "invalid_response",
            Self::Shutdown => "shutdown",
        }
    }
}

/// The spans of one request. They stay in the spool until the request is accepted or refused.
#[derive(Clone, Debug)]
pub struct Request {
    pub resource: Arc<Resource>,
    pub spans: Vec<Arc<SpanData>>,
}

struct Entry {
    resource: Arc<Resource>,
    span: Arc<SpanData>,
    bytes: usize,
}

/// A queue of spans bounded by count and bytes.
pub struct Spool {
    max_spans: usize,
    max_bytes: usize,
    waiting: VecDeque<Entry>,
    bytes: usize,
    lost: Lost,
}

impl Spool {
    pub fn new(max_spans: usize, max_bytes: usize) -> Self {
        Self {
            max_spans,
            max_bytes,
            waiting: VecDeque::new(),
            bytes: 0,
            lost: Lost::default(),
        }
    }

    /// Queues the spans that fit and returns a reason for each one dropped.
    pub fn push(&mut self, batch: Batch) -> Vec<Reason> {
        let envelope = envelope_bytes(&batch.resource);
        let mut dropped = Vec::new();
        for span in batch.spans {
            let bytes = Span::from(span.clone()).encoded_len() + FRAME_BYTES;
            let reason = if self.lost.contains(span.parent_span_id) {
                Reason::ParentLost
            } else if envelope + bytes > MAX_REQUEST_BYTES {
                Reason::TooLarge
            } else if self.waiting.len() >= self.max_spans || self.bytes + bytes > self.max_bytes {
                Reason::SpoolFull
            } else {
                self.bytes += bytes;
                let resource = Arc::clone(&batch.resource);
                self.waiting.push_back(Entry {
                    resource,
                    span: Arc::new(span),
                    bytes,
                });
                continue;
            };
            self.lost.remember(span.span_context.span_id());
            dropped.push(reason);
        }
        dropped
    }

    /// The next request: the oldest spans of one resource, in order, up to the request limits.
    pub fn head(&self) -> Option<Request> {
        let first = self.waiting.front()?;
        let resource = Arc::clone(&first.resource);
        let mut bytes = envelope_bytes(&resource);
        let fitting = self
            .waiting
            .iter()
            .take(MAX_REQUEST_SPANS)
            .take_while(|entry| {
                bytes += entry.bytes;
                bytes <= MAX_REQUEST_BYTES && is_same(&entry.resource, &resource)
            });
        let spans = fitting.map(|entry| Arc::clone(&entry.span)).collect();
        Some(Request { resource, spans })
    }

    /// The oldest `count` spans were delivered.
    pub fn delivered(&mut self, count: usize) {
        for entry in self.waiting.drain(..count.min(self.waiting.len())) {
            self.bytes -= entry.bytes;
        }
    }

    /// Drops the oldest `count` spans and their queued descendants; returns the number of descendants.
    pub fn refused(&mut self, count: usize) -> usize {
        for entry in self.waiting.drain(..count.min(self.waiting.len())) {
            self.bytes -= entry.bytes;
            self.lost.remember(entry.span.span_context.span_id());
        }
        let before = self.waiting.len();
        let Self {
            waiting,
            lost,
            bytes,
            ..
        } = self;
        // Parents precede their children, so one pass is enough.
        waiting.retain(|entry| {
            let orphan = lost.contains(entry.span.parent_span_id);
            if orphan {
                *bytes -= entry.bytes;
                lost.remember(entry.span.span_context.span_id());
            }
            !orphan
        });
        before - self.waiting.len()
    }

    /// Drops all queued spans and returns their number.
    pub fn clear(&mut self) -> usize {
        self.bytes = 0;
        self.waiting.drain(..).count()
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

fn is_same(a: &Arc<Resource>, b: &Arc<Resource>) -> bool {
    Arc::ptr_eq(a, b) || a == b
}

/// The size of a request without spans: its resource and scope.
fn envelope_bytes(resource: &Resource) -> usize {
    let empty = group_spans_by_resource_and_scope(Vec::new(), &resource.into());
    empty
        .iter()
        .map(|spans| spans.encoded_len() + FRAME_BYTES)
        .sum::<usize>()
        + SCOPE_BYTES
}

/// The ids of the most recently lost spans.
#[derive(Default)]
struct Lost {
    ids: HashSet<SpanId>,
    order: VecDeque<SpanId>,
}

impl Lost {
    fn contains(&self, id: SpanId) -> bool {
        self.ids.contains(&id)
    }

    fn remember(&mut self, id: SpanId) {
        // The parent id of every root span.
        if id == SpanId::INVALID {
            return;
        }
        if self.ids.insert(id) {
            self.order.push_back(id);
        }
        if self.order.len() > MAX_REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::{
        InstrumentationScope, KeyValue,
        trace::{SpanContext, SpanKind, Status, TraceFlags, TraceId, TraceState},
    };
    use opentelemetry_sdk::trace::{SpanEvents, SpanLinks};

    use super::*;

    fn span(id: u64, parent: u64, bytes: usize) -> SpanData {
        let context = SpanContext::new(
            TraceId::from(1),
            SpanId::from(id),
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        );
        SpanData {
            span_context: context,
            parent_span_id: SpanId::from(parent),
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: "queue.level accept warn".into(),
            start_time: std::time::UNIX_EPOCH,
            end_time: std::time::UNIX_EPOCH,
            attributes: vec![KeyValue::new("padding", "x".repeat(bytes))],
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::builder("tailback").build(),
        }
    }

    fn batch(service: &str, spans: Vec<SpanData>) -> Batch {
        let name = KeyValue::new("service.name", service.to_owned());
        let resource = Resource::builder_empty().with_attributes([name]).build();
        Batch {
            resource: Arc::new(resource),
            spans,
        }
    }

    fn large_spool() -> Spool {
        Spool::new(1000, 100 << 20)
    }

    fn ids(request: &Request) -> Vec<u64> {
        let id = |span: &Arc<SpanData>| u64::from_be_bytes(span.span_context.span_id().to_bytes());
        request.spans.iter().map(id).collect()
    }

    #[test]
    fn requests_keep_the_order_and_have_one_resource_each() {
        let mut spool = large_spool();
        for (service, id) in [("a", 1), ("a", 2), ("b", 3), ("a", 4)] {
            assert!(spool.push(batch(service, vec![span(id, 0, 0)])).is_empty());
        }
        for expected in [vec![1, 2], vec![3], vec![4]] {
            let request = spool.head().unwrap();
            assert_eq!(ids(&request), expected);
            spool.delivered(request.spans.len());
        }
        assert!(spool.head().is_none(), "never an empty request");
        assert_eq!((spool.len(), spool.bytes()), (0, 0));
    }

    #[test]
    fn a_request_stays_in_the_spool_until_it_is_settled() {
        let mut spool = large_spool();
        spool.push(batch("a", vec![span(1, 0, 0)]));
        assert_eq!(ids(&spool.head().unwrap()), ids(&spool.head().unwrap()));
        assert_eq!(spool.len(), 1);
    }

    #[test]
    fn no_request_exceeds_the_size_limit() {
        let mut spool = large_spool();
        let spans = (1..=10).map(|id| span(id, 0, 1 << 20)).collect();
        assert!(spool.push(batch("a", spans)).is_empty());
        let mut sizes = Vec::new();
        while let Some(request) = spool.head() {
            let spans = request
                .spans
                .iter()
                .map(|span| SpanData::clone(span))
                .collect();
            let encoded =
                group_spans_by_resource_and_scope(spans, &request.resource.as_ref().into());
            let bytes: usize = encoded.iter().map(|one| one.encoded_len() + 6).sum();
            assert!(bytes <= MAX_REQUEST_BYTES, "{bytes}");
            sizes.push(request.spans.len());
            spool.delivered(request.spans.len());
        }
        assert_eq!(sizes, [3, 3, 3, 1]);
    }

    #[test]
    fn a_span_above_the_size_limit_is_dropped_with_its_children_only() {
        let mut spool = large_spool();
        let spans = vec![span(1, 0, 5 << 20), span(2, 1, 0), span(3, 0, 0)];
        assert_eq!(
            spool.push(batch("a", spans)),
            [Reason::TooLarge, Reason::ParentLost]
        );
        assert_eq!(ids(&spool.head().unwrap()), [3]);
    }

    #[test]
    fn a_full_spool_keeps_queued_spans_and_drops_new_ones() {
        let mut spool = Spool::new(2, 1 << 20);
        let spans = vec![span(1, 0, 0), span(2, 1, 0), span(3, 0, 0)];
        assert_eq!(spool.push(batch("a", spans)), [Reason::SpoolFull]);
        assert_eq!(ids(&spool.head().unwrap()), [1, 2]);
        let mut spool = Spool::new(100, 1000);
        let spans = vec![span(1, 0, 600), span(2, 0, 600), span(3, 0, 0)];
        assert_eq!(spool.push(batch("a", spans)), [Reason::SpoolFull]);
        assert_eq!(
            ids(&spool.head().unwrap()),
            [1, 3],
            "a later span that still fits is queued"
        );
    }

    #[test]
    fn later_children_of_a_dropped_span_are_dropped_but_siblings_are_not() {
        let mut spool = Spool::new(1, 1 << 20);
        assert_eq!(
            spool.push(batch("a", vec![span(1, 0, 0), span(2, 1, 0)])),
            [Reason::SpoolFull]
        );
        spool.delivered(1);
        assert_eq!(
            spool.push(batch("a", vec![span(3, 2, 0)])),
            [Reason::ParentLost]
        );
        assert_eq!(
            spool.push(batch("a", vec![span(4, 3, 0)])),
            [Reason::ParentLost],
            "a grandchild"
        );
        assert!(
            spool.push(batch("a", vec![span(5, 1, 0)])).is_empty(),
            "a sibling"
        );
    }

    #[test]
    fn descendants_of_a_refused_span_are_dropped_with_it() {
        let mut spool = large_spool();
        spool.push(batch("a", vec![span(1, 0, 0)]));
        spool.push(batch(
            "b",
            vec![span(2, 1, 0), span(3, 2, 0), span(4, 0, 0)],
        ));
        assert_eq!(spool.head().unwrap().spans.len(), 1);
        assert_eq!(spool.refused(1), 2);
        assert_eq!(ids(&spool.head().unwrap()), [4]);
        spool.delivered(1);
        assert_eq!(spool.bytes(), 0);
    }

    #[test]
    fn the_number_of_remembered_lost_spans_is_bounded() {
        let mut spool = Spool::new(0, 0);
        let spans = (1..=MAX_REMEMBERED as u64 + 10)
            .map(|id| span(id, 0, 0))
            .collect();
        spool.push(batch("a", spans));
        assert_eq!(spool.lost.ids.len(), MAX_REMEMBERED);
        assert_eq!(spool.lost.order.len(), MAX_REMEMBERED);
        assert!(
            spool
                .lost
                .contains(SpanId::from(MAX_REMEMBERED as u64 + 10))
        );
    }
}
