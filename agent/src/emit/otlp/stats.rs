//! Counters of the delivery, and its summary at the end.

use std::{collections::BTreeMap, fmt, time::Duration};

use super::spool::Reason;

/// Counters since the start. Every submitted span is in exactly one of the others:
/// `submitted == delivered + rejected + dropped() + waiting`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OtlpStats {
    /// Spans passed to the exporter.
    pub submitted: u64,
    /// Spans that the collector accepted.
    pub delivered: u64,
    /// Spans that the collector rejected in a partial success.
    pub rejected: u64,
    /// Spans dropped, by reason.
    pub dropped_by: BTreeMap<Reason, u64>,
    /// Spans in the spool, and their encoded size.
    pub waiting: u64,
    pub waiting_bytes: u64,
    /// Requests sent, retries included.
    pub requests: u64,
    /// Requests that failed and were scheduled for a retry.
    pub retries: u64,
    /// The last error, as a clause whose subject is the collector.
    pub last_error: Option<String>,
    /// Notices dropped because too many were waiting.
    pub notices_dropped: u64,
}

impl OtlpStats {
    /// Dropped spans, over all reasons.
    pub fn dropped(&self) -> u64 {
        self.dropped_by.values().sum()
    }

    pub(super) fn drop_spans(&mut self, reason: Reason, count: usize) {
        if count > 0 {
            *self.dropped_by.entry(reason).or_default() += count as u64;
        }
    }

    pub(super) fn accept_spans(&mut self, count: usize, rejected: u64) {
        let count = count as u64;
        let rejected = rejected.min(count);
        self.delivered += count - rejected;
        self.rejected += rejected;
    }
}

/// The result of a shutdown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    pub collector: String,
    pub stats: OtlpStats,
    /// How long the shutdown took.
    pub took: Duration,
}

impl Summary {
    /// Whether the collector accepted all spans.
    pub fn is_complete(&self) -> bool {
        self.stats.delivered == self.stats.submitted
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = &self.stats;
        write!(
            f,
            "{} of {} spans delivered to {}",
            stats.delivered, stats.submitted, self.collector
        )?;
        if stats.rejected > 0 {
            write!(f, "; {} rejected by the collector", stats.rejected)?;
        }
        if stats.dropped() > 0 {
            let reasons: Vec<_> = stats
                .dropped_by
                .iter()
                .map(|(reason, count)| format!("{count} {}", reason.name()))
                .collect();
            write!(f, "; {} dropped ({})", stats.dropped(), reasons.join(", "))?;
        }
        match &stats.last_error {
            Some(error) if !self.is_complete() => write!(f, "; last error: it {error}"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(stats: OtlpStats) -> String {
        let collector = "http://c:4318/v1/traces".into();
        Summary {
            collector,
            stats,
            took: Duration::ZERO,
        }
        .to_string()
    }

    #[test]
    fn a_complete_delivery_has_a_short_summary() {
        let mut stats = OtlpStats {
            submitted: 5,
            last_error: Some("returned 503".into()),
            ..OtlpStats::default()
        };
        stats.accept_spans(5, 0);
        assert_eq!(
            summary(stats),
            "5 of 5 spans delivered to http://c:4318/v1/traces"
        );
    }

    #[test]
    fn undelivered_spans_are_listed_by_reason() {
        let mut stats = OtlpStats {
            submitted: 12,
            last_error: Some("returned 503".into()),
            ..OtlpStats::default()
        };
        stats.accept_spans(5, 1);
        stats.drop_spans(Reason::Shutdown, 4);
        stats.drop_spans(Reason::SpoolFull, 3);
        assert_eq!(
            summary(stats),
            "4 of 12 spans delivered to http://c:4318/v1/traces; 1 rejected by the collector; 7 dropped (3 spool_full, 4 \
             shutdown); last error: it returned 503"
        );
    }

    #[test]
    fn at_most_as_many_spans_are_rejected_as_were_sent() {
        let mut stats = OtlpStats::default();
        stats.accept_spans(2, 900);
        assert_eq!((stats.delivered, stats.rejected), (0, 2));
    }
}
