//! What became of the spans that were handed over.

use std::{collections::BTreeMap, fmt, time::Duration};

use super::spool::Reason;

/// Since the start. Every span handed over is in one of the others:
/// `handed == delivered + rejected + dropped() + waiting`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OtlpStats {
    pub handed: u64,
    pub delivered: u64,
    /// Named as rejected by a collector that took the rest of their request.
    pub rejected: u64,
    pub dropped_by: BTreeMap<Reason, u64>,
    /// In the spool.
    pub waiting: u64,
    pub waiting_bytes: u64,
    /// Sent, with those sent again.
    pub requests: u64,
    /// Of these, failed and to be sent again.
    pub retries: u64,
    /// What the collector did, as a clause without its subject.
    pub last_error: Option<String>,
    /// Sentences that nobody took in time.
    pub notices_dropped: u64,
}

impl OtlpStats {
    /// For any reason.
    pub fn dropped(&self) -> u64 {
        self.dropped_by.values().sum()
    }

    pub(super) fn drop_spans(&mut self, reason: Reason, count: usize) {
        if count > 0 {
            *self.dropped_by.entry(reason).or_default() += count as u64;
        }
    }

    pub(super) fn take_spans(&mut self, count: usize, rejected: u64) {
        let count = count as u64;
        let rejected = rejected.min(count);
        self.delivered += count - rejected;
        self.rejected += rejected;
    }
}

/// How the delivery ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    pub collector: String,
    pub stats: OtlpStats,
    /// How long ending it took.
    pub took: Duration,
}

impl Summary {
    /// Whether the collector has all spans.
    pub fn is_complete(&self) -> bool {
        self.stats.delivered == self.stats.handed
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = &self.stats;
        write!(
            f,
            "{} of {} spans delivered to {}",
            stats.delivered, stats.handed, self.collector
        )?;
        if stats.rejected > 0 {
            write!(f, "; {} rejected by it", stats.rejected)?;
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
            Some(error) if !self.is_complete() => write!(f, "; the last trouble: it {error}"),
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
    fn a_delivery_without_trouble_is_one_short_sentence() {
        let mut stats = OtlpStats {
            handed: 5,
            last_error: Some("answered 503".into()),
            ..OtlpStats::default()
        };
        stats.take_spans(5, 0);
        assert_eq!(
            summary(stats),
            "5 of 5 spans delivered to http://c:4318/v1/traces"
        );
    }

    #[test]
    fn what_was_not_delivered_is_said_with_its_reasons() {
        let mut stats = OtlpStats {
            handed: 12,
            last_error: Some("answered 503".into()),
            ..OtlpStats::default()
        };
        stats.take_spans(5, 1);
        stats.drop_spans(Reason::Shutdown, 4);
        stats.drop_spans(Reason::SpoolFull, 3);
        assert_eq!(
            summary(stats),
            "4 of 12 spans delivered to http://c:4318/v1/traces; 1 rejected by it; 7 dropped (3 spool_full, 4 \
             shutdown); the last trouble: it answered 503"
        );
    }

    #[test]
    fn no_more_spans_are_rejected_than_were_sent() {
        let mut stats = OtlpStats::default();
        stats.take_spans(2, 900);
        assert_eq!((stats.delivered, stats.rejected), (0, 2));
    }
}
