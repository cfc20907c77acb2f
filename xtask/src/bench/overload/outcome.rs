//! What a scenario measured, and the figures of a list of requests.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use tailback_tests::load::Request;

use crate::bench::figure::short;

/// Responses without a rejection for this long: everything is admitted. At 2× the capacity half of the requests are
/// rejected, one every 10 ms.
const ADMITTED_FOR: Duration = Duration::from_millis(400);

/// Result of one scenario.
#[derive(Clone, Debug, Default)]
pub struct Outcome(pub Vec<Measure>);

/// One measured value.
#[derive(Clone, Copy, Debug)]
pub struct Measure {
    pub name: &'static str,
    pub unit: &'static str,
    pub value: f64,
    pub goal: Option<Bound>,
}

/// The goal of a value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// Responses in one time span.
#[derive(Clone, Copy, Debug)]
pub struct Responses {
    /// Good responses per second relative to the capacity.
    pub goodput: f64,
    /// Latency of the successful responses.
    pub p99: Duration,
    /// Share of all requests that were shed (503).
    pub shed: f64,
    /// Share of all requests that failed otherwise.
    pub failed: f64,
}

impl Measure {
    pub fn percent(name: &'static str, share: f64) -> Self {
        Self::number(name, "%", 100.0 * share)
    }

    pub fn seconds(name: &'static str, duration: Duration) -> Self {
        Self::number(name, "s", duration.as_secs_f64())
    }

    pub fn ms(name: &'static str, duration: Duration) -> Self {
        Self::number(name, "ms", ms(duration))
    }

    pub fn number(name: &'static str, unit: &'static str, value: f64) -> Self {
        Self {
            name,
            unit,
            value,
            goal: None,
        }
    }

    pub fn goal(self, goal: impl Into<Option<Bound>>) -> Self {
        Self {
            goal: goal.into(),
            ..self
        }
    }
}

impl Bound {
    pub fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(limit) => value >= limit,
            Self::AtMost(limit) => value <= limit,
        }
    }

    pub fn text(self) -> String {
        match self {
            Self::AtLeast(limit) => format!("≥ {limit}"),
            Self::AtMost(limit) => format!("≤ {limit}"),
        }
    }
}

impl Outcome {
    /// For a line of progress.
    pub fn text(&self) -> String {
        let text = |measure: &Measure| {
            let Measure {
                name, value, unit, ..
            } = measure;
            let missed = match measure.goal {
                Some(goal) if !goal.is_met(*value) => format!(" (goal {})", goal.text()),
                _ => String::new(),
            };
            let value = match *unit {
                "%" => format!("{value:.1}%"),
                unit => format!("{} {unit}", short(*value)),
            };
            format!("{name} {value}{missed}")
        };
        let all: Vec<String> = self.0.iter().map(text).collect();
        all.join(", ")
    }
}

impl Responses {
    /// Responses to the requests due in `span`. A response is good within `good_within`. `offered` is the load relative to the
    /// capacity.
    pub fn of(
        requests: &[Request],
        span: Range<Instant>,
        offered: f64,
        capacity_per_s: f64,
        good_within: Duration,
    ) -> Self {
        let in_span: Vec<&Request> = requests
            .iter()
            .filter(|request| span.contains(&request.due))
            .collect();
        let seconds = (span.end - span.start).as_secs_f64();
        let good = in_span
            .iter()
            .filter(|request| request.ok() && request.took() <= good_within)
            .count();
        let shed = in_span.iter().filter(|request| is_shed(request)).count();
        let ok = latencies(in_span.iter().copied());
        // Requests abandoned at the end are not in the list, but were sent and failed.
        let sent = offered * capacity_per_s * seconds;
        Self {
            goodput: good as f64 / seconds / capacity_per_s,
            p99: percentile(&ok, 0.99),
            shed: shed as f64 / sent,
            failed: (1.0 - (ok.len() + shed) as f64 / sent).max(0.0),
        }
    }
}

/// Time from `event` until everything is admitted; `None` if requests are still shed at the end of the span.
pub fn admits_all_after(requests: &[Request], event: Instant, end: Instant) -> Option<Duration> {
    let mut rejections: Vec<Instant> = requests
        .iter()
        .filter(|request| is_shed(request) && request.ended > event && request.ended <= end)
        .map(|request| request.ended)
        .collect();
    rejections.sort_unstable();
    let mut last = event;
    for rejection in rejections.into_iter().chain([end]) {
        if rejection - last >= ADMITTED_FOR {
            return Some(last - event);
        }
        last = rejection;
    }
    None
}

fn is_shed(request: &Request) -> bool {
    request.response == Ok(503)
}

/// Sorted latencies of the successful requests.
pub fn latencies<'a>(requests: impl Iterator<Item = &'a Request>) -> Vec<Duration> {
    let mut took: Vec<Duration> = requests
        .filter(|request| request.ok())
        .map(Request::took)
        .collect();
    took.sort_unstable();
    took
}

/// Percentile of sorted latencies; `part` is from 0 to 1.
pub fn percentile(sorted: &[Duration], part: f64) -> Duration {
    let at = (sorted.len() as f64 * part) as usize;
    sorted
        .get(at.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(Duration::ZERO)
}

pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Due at this time, answered with this status 10 ms later.
    fn request(due: Instant, status: u16) -> Request {
        Request {
            due,
            started: due,
            connected: Some(due),
            ended: due + Duration::from_millis(10),
            response: Ok(status),
        }
    }

    fn every_10_ms(start: Instant, count: u32, status: impl Fn(u32) -> u16) -> Vec<Request> {
        (0..count)
            .map(|number| request(start + number * Duration::from_millis(10), status(number)))
            .collect()
    }

    #[test]
    fn responses_are_counted_relative_to_the_capacity() {
        let start = Instant::now();
        let requests = every_10_ms(start, 100, |number| if number % 4 == 0 { 503 } else { 200 });
        let span = start..start + Duration::from_secs(1);
        let good_within = Duration::from_millis(50);
        let responses = Responses::of(&requests, span.clone(), 2.0, 50.0, good_within);
        assert_eq!((responses.goodput, responses.shed), (1.5, 0.25));
        assert_eq!(responses.p99, Duration::from_millis(10));
        assert!(responses.failed.abs() < 1e-9, "{responses:?}");
        let late = Responses::of(&requests, span, 2.0, 50.0, Duration::from_millis(5));
        assert_eq!(late.goodput, 0.0);
    }

    #[test]
    fn everything_is_admitted_once_rejections_have_ceased() {
        let start = Instant::now();
        let end = start + Duration::from_secs(3);
        let until = |last| {
            every_10_ms(
                start,
                300,
                move |number| if number <= last { 503 } else { 200 },
            )
        };
        let after = |requests: &[Request]| admits_all_after(requests, start, end);
        assert_eq!(after(&until(90)), Some(Duration::from_millis(910)));
        assert_eq!(after(&until(299)), None);
        assert_eq!(after(&[]), Some(Duration::ZERO));
        // Later rejections have another reason: the limit without pressure is reached.
        let again = every_10_ms(start, 300, |number| {
            if (50..100).contains(&number) {
                200
            } else {
                503
            }
        });
        assert_eq!(after(&again), Some(Duration::from_millis(500)));
    }
}
