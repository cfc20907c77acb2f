//! Spans and exporters for the delivery tests.

use std::{sync::Arc, time::Duration};

use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState},
};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanEvents, SpanLinks},
};
use tailback::emit::{
    otlp::{Exporter, OtlpConfig, OtlpStats, Retry},
    spans::Batch,
};
use tailback_tests::wait;

use crate::collector::DEADLINE;

/// A span with this id; `parent` 0 makes it a root.
pub fn span(id: u64, parent: u64) -> SpanData {
    let state = TraceState::NONE;
    let context = SpanContext::new(
        TraceId::from(1),
        SpanId::from(id),
        TraceFlags::SAMPLED,
        false,
        state,
    );
    SpanData {
        span_context: context,
        parent_span_id: SpanId::from(parent),
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: "queue.level accept warn".into(),
        start_time: std::time::UNIX_EPOCH,
        end_time: std::time::UNIX_EPOCH,
        attributes: Vec::new(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: InstrumentationScope::builder("tailback").build(),
    }
}

/// A span of about this size.
pub fn large(id: u64, bytes: usize) -> SpanData {
    SpanData {
        attributes: vec![KeyValue::new("padding", "x".repeat(bytes))],
        ..span(id, 0)
    }
}

pub fn batch(service: &'static str, spans: Vec<SpanData>) -> Batch {
    let resource =
        Resource::builder_empty().with_attributes([KeyValue::new("service.name", service)]);
    Batch {
        resource: Arc::new(resource.build()),
        spans,
    }
}

/// One batch of roots of one service.
pub fn roots(ids: impl IntoIterator<Item = u64>) -> Batch {
    batch("shop", ids.into_iter().map(|id| span(id, 0)).collect())
}

/// The configuration of `--otlp URL`, with shorter retry delays.
pub fn config(url: &str) -> OtlpConfig {
    let config = OtlpConfig::resolve(Some(url), &|_| None).unwrap().unwrap();
    let retry = Retry {
        initial: Duration::from_millis(20),
        max: Duration::from_millis(100),
        ..Retry::default()
    };
    OtlpConfig { retry, ..config }
}

pub fn exporter(url: &str) -> Exporter {
    Exporter::start(&config(url)).unwrap()
}

/// Waits until no span is pending and returns the statistics.
pub fn wait_settled(exporter: &Exporter) -> OtlpStats {
    let none_waits = || Ok(Some(exporter.stats()).filter(|stats| stats.waiting == 0));
    let stats = wait::until("the end of delivery", DEADLINE, none_waits).unwrap();
    assert_eq!(
        stats.submitted,
        stats.delivered + stats.rejected + stats.dropped()
    );
    stats
}

/// Codes and texts of the notices.
pub fn notices(exporter: &Exporter) -> Vec<(String, String)> {
    exporter
        .notices()
        .into_iter()
        .map(|notice| (notice.code, notice.text))
        .collect()
}

pub fn codes(notices: &[(String, String)]) -> Vec<&str> {
    notices.iter().map(|(code, _)| code.as_str()).collect()
}
