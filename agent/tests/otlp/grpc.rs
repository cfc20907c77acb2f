//! Delivery over OTLP/gRPC.

use std::{net::TcpListener, time::Duration};

use tailback::emit::otlp::{Exporter, OtlpConfig, Reason};
use tailback_tests::{ports, wait};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    collector::{Collector, DEADLINE, Protocol, Received, Reply},
    spans::{codes, config, exporter, notices, roots, wait_settled},
};

fn collector(script: Vec<Reply>) -> Collector {
    Collector::start(Protocol::Grpc, script)
}

fn url(collector: &Collector) -> String {
    format!("grpc://{}", collector.address)
}

fn status(code: Code, message: &str, retry_after: Option<Duration>) -> Reply {
    let details = ErrorDetails::with_retry_info(retry_after);
    Reply::Grpc(match retry_after {
        Some(_) => Status::with_error_details(code, message, details),
        None => Status::new(code, message),
    })
}

fn ids(requests: &[Received]) -> Vec<u64> {
    requests.iter().flat_map(Received::ids).collect()
}

#[test]
fn spans_arrive_once_in_order_as_calls_of_the_trace_service() {
    let collector = collector(vec![]);
    let gzipped = OtlpConfig {
        gzip: true,
        ..config(&url(&collector))
    };
    for config in [config(&url(&collector)), gzipped] {
        let exporter = Exporter::start(&config).unwrap();
        for id in 1..=50 {
            exporter.send(roots([id]));
        }
        assert_eq!(wait_settled(&exporter).delivered, 50);
        let requests = collector.rest();
        assert_eq!(ids(&requests), (1..=50).collect::<Vec<_>>());
        for request in requests {
            assert!(!request.overlaps);
            assert_eq!(
                request.path,
                "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
            );
            assert_eq!(request.headers["content-type"], "application/grpc");
            assert_eq!(request.headers.contains_key("grpc-encoding"), config.gzip);
        }
    }
}

#[test]
fn a_busy_collector_is_retried_after_the_requested_delay() {
    for code in [Code::Unavailable, Code::ResourceExhausted] {
        let collector = collector(vec![status(code, "busy", Some(Duration::from_secs(1)))]);
        let exporter = exporter(&url(&collector));
        exporter.send(roots([1]));
        let (first, second) = (collector.next(), collector.next());
        assert!(second.at - first.at >= Duration::from_secs(1));
        assert_eq!(wait_settled(&exporter).delivered, 1);
        let notices = notices(&exporter);
        assert_eq!(codes(&notices), ["otlp_waiting", "otlp_delivering"]);
        assert!(
            notices[0]
                .1
                .contains(&format!("returned {code:?}: \"busy\"")),
            "{}",
            notices[0].1
        );
    }
}

#[test]
fn retryable_codes_are_retried() {
    let codes = [
        Code::Unavailable,
        Code::Cancelled,
        Code::DeadlineExceeded,
        Code::Aborted,
        Code::OutOfRange,
        Code::DataLoss,
    ];
    let collector = collector(codes.map(|code| status(code, "", None)).into());
    let exporter = exporter(&url(&collector));
    exporter.send(roots([1]));
    let stats = wait_settled(&exporter);
    assert_eq!((stats.delivered, stats.retries), (1, 6));
}

#[test]
fn a_refused_request_is_not_retried() {
    for code in [
        Code::InvalidArgument,
        Code::Unauthenticated,
        Code::Unimplemented,
        Code::ResourceExhausted,
    ] {
        let collector = collector(vec![status(code, "no", None)]);
        let exporter = exporter(&url(&collector));
        exporter.send(roots([1]));
        let stats = wait_settled(&exporter);
        assert_eq!(
            (stats.dropped_by[&Reason::Refused], stats.requests),
            (1, 1),
            "{code:?}"
        );
        assert!(
            notices(&exporter)[0]
                .1
                .contains(&format!("returned {code:?}: \"no\""))
        );
    }
}

#[test]
fn rejected_spans_are_counted() {
    let collector = collector(vec![Reply::Rejected(1, "too old")]);
    let exporter = exporter(&url(&collector));
    exporter.send(roots([1, 2, 3]));
    let stats = wait_settled(&exporter);
    assert_eq!((stats.delivered, stats.rejected), (2, 1));
    assert_eq!(codes(&notices(&exporter)), ["otlp_rejected"]);
}

#[test]
fn a_malformed_response_is_an_error_and_not_a_panic() {
    let details = |value: &str| {
        let mut headers = vec![("grpc-status", "14".to_owned())];
        headers.push(("grpc-status-details-bin", value.to_owned()));
        Reply::Http(200, headers, vec![])
    };
    // Invalid base64, and base64 of an invalid message: the status still counts.
    let collector = collector(vec![
        details("!!!"),
        details("/////w"),
        Reply::Http(200, vec![], b"hello".to_vec()),
    ]);
    let exporter = exporter(&url(&collector));
    exporter.send(roots([1]));
    let stats = wait_settled(&exporter);
    assert_eq!(
        (stats.retries, stats.dropped_by[&Reason::InvalidResponse]),
        (2, 1)
    );
    exporter.send(roots([2]));
    assert_eq!(wait_settled(&exporter).delivered, 1, "delivery continues");
}

#[test]
fn a_connection_that_breaks_or_hangs_or_closes_is_reopened() {
    let address = ports::local(ports::free().unwrap());
    let script = vec![Reply::Break, Reply::Hang];
    let first = Collector::on(
        TcpListener::bind(address).unwrap(),
        Protocol::Grpc,
        script,
        None,
    );
    let timeout = Duration::from_secs(2);
    let exporter = Exporter::start(&OtlpConfig {
        timeout,
        ..config(&url(&first))
    })
    .unwrap();
    exporter.send(roots([1]));
    let stats = wait_settled(&exporter);
    assert_eq!((stats.delivered, stats.retries), (1, 2));
    drop(first);
    exporter.send(roots([2]));
    let tried = || Ok(Some(()).filter(|()| exporter.stats().retries > 4));
    wait::until("some retries", DEADLINE, tried).unwrap();
    let second = Collector::on(
        TcpListener::bind(address).unwrap(),
        Protocol::Grpc,
        vec![],
        None,
    );
    assert_eq!(wait_settled(&exporter).delivered, 2);
    assert_eq!(ids(&second.rest()), [2]);
}

#[test]
fn the_wrong_protocol_for_a_port_gives_a_hint() {
    let hint = "OTLP/HTTP is usually port 4318, OTLP/gRPC is 4317";
    let grpc = collector(vec![]);
    let wrong = exporter(&grpc.url());
    wrong.send(roots([1]));
    assert_eq!(wait_settled(&wrong).dropped_by[&Reason::InvalidResponse], 1);
    assert!(notices(&wrong)[0].1.contains(hint));

    // This one only closes the connection, as a stopping collector may do: the spans stay queued.
    let http = Collector::start(Protocol::Http, vec![]);
    let wrong = exporter(&url(&http));
    wrong.send(roots([1]));
    let tried = || Ok(Some(()).filter(|()| wrong.stats().retries > 0));
    wait::until("a retry", DEADLINE, tried).unwrap();
    assert_eq!(wrong.stats().waiting, 1);
    assert!(notices(&wrong)[0].1.contains(hint));
}
