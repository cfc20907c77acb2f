//! Shutdown within a deadline.

use std::time::{Duration, Instant};

use tailback::emit::otlp::{Exporter, OtlpConfig, Reason, Summary};
use tailback_tests::ports;

use crate::{
    collector::{Collector, DEADLINE, Protocol, Received, Reply},
    spans::{config, exporter, roots},
};

/// Allowed overrun of the deadline on a busy machine. A request to a hanging collector times out only after 10 s.
const SLACK: Duration = Duration::from_secs(5);

fn shut_down_within(exporter: Exporter, within: Duration) -> Summary {
    let began = Instant::now();
    let summary = exporter.shutdown(within);
    assert!(began.elapsed() <= within + SLACK, "{:?}", began.elapsed());
    let stats = &summary.stats;
    assert_eq!(
        stats.submitted,
        stats.delivered + stats.rejected + stats.dropped(),
        "{summary}"
    );
    summary
}

#[test]
fn shutdown_delivers_pending_spans() {
    let collector = Collector::start(Protocol::Http, vec![Reply::status(503)]);
    let exporter = exporter(&collector.url());
    for id in 1..=100 {
        exporter.send(roots([id]));
    }
    let summary = shut_down_within(exporter, DEADLINE);
    assert!(summary.is_complete(), "{summary}");
    let requests = collector.rest();
    let ids: Vec<_> = requests[1..].iter().flat_map(Received::ids).collect();
    assert_eq!(ids, (1..=100).collect::<Vec<_>>());
    assert!(
        summary.took < DEADLINE / 2,
        "shutdown returns when everything is delivered"
    );
}

#[test]
fn shutdown_abandons_a_hanging_collector_at_the_deadline() {
    let collector = Collector::start(Protocol::Http, vec![Reply::Hang]);
    let exporter = exporter(&collector.url());
    exporter.send(roots([1, 2]));
    collector.next();
    let summary = shut_down_within(exporter, Duration::from_millis(300));
    assert_eq!(summary.stats.dropped_by[&Reason::Shutdown], 2);
    assert!(!summary.is_complete());
    assert!(
        summary.to_string().contains("2 dropped (2 shutdown)"),
        "{summary}"
    );
}

#[test]
fn shutdown_retries_a_missing_collector_until_the_deadline() {
    let url = format!("http://{}", ports::local(ports::free().unwrap()));
    let exporter = exporter(&url);
    exporter.send(roots([1]));
    let summary = shut_down_within(exporter, Duration::from_millis(400));
    assert_eq!(summary.stats.dropped_by[&Reason::Shutdown], 1);
    assert!(summary.stats.requests >= 2, "{summary:?}");
    assert!(
        summary
            .to_string()
            .ends_with("it cannot be reached: Connection refused (os error 111)"),
        "{summary}"
    );
}

#[test]
fn shutdown_does_not_wait_for_a_retry_after_beyond_the_deadline() {
    let collector = Collector::start(Protocol::Http, vec![Reply::retry_after(503, "60")]);
    let exporter = exporter(&collector.url());
    exporter.send(roots([1]));
    collector.next();
    let summary = shut_down_within(exporter, DEADLINE);
    assert!(summary.took < DEADLINE / 2, "{:?}", summary.took);
    assert_eq!(summary.stats.dropped_by[&Reason::Shutdown], 1);
    assert!(
        collector.rest().is_empty(),
        "no retry before the requested time"
    );
}

#[test]
fn shutdown_abandons_an_unresolvable_name_at_the_deadline() {
    let mut slow = config("http://collector.invalid:4318");
    slow.timeout = Duration::from_secs(60);
    let exporter = Exporter::start(&slow).unwrap();
    exporter.send(roots([1]));
    let summary = shut_down_within(exporter, Duration::from_millis(200));
    assert_eq!(summary.stats.dropped_by[&Reason::Shutdown], 1);
}

#[test]
fn shutdown_of_an_idle_exporter_and_drop_return_immediately() {
    let collector = Collector::start(Protocol::Http, vec![Reply::Hang]);
    let began = Instant::now();
    let summary = exporter(&collector.url()).shutdown(DEADLINE);
    assert_eq!(
        summary.to_string(),
        format!("0 of 0 spans delivered to {}/v1/traces", collector.url())
    );
    let config = OtlpConfig {
        timeout: DEADLINE,
        ..config(&collector.url())
    };
    let dropped = Exporter::start(&config).unwrap();
    dropped.send(roots([1]));
    collector.next();
    drop(dropped);
    assert!(began.elapsed() < DEADLINE / 2);
}
