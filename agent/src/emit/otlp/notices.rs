//! Notices about the delivery: one per change, not one per request. Pure.

use std::{collections::HashMap, time::Duration};

use super::response::Problem;
use crate::{sample::Notice, text};

/// A problem that persists or recurs is reported again after this time.
const REPEAT_INTERVAL: Duration = Duration::from_secs(600);
/// Maximum number of kinds of problems remembered; the collector may choose the kind.
const MAX_KINDS: usize = 64;

/// Spans that were, or may have been, lost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lost {
    /// Spans in the request.
    pub spans: usize,
    /// Queued descendants, dropped with their parents.
    pub orphans: usize,
}

/// Decides which notices to report. All times count from one fixed moment.
pub struct Reporter {
    collector: String,
    /// When the collector stopped accepting requests.
    failing: Option<Duration>,
    /// When each kind of problem was last reported.
    reported: HashMap<String, Duration>,
}

impl Reporter {
    pub fn new(collector: String) -> Self {
        Self {
            collector,
            failing: None,
            reported: HashMap::new(),
        }
    }

    /// A request was accepted while `queued` spans were in the spool.
    pub fn accepted(&mut self, now: Duration, queued: usize) -> Option<Notice> {
        let since = self.failing.take()?;
        self.reported.retain(|kind, _| !kind.starts_with("retry "));
        let after = text::duration(nanos(now.saturating_sub(since)));
        let text = format!(
            "collector at {} accepts spans again after {after}; {}",
            self.collector,
            were_queued(queued)
        );
        Some(notice("otlp_delivering", text))
    }

    /// A partial success: the collector accepted a request but rejected some spans, or added a warning.
    pub fn partial(&mut self, now: Duration, rejected: u64, message: &str) -> Option<Notice> {
        if rejected == 0 && message.is_empty() || !self.is_due(now, "partial") {
            return None;
        }
        let why = if message.is_empty() {
            "no reason given".to_owned()
        } else {
            format!("\"{message}\"")
        };
        let text = match rejected {
            0 => format!("collector at {} warns: {why}", self.collector),
            n => format!(
                "collector at {} rejected {}: {why}; not retried",
                self.collector,
                spans(n)
            ),
        };
        Some(notice("otlp_rejected", text))
    }

    /// A request failed and will be retried.
    pub fn retrying(
        &mut self,
        now: Duration,
        why: &Problem,
        wait: Duration,
        queued: usize,
    ) -> Option<Notice> {
        self.failing.get_or_insert(now);
        if !self.is_due(now, &format!("retry {}", why.kind)) {
            return None;
        }
        let text = format!(
            "collector at {} {}{}; {}, next try in {}",
            self.collector,
            why.text,
            remedy(&why.kind),
            are_queued(queued),
            text::duration(nanos(wait)),
        );
        Some(notice("otlp_waiting", text))
    }

    /// A request failed and will not be retried.
    pub fn refused(&mut self, now: Duration, why: &Problem, lost: Lost) -> Option<Notice> {
        if !self.is_due(now, &format!("refused {}", why.kind)) {
            return None;
        }
        let children = match lost.orphans {
            0 => String::new(),
            n => format!(", and {n} descendants"),
        };
        let text = format!(
            "collector at {} {}{}; not retried: {} dropped{children}",
            self.collector,
            why.text,
            remedy(&why.kind),
            spans(lost.spans as u64),
        );
        Some(notice("otlp_refused", text))
    }

    /// Spans were dropped before they entered the spool.
    pub fn dropped(&mut self, now: Duration, reason: &str, remedy: &str) -> Option<Notice> {
        if !self.is_due(now, &format!("dropped {reason}")) {
            return None;
        }
        let text = format!(
            "dropping spans for the collector at {} ({reason}): {remedy}",
            self.collector
        );
        Some(notice("otlp_dropped", text))
    }

    /// Whether this kind is due to be reported; records it as reported.
    fn is_due(&mut self, now: Duration, kind: &str) -> bool {
        if self
            .reported
            .get(kind)
            .is_some_and(|&at| now.saturating_sub(at) < REPEAT_INTERVAL)
        {
            return false;
        }
        if self.reported.len() >= MAX_KINDS {
            self.reported.clear();
        }
        self.reported.insert(kind.to_owned(), now);
        true
    }
}

/// What the user can do about a kind of problem, if anything.
fn remedy(kind: &str) -> &'static str {
    match kind {
        "connect" => " (is it running and listening there?)",
        "broken" | "invalid" => {
            " (OTLP/HTTP is usually port 4318, OTLP/gRPC is 4317: use grpc://HOST:4317)"
        }
        "401" | "403" | "Unauthenticated" | "PermissionDenied" => {
            " (set credentials in OTEL_EXPORTER_OTLP_HEADERS)"
        }
        "404" | "405" | "Unimplemented" => {
            " (is this the traces endpoint? For OTLP/HTTP it usually ends in :4318/v1/traces)"
        }
        "413" | "ResourceExhausted" => {
            " (requests are at most 4 MiB; the collector's limit is lower)"
        }
        _ => "",
    }
}

fn notice(code: &str, text: String) -> Notice {
    Notice {
        code: code.to_owned(),
        text,
    }
}

fn nanos(of: Duration) -> u64 {
    u64::try_from(of.as_nanos()).unwrap_or(u64::MAX)
}

fn spans(n: u64) -> String {
    if n == 1 {
        "1 span".to_owned()
    } else {
        format!("{n} spans")
    }
}

fn are_queued(n: usize) -> String {
    format!("{} queued", spans(n as u64))
}

fn were_queued(n: usize) -> String {
    let were = if n == 1 { "was" } else { "were" };
    format!("{} {were} queued", spans(n as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reporter() -> Reporter {
        Reporter::new("http://c:4318/v1/traces".into())
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn text(notice: Option<Notice>) -> String {
        notice.expect("a notice").text
    }

    fn down() -> Problem {
        Problem::new("connect", "cannot be reached: Connection refused")
    }

    #[test]
    fn successful_delivery_is_silent() {
        let mut reporter = reporter();
        assert_eq!(reporter.accepted(at(1), 3), None);
        assert_eq!(reporter.partial(at(1), 0, ""), None);
    }

    #[test]
    fn an_outage_is_reported_at_its_start_and_its_end() {
        let mut reporter = reporter();
        assert_eq!(
            text(reporter.retrying(at(10), &down(), Duration::from_millis(500), 3)),
            "collector at http://c:4318/v1/traces cannot be reached: Connection refused (is it running and \
             listening there?); 3 spans queued, next try in 500 ms"
        );
        assert_eq!(reporter.retrying(at(11), &down(), at(1), 4), None);
        assert_eq!(
            text(reporter.accepted(at(22), 30)),
            "collector at http://c:4318/v1/traces accepts spans again after 12 s; 30 spans were queued"
        );
        assert_eq!(reporter.accepted(at(23), 1), None);
        assert!(
            reporter.retrying(at(24), &down(), at(1), 1).is_some(),
            "the next outage is news"
        );
    }

    #[test]
    fn an_outage_is_reported_again_when_its_kind_changes_or_it_persists() {
        let mut reporter = reporter();
        assert!(reporter.retrying(at(0), &down(), at(1), 1).is_some());
        assert!(
            reporter
                .retrying(at(1), &Problem::new("503", "returned 503"), at(1), 1)
                .is_some()
        );
        assert!(reporter.retrying(at(2), &down(), at(1), 1).is_none());
        assert!(reporter.retrying(at(700), &down(), at(30), 9).is_some());
        assert!(
            text(reporter.accepted(at(720), 9)).contains("after 12 min"),
            "counted from the start of the outage"
        );
    }

    #[test]
    fn a_refusal_is_reported_once_per_kind() {
        let mut reporter = reporter();
        let bad = Problem::new("400", "returned 400 Bad Request: \"no\"");
        let lost = Lost {
            spans: 3,
            orphans: 2,
        };
        assert_eq!(
            text(reporter.refused(at(0), &bad, lost)),
            "collector at http://c:4318/v1/traces returned 400 Bad Request: \"no\"; not retried: 3 spans dropped, \
             and 2 descendants"
        );
        assert_eq!(reporter.refused(at(1), &bad, lost), None);
        let text = text(reporter.refused(at(1), &Problem::new("401", "returned 401"), lost));
        assert!(text.contains("OTEL_EXPORTER_OTLP_HEADERS"), "{text}");
    }

    #[test]
    fn rejected_spans_are_reported_with_the_collectors_reason() {
        assert_eq!(
            text(reporter().partial(at(0), 1, "too old")),
            "collector at http://c:4318/v1/traces rejected 1 span: \"too old\"; not retried"
        );
        assert!(text(reporter().partial(at(0), 0, "slow down")).ends_with("warns: \"slow down\""));
    }

    #[test]
    fn the_number_of_remembered_kinds_is_bounded() {
        let mut reporter = reporter();
        for i in 0..1000 {
            reporter.refused(
                at(0),
                &Problem::new(&i.to_string(), "returned"),
                Lost::default(),
            );
            assert!(reporter.reported.len() <= MAX_KINDS);
        }
    }
}
