//! What is said about the delivery: once for each thing that changes, not for each request. Pure.

use std::{collections::HashMap, time::Duration};

use super::answer::Trouble;
use crate::{sample::Notice, text};

/// The same trouble is said again after this long, if it still or again is there.
const AGAIN: Duration = Duration::from_secs(600);
/// Kinds of trouble that are told apart.
const MAX_KINDS: usize = 64;

/// Spans that were lost, or may have been.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lost {
    /// In the request.
    pub spans: usize,
    /// Waiting children, dropped with their parents.
    pub orphans: usize,
}

/// See the module. Times are since any fixed moment.
pub struct Voice {
    collector: String,
    /// When the collector stopped taking what is sent.
    failing: Option<Duration>,
    said: HashMap<String, Duration>,
}

impl Voice {
    pub fn new(collector: String) -> Self {
        Self {
            collector,
            failing: None,
            said: HashMap::new(),
        }
    }

    /// A request was taken, after `waited` spans had waited for it.
    pub fn taken(&mut self, now: Duration, waited: usize) -> Option<Notice> {
        let since = self.failing.take()?;
        self.said.retain(|kind, _| !kind.starts_with("later "));
        let after = text::duration(nanos(now.saturating_sub(since)));
        let text = format!(
            "collector at {} takes spans again after {after}; {}",
            self.collector,
            waited_for(waited)
        );
        Some(notice("otlp_delivering", text))
    }

    /// Spans of a request that was taken were rejected, or a warning came with it.
    pub fn partial(&mut self, now: Duration, rejected: u64, said: &str) -> Option<Notice> {
        if rejected == 0 && said.is_empty() || !self.first(now, "partial") {
            return None;
        }
        let why = if said.is_empty() {
            "it does not say why".to_owned()
        } else {
            format!("\"{said}\"")
        };
        let text = match rejected {
            0 => format!("collector at {} warns: {why}", self.collector),
            n => format!(
                "collector at {} rejected {}: {why}; they are not sent again",
                self.collector,
                spans(n)
            ),
        };
        Some(notice("otlp_rejected", text))
    }

    /// A request has to be sent again.
    pub fn later(
        &mut self,
        now: Duration,
        why: &Trouble,
        wait: Duration,
        waiting: usize,
    ) -> Option<Notice> {
        self.failing.get_or_insert(now);
        if !self.first(now, &format!("later {}", why.kind)) {
            return None;
        }
        let text = format!(
            "collector at {} {}{}; {} and the next try is in {}",
            self.collector,
            why.text,
            remedy(&why.kind),
            wait_for(waiting),
            text::duration(nanos(wait)),
        );
        Some(notice("otlp_waiting", text))
    }

    /// A request will not be sent again.
    pub fn refused(&mut self, now: Duration, why: &Trouble, lost: Lost) -> Option<Notice> {
        if !self.first(now, &format!("refused {}", why.kind)) {
            return None;
        }
        let children = match lost.orphans {
            0 => String::new(),
            n => format!(", and {n} more that are within them"),
        };
        let text = format!(
            "collector at {} {}{}; not sent again: {} dropped{children}",
            self.collector,
            why.text,
            remedy(&why.kind),
            spans(lost.spans as u64),
        );
        Some(notice("otlp_refused", text))
    }

    /// Spans were dropped as they came.
    pub fn dropped(&mut self, now: Duration, reason: &str, remedy: &str) -> Option<Notice> {
        if !self.first(now, &format!("dropped {reason}")) {
            return None;
        }
        let text = format!(
            "spans for the collector at {} are dropped ({reason}): {remedy}",
            self.collector
        );
        Some(notice("otlp_dropped", text))
    }

    /// Whether this kind was not said for long enough.
    fn first(&mut self, now: Duration, kind: &str) -> bool {
        if self
            .said
            .get(kind)
            .is_some_and(|&at| now.saturating_sub(at) < AGAIN)
        {
            return false;
        }
        if self.said.len() >= MAX_KINDS {
            self.said.clear();
        }
        self.said.insert(kind.to_owned(), now);
        true
    }
}

/// What a person can do, where the kind of trouble tells.
fn remedy(kind: &str) -> &'static str {
    match kind {
        "connect" => " (does it run, and listen there?)",
        "broken" | "garbage" => {
            " (OTLP/HTTP is usually port 4318, OTLP/gRPC is 4317, as grpc://HOST:4317)"
        }
        "401" | "403" | "Unauthenticated" | "PermissionDenied" => {
            " (credentials go into OTEL_EXPORTER_OTLP_HEADERS)"
        }
        "404" | "405" | "Unimplemented" => {
            " (is this the endpoint for traces? OTLP/HTTP's usually ends in :4318/v1/traces)"
        }
        "413" | "ResourceExhausted" => {
            " (requests are at most 4 MiB; the collector's limit is below)"
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

fn wait_for(n: usize) -> String {
    if n == 1 {
        "1 span waits".to_owned()
    } else {
        format!("{n} spans wait")
    }
}

fn waited_for(n: usize) -> String {
    if n == 1 {
        "1 span had waited".to_owned()
    } else {
        format!("{n} spans had waited")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn voice() -> Voice {
        Voice::new("http://c:4318/v1/traces".into())
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn text(notice: Option<Notice>) -> String {
        notice.expect("said").text
    }

    fn down() -> Trouble {
        Trouble::new("connect", "cannot be reached: Connection refused")
    }

    #[test]
    fn nothing_is_said_while_all_is_well() {
        let mut voice = voice();
        assert_eq!(voice.taken(at(1), 3), None);
        assert_eq!(voice.partial(at(1), 0, ""), None);
    }

    #[test]
    fn an_outage_is_said_when_it_begins_and_when_it_ends() {
        let mut voice = voice();
        assert_eq!(
            text(voice.later(at(10), &down(), Duration::from_millis(500), 3)),
            "collector at http://c:4318/v1/traces cannot be reached: Connection refused (does it run, and listen \
             there?); 3 spans wait and the next try is in 500 ms"
        );
        assert_eq!(voice.later(at(11), &down(), at(1), 4), None);
        assert_eq!(
            text(voice.taken(at(22), 30)),
            "collector at http://c:4318/v1/traces takes spans again after 12 s; 30 spans had waited"
        );
        assert_eq!(voice.taken(at(23), 1), None);
        assert!(
            voice.later(at(24), &down(), at(1), 1).is_some(),
            "the next outage is news"
        );
    }

    #[test]
    fn an_outage_that_changes_its_kind_is_said_again_and_one_that_lasts_is_recalled() {
        let mut voice = voice();
        assert!(voice.later(at(0), &down(), at(1), 1).is_some());
        assert!(
            voice
                .later(at(1), &Trouble::new("503", "answered 503"), at(1), 1)
                .is_some()
        );
        assert!(voice.later(at(2), &down(), at(1), 1).is_none());
        assert!(voice.later(at(700), &down(), at(30), 9).is_some());
        assert!(
            text(voice.taken(at(720), 9)).contains("after 12 min"),
            "counted from the beginning"
        );
    }

    #[test]
    fn a_refusal_is_said_once_for_each_kind() {
        let mut voice = voice();
        let bad = Trouble::new("400", "answered 400 Bad Request: \"no\"");
        let lost = Lost {
            spans: 3,
            orphans: 2,
        };
        assert_eq!(
            text(voice.refused(at(0), &bad, lost)),
            "collector at http://c:4318/v1/traces answered 400 Bad Request: \"no\"; not sent again: 3 spans dropped, \
             and 2 more that are within them"
        );
        assert_eq!(voice.refused(at(1), &bad, lost), None);
        let text = text(voice.refused(at(1), &Trouble::new("401", "answered 401"), lost));
        assert!(text.contains("OTEL_EXPORTER_OTLP_HEADERS"), "{text}");
    }

    #[test]
    fn rejected_spans_are_said_with_the_collectors_reason() {
        assert_eq!(
            text(voice().partial(at(0), 1, "too old")),
            "collector at http://c:4318/v1/traces rejected 1 span: \"too old\"; they are not sent again"
        );
        assert!(text(voice().partial(at(0), 0, "slow down")).ends_with("warns: \"slow down\""));
    }

    #[test]
    fn a_collector_that_invents_kinds_does_not_fill_the_memory() {
        let mut voice = voice();
        for i in 0..1000 {
            voice.refused(
                at(0),
                &Trouble::new(&i.to_string(), "answered"),
                Lost::default(),
            );
            assert!(voice.said.len() <= MAX_KINDS);
        }
    }
}
