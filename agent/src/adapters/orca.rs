//! ORCA (`xds.service.orca.v3`): out-of-band load reports for load balancers such as gRPC's weighted round robin.
//!
//! If the agent is gone, every value of a report is 0. gRPC's balancer ignores such a report, and drops the weight from the
//! last one after its `weightExpirationPeriod`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use http::{Request, Response};
use hyper::body::Incoming;
use serde_json::Value;
use tailback_page::{Entry, Pressure, layout::INBOUND};
use tokio_stream::{StreamExt as _, wrappers::IntervalStream};
use tonic::{Status, body::Body, server::Grpc};
use tonic_prost::ProstCodec;

use super::{
    Shared,
    adapter_stats::AdapterStats,
    clock, grpc,
    listen::Endpoint,
    warning::{Consumers, Warning},
};

/// Queues per stream whose loss counters are remembered.
const MAX_LOSS_COUNTERS: usize = 1_024;
const METHOD: &str = "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics";
/// Shortest report interval: the default sampling interval.
const MIN_INTERVAL: Duration = Duration::from_millis(100);
/// Report interval if the client requests none.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(1);
/// Longest report interval.
const MAX_INTERVAL: Duration = Duration::from_secs(3_600);

/// `xds.service.orca.v3.OrcaLoadReportRequest`, without the names of request costs, which are not supported.
#[derive(Clone, PartialEq, prost::Message)]
struct ReportRequest {
    #[prost(message, optional, tag = "1")]
    report_interval: Option<prost_types::Duration>,
}

/// `xds.data.orca.v3.OrcaLoadReport`.
#[derive(Clone, PartialEq, prost::Message)]
struct Report {
    #[prost(double, tag = "1")]
    cpu_utilization: f64,
    #[prost(double, tag = "2")]
    mem_utilization: f64,
    /// Score of each queue, 0 to 1.
    #[prost(btree_map = "string, double", tag = "5")]
    utilization: BTreeMap<String, f64>,
    #[prost(double, tag = "6")]
    rps_fractional: f64,
    #[prost(double, tag = "7")]
    eps: f64,
    #[prost(btree_map = "string, double", tag = "8")]
    named_metrics: BTreeMap<String, f64>,
    /// May exceed 1.
    #[prost(double, tag = "9")]
    application_utilization: f64,
}

/// Calls that asked for an interval below [`MIN_INTERVAL`].
#[derive(Debug, Default)]
pub struct RaisedIntervals(AtomicU64);

impl Consumers for RaisedIntervals {
    fn describe(&self, status: &mut Value) {
        status["raised_intervals"] = self.0.load(Ordering::Relaxed).into();
    }

    fn warnings(&self) -> Vec<Warning> {
        Vec::new()
    }
}

/// Serves until dropped.
pub async fn serve(target: String, endpoint: Endpoint, shared: Arc<Shared>) {
    let (target, stats): (Arc<str>, _) = (target.into(), endpoint.stats());
    let raised = Arc::new(RaisedIntervals::default());
    stats.set_consumers(Arc::clone(&raised) as _);
    grpc::serve(endpoint, move |request| {
        let (target, shared) = (Arc::clone(&target), Arc::clone(&shared));
        let raised = Arc::clone(&raised);
        answer(request, target, shared, Arc::clone(&stats), raised)
    })
    .await;
}

async fn answer(
    request: Request<Incoming>,
    target: Arc<str>,
    shared: Arc<Shared>,
    stats: Arc<AdapterStats>,
    raised: Arc<RaisedIntervals>,
) -> Response<Body> {
    if request.uri().path() != METHOD {
        return grpc::no_such_method(request.uri().path());
    }
    let stream = tower::service_fn(move |request: tonic::Request<ReportRequest>| {
        let (target, shared, stats) =
            (Arc::clone(&target), Arc::clone(&shared), Arc::clone(&stats));
        let clock = clock(report_interval_of(request.get_ref(), &raised));
        let mut losses = Losses::default();
        // A report is made when it is sent; for a client that does not read, none is made.
        let reports = IntervalStream::new(clock).map(move |_| {
            let pressure = shared.pressure(&target);
            let report = if pressure.alive {
                report(
                    &pressure,
                    &shared.pages.page(&target).entries(),
                    &mut losses,
                )
            } else {
                Report::default()
            };
            stats.replied(&format!(
                "utilization {:.2} at {:.0}/s",
                report.application_utilization, report.rps_fractional
            ));
            Ok::<_, Status>(report)
        });
        std::future::ready(Ok::<_, Status>(tonic::Response::new(reports)))
    });
    Grpc::new(ProstCodec::<Report, ReportRequest>::default())
        .apply_max_message_size_config(Some(grpc::MAX_MESSAGE), None)
        .server_streaming(stream, request)
        .await
}

fn report_interval_of(request: &ReportRequest, raised: &RaisedIntervals) -> Duration {
    let requested = request.report_interval.unwrap_or_default();
    match Duration::try_from(requested) {
        Ok(interval) if !interval.is_zero() => {
            if interval < MIN_INTERVAL {
                raised.0.fetch_add(1, Ordering::Relaxed);
            }
            interval.clamp(MIN_INTERVAL, MAX_INTERVAL)
        }
        _ => DEFAULT_INTERVAL,
    }
}

fn report(pressure: &Pressure, entries: &[Entry], losses: &mut Losses) -> Report {
    let mut named_metrics = BTreeMap::from([
        ("admit_ratio".to_owned(), pressure.admit_ratio),
        ("level".to_owned(), f64::from(pressure.level)),
        ("score".to_owned(), pressure.score),
        (
            "oldest_age_seconds".to_owned(),
            pressure.oldest_age.as_secs_f64(),
        ),
    ]);
    if let Some(time) = pressure.time_to_full {
        named_metrics.insert("time_to_full_seconds".to_owned(), time.as_secs_f64());
    }
    Report {
        cpu_utilization: pressure.cpu,
        mem_utilization: memory(entries),
        utilization: utilization(entries),
        rps_fractional: requests_per_s(entries),
        eps: losses.per_s(entries, Instant::now()),
        named_metrics,
        application_utilization: pressure.load,
    }
}

/// The score of each queue, at most 1: the worst of a kind under the name of the kind and, if there are several, each one with its
/// id appended.
fn utilization(entries: &[Entry]) -> BTreeMap<String, f64> {
    let mut of_kind: HashMap<&str, usize> = HashMap::new();
    for entry in entries {
        *of_kind.entry(entry.kind_name()).or_default() += 1;
    }
    let mut all = BTreeMap::new();
    for entry in entries {
        let (kind, fill) = (entry.kind_name(), entry.score.clamp(0.0, 1.0));
        let worst = all.entry(kind.to_owned()).or_insert(fill);
        *worst = worst.max(fill);
        if of_kind[kind] > 1 {
            all.insert(format!("{kind}.{:08x}", entry.id), fill);
        }
    }
    all
}

/// Memory utilization, 0 to 1; 0 if unknown. Limits of 4 GiB and more are unknown: they exceed the 32 bits of the page.
fn memory(entries: &[Entry]) -> f64 {
    let mut memories = entries.iter().filter(|entry| entry.kind_name() == "memory");
    let fill = memories.find_map(|entry| {
        let limit = entry.limit.filter(|limit| *limit > 0)?;
        Some(f64::from(entry.depth) / f64::from(limit))
    });
    fill.unwrap_or(0.0).min(1.0)
}

/// Responses per second; if unknown, accepted connections or datagrams per second.
fn requests_per_s(entries: &[Entry]) -> f64 {
    let of = |wanted: &str| -> f64 {
        let taken = entries
            .iter()
            .filter(|entry| entry.flags & INBOUND != 0 && entry.kind_name() == wanted)
            .filter_map(|entry| entry.departures_per_s);
        taken.map(f64::from).sum()
    };
    of("inflight").max(of("accept"))
}

/// The loss counters of the previous report. Only the worst queues of a service are on its page, so a queue that is new there
/// counts as having lost nothing.
#[derive(Default)]
struct Losses {
    at: Option<Instant>,
    of: HashMap<u32, u32>,
}

impl Losses {
    fn per_s(&mut self, entries: &[Entry], now: Instant) -> f64 {
        let mut lost = 0_u64;
        for entry in entries {
            if entry.flags & INBOUND != 0 {
                let before = self.of.insert(entry.id, entry.losses);
                let grown = entry.losses.saturating_sub(before.unwrap_or(entry.losses));
                lost += u64::from(grown);
            }
        }
        if self.of.len() > MAX_LOSS_COUNTERS {
            self.of.clear();
        }
        let seconds = self.at.replace(now).map_or(0.0, |then| {
            now.saturating_duration_since(then).as_secs_f64()
        });
        if seconds > 0.0 {
            lost as f64 / seconds
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use tailback_page::layout::KINDS;

    use super::*;

    fn entry(kind: &str, id: u32) -> Entry {
        let kind = KINDS.iter().position(|name| *name == kind).unwrap();
        Entry {
            kind: kind as u16,
            flags: INBOUND,
            id,
            depth: 3,
            limit: Some(12),
            standing_delay: Duration::ZERO,
            p99: None,
            oldest_age: Duration::ZERO,
            score: 0.25,
            arrivals_per_s: Some(40),
            departures_per_s: Some(30),
            losses: 5,
        }
    }

    #[test]
    fn a_report_has_the_load_the_rate_and_each_queue() {
        let entries = [
            entry("inflight", 1),
            entry("inflight", 2),
            Entry {
                score: 1.5,
                ..entry("accept", 3)
            },
            entry("memory", 4),
        ];
        let pressure = Pressure {
            alive: true,
            load: 1.25,
            cpu: 0.5,
            admit_ratio: 0.8,
            ..Pressure::NONE
        };
        let report = report(&pressure, &entries, &mut Losses::default());
        assert_eq!(report.application_utilization, 1.25);
        assert_eq!(
            (report.cpu_utilization, report.mem_utilization),
            (0.5, 0.25)
        );
        assert_eq!(report.rps_fractional, 60.0, "both listeners' requests");
        assert_eq!(
            report.utilization["accept"], 1.0,
            "clamped to the range of the format"
        );
        assert_eq!(report.utilization["inflight.00000002"], 0.25);
        assert!(!report.utilization.contains_key("accept.00000003"));
        assert_eq!(report.named_metrics["admit_ratio"], 0.8);
    }

    #[test]
    fn losses_are_counted_from_the_previous_report() {
        let mut losses = Losses::default();
        let began = Instant::now();
        let mut entries = [entry("accept", 1)];
        assert_eq!(
            losses.per_s(&entries, began),
            0.0,
            "not those before the first report"
        );
        entries[0].losses = 25;
        let later = began + Duration::from_secs(2);
        assert_eq!(losses.per_s(&entries, later), 10.0);
        entries[0].losses = 0;
        assert_eq!(
            losses.per_s(&entries, later + MIN_INTERVAL),
            0.0,
            "the counter of a new queue starts over"
        );
    }

    #[test]
    fn the_requested_interval_is_clamped() {
        let raised = RaisedIntervals::default();
        for (seconds, nanos, every_ms) in [
            (0, 0, 1_000),
            (0, 1_000_000, 100),
            (0, 250_000_000, 250),
            (10, 0, 10_000),
            (-1, 0, 1_000),
            (i64::MAX, 0, 3_600_000),
        ] {
            let report_interval = Some(prost_types::Duration { seconds, nanos });
            assert_eq!(
                report_interval_of(&ReportRequest { report_interval }, &raised).as_millis(),
                every_ms
            );
        }
        assert_eq!(
            report_interval_of(&ReportRequest::default(), &raised),
            DEFAULT_INTERVAL
        );
        assert_eq!(raised.0.into_inner(), 1);
    }
}
