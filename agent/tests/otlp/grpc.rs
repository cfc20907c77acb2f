//! Over gRPC.

use std::{net::TcpListener, time::Duration};

use tailback::emit::otlp::{Exporter, OtlpConfig, Reason};
use tailback_tests::{ports, wait};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    collector::{Collector, PATIENCE, Say, Seen, Speaks},
    spans::{codes, config, exporter, roots, said, settled},
};

fn collector(script: Vec<Say>) -> Collector {
    Collector::start(Speaks::Grpc, script)
}

fn url(collector: &Collector) -> String {
    format!("grpc://{}", collector.address)
}

fn status(code: Code, message: &str, come_back: Option<Duration>) -> Say {
    let details = ErrorDetails::with_retry_info(come_back);
    Say::Grpc(match come_back {
        Some(_) => Status::with_error_details(code, message, details),
        None => Status::new(code, message),
    })
}

fn ids(requests: &[Seen]) -> Vec<u64> {
    requests.iter().flat_map(Seen::ids).collect()
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
        assert_eq!(settled(&exporter).delivered, 50);
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
        assert_eq!(settled(&exporter).delivered, 1);
        let said = said(&exporter);
        assert_eq!(codes(&said), ["otlp_waiting", "otlp_delivering"]);
        assert!(
            said[0].1.contains(&format!("answered {code:?}: \"busy\"")),
            "{}",
            said[0].1
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
    let stats = settled(&exporter);
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
        let stats = settled(&exporter);
        assert_eq!(
            (stats.dropped_by[&Reason::Refused], stats.requests),
            (1, 1),
            "{code:?}"
        );
        assert!(
            said(&exporter)[0]
                .1
                .contains(&format!("answered {code:?}: \"no\""))
        );
    }
}

#[test]
fn rejected_spans_are_counted() {
    let collector = collector(vec![Say::Rejected(1, "too old")]);
    let exporter = exporter(&url(&collector));
    exporter.send(roots([1, 2, 3]));
    let stats = settled(&exporter);
    assert_eq!((stats.delivered, stats.rejected), (2, 1));
    assert_eq!(codes(&said(&exporter)), ["otlp_rejected"]);
}

#[test]
fn a_malformed_response_is_an_error_and_not_a_panic() {
    let details = |value: &str| {
        let mut headers = vec![("grpc-status", "14".to_owned())];
        headers.push(("grpc-status-details-bin", value.to_owned()));
        Say::Http(200, headers, vec![])
    };
    // Not base64, and base64 of no message: the status still counts.
    let collector = collector(vec![
        details("!!!"),
        details("/////w"),
        Say::Http(200, vec![], b"hello".to_vec()),
    ]);
    let exporter = exporter(&url(&collector));
    exporter.send(roots([1]));
    let stats = settled(&exporter);
    assert_eq!((stats.retries, stats.dropped_by[&Reason::Garbage]), (2, 1));
    exporter.send(roots([2]));
    assert_eq!(settled(&exporter).delivered, 1, "the delivery lives on");
}

#[test]
fn a_connection_that_breaks_or_hangs_or_closes_is_reopened() {
    let address = ports::local(ports::free().unwrap());
    let script = vec![Say::Break, Say::Hang];
    let first = Collector::on(
        TcpListener::bind(address).unwrap(),
        Speaks::Grpc,
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
    let stats = settled(&exporter);
    assert_eq!((stats.delivered, stats.retries), (1, 2));
    drop(first);
    exporter.send(roots([2]));
    let tried = || Ok(Some(()).filter(|()| exporter.stats().retries > 4));
    wait::until("some tries", PATIENCE, tried).unwrap();
    let second = Collector::on(
        TcpListener::bind(address).unwrap(),
        Speaks::Grpc,
        vec![],
        None,
    );
    assert_eq!(settled(&exporter).delivered, 2);
    assert_eq!(ids(&second.rest()), [2]);
}

#[test]
fn the_wrong_protocol_for_a_port_gives_a_hint() {
    let hint = "OTLP/HTTP is usually port 4318, OTLP/gRPC is 4317";
    let grpc = collector(vec![]);
    let wrong = exporter(&grpc.url());
    wrong.send(roots([1]));
    assert_eq!(settled(&wrong).dropped_by[&Reason::Garbage], 1);
    assert!(said(&wrong)[0].1.contains(hint));

    // This one only hangs up, as a collector that stops may do too: the spans wait.
    let http = Collector::start(Speaks::Http, vec![]);
    let wrong = exporter(&url(&http));
    wrong.send(roots([1]));
    let tried = || Ok(Some(()).filter(|()| wrong.stats().retries > 0));
    wait::until("a try", PATIENCE, tried).unwrap();
    assert_eq!(wrong.stats().waiting, 1);
    assert!(said(&wrong)[0].1.contains(hint));
}
