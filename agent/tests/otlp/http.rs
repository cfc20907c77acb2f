//! Delivery over OTLP/HTTP.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    thread,
    time::{Duration, Instant, SystemTime},
};

use tailback::emit::otlp::{Exporter, OtlpConfig, Reason};
use tailback_tests::{ports, wait};

use crate::{
    collector::{Collector, DEADLINE, Protocol, Received, Reply},
    spans::{batch, codes, config, exporter, large, notices, roots, span, wait_settled},
};

fn collector(script: Vec<Reply>) -> Collector {
    Collector::start(Protocol::Http, script)
}

fn ids(requests: &[Received]) -> Vec<u64> {
    requests.iter().flat_map(Received::ids).collect()
}

#[test]
fn spans_arrive_once_in_order_with_their_resource_one_request_at_a_time() {
    let collector = collector(vec![]);
    let exporter = exporter(&collector.url());
    for id in 1..=200 {
        let service = if id % 3 == 0 { "cart" } else { "shop" };
        exporter.send(batch(service, vec![span(id, id - 1)]));
    }
    assert_eq!(wait_settled(&exporter).delivered, 200);
    let requests = collector.rest();
    assert_eq!(ids(&requests), (1..=200).collect::<Vec<_>>());
    for request in &requests {
        assert!(!request.overlaps && request.bytes > 0);
        let service = if request.ids()[0] % 3 == 0 {
            "cart"
        } else {
            "shop"
        };
        let resource = request.request.resource_spans[0].resource.as_ref().unwrap();
        let service_name = resource.attributes[0]
            .value
            .as_ref()
            .unwrap()
            .value
            .clone()
            .unwrap();
        assert!(format!("{service_name:?}").contains(service));
        assert!(
            request
                .ids()
                .iter()
                .all(|id| (id % 3 == 0) == (service == "cart"))
        );
    }
    assert!(notices(&exporter).is_empty());
}

#[test]
fn requests_follow_otlp_and_carry_the_headers_of_the_environment() {
    let collector = collector(vec![]);
    let env = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url()),
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            "authorization=Bearer%20t0ken,x-tenant=shop".to_owned(),
        ),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip".to_owned()),
    ];
    let lookup = |name: &str| {
        env.iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.into())
    };
    let exporter = Exporter::start(&OtlpConfig::resolve(None, &lookup).unwrap().unwrap()).unwrap();
    exporter.send(roots([7]));
    let request = collector.next();
    assert_eq!(request.path, "/v1/traces");
    assert_eq!(request.ids(), [7]);
    let header = |name| request.headers[name].to_str().unwrap();
    assert_eq!(header("content-type"), "application/x-protobuf");
    assert_eq!(header("content-encoding"), "gzip");
    assert_eq!(header("authorization"), "Bearer t0ken");
    assert_eq!(header("x-tenant"), "shop");
    assert_eq!(
        header("user-agent"),
        concat!("tailback/", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn a_busy_collector_is_retried_after_the_requested_delay_in_order() {
    let collector = collector(vec![Reply::retry_after(503, "1")]);
    let exporter = exporter(&collector.url());
    exporter.send(roots([1]));
    let first = collector.next();
    exporter.send(roots([2]));
    let stats = wait_settled(&exporter);
    let retried = collector.next();
    assert!(
        retried.at - first.at >= Duration::from_secs(1),
        "{:?}",
        retried.at - first.at
    );
    assert_eq!(retried.ids()[0], 1);
    let mut all = retried.ids();
    all.extend(ids(&collector.rest()));
    assert_eq!(all, [1, 2]);
    assert_eq!((stats.delivered, stats.retries, stats.dropped()), (2, 1, 0));
    let notices = notices(&exporter);
    assert_eq!(codes(&notices), ["otlp_waiting", "otlp_delivering"]);
    assert!(
        notices[0].1.contains("returned 503 Service Unavailable"),
        "{}",
        notices[0].1
    );
}

#[test]
fn a_retry_after_date_is_honoured() {
    let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(2));
    let collector = collector(vec![Reply::retry_after(429, &date)]);
    let exporter = exporter(&collector.url());
    exporter.send(roots([1]));
    collector.next();
    collector.next();
    assert!(SystemTime::now() >= httpdate::parse_http_date(&date).unwrap());
}

#[test]
fn retryable_statuses_are_retried_until_the_request_is_accepted() {
    let failures = [429, 502, 503, 504, 503].map(Reply::status);
    let collector = collector(failures.into());
    let exporter = exporter(&collector.url());
    exporter.send(roots([1]));
    let stats = wait_settled(&exporter);
    assert_eq!((stats.delivered, stats.retries, stats.requests), (1, 5, 6));
    assert_eq!(ids(&collector.rest()), [1; 6]);
}

#[test]
fn a_connection_that_breaks_or_hangs_is_reopened() {
    let collector = collector(vec![Reply::Break, Reply::Hang]);
    let timeout = Duration::from_secs(2);
    let exporter = Exporter::start(&OtlpConfig {
        timeout,
        ..config(&collector.url())
    })
    .unwrap();
    exporter.send(roots([1]));
    let stats = wait_settled(&exporter);
    assert_eq!((stats.delivered, stats.retries), (1, 2));
    let notices = notices(&exporter);
    assert_eq!(
        codes(&notices),
        ["otlp_waiting", "otlp_waiting", "otlp_delivering"]
    );
    assert!(
        notices[0].1.contains("broke the connection"),
        "{}",
        notices[0].1
    );
    assert!(
        notices[1].1.contains("did not respond within 2s"),
        "{}",
        notices[1].1
    );
}

#[test]
fn a_refusal_drops_the_request_and_its_child_spans_only() {
    for status in [400, 401, 404, 413, 500] {
        let body = b"bad \x1b[31m spans".to_vec();
        let collector = collector(vec![Reply::Http(status, vec![], body)]);
        let exporter = exporter(&collector.url());
        exporter.send(roots([1]));
        assert_eq!(collector.next().ids(), [1]);
        let refused = || Ok(Some(()).filter(|()| exporter.stats().dropped() == 1));
        wait::until("the refusal", DEADLINE, refused).unwrap();
        exporter.send(batch("shop", vec![span(2, 1), span(3, 2), span(4, 0)]));
        let stats = wait_settled(&exporter);
        assert_eq!(ids(&collector.rest()), [4], "{status}");
        assert_eq!((stats.delivered, stats.retries), (1, 0));
        let by = [(Reason::ParentLost, 2), (Reason::Refused, 1)];
        assert_eq!(stats.dropped_by.into_iter().collect::<Vec<_>>(), by);
        let notices = notices(&exporter);
        assert_eq!(codes(&notices), ["otlp_refused"]);
        let text = &notices[0].1;
        assert!(
            text.contains(&collector.url()) && text.contains(&status.to_string()),
            "{text}"
        );
        assert!(
            text.contains("bad \\u{1b}[31m spans") && text.contains("1 span dropped"),
            "{text}"
        );
    }
}

#[test]
fn a_repeated_refusal_is_counted_each_time_and_reported_once() {
    let collector = collector((0..5).map(|_| Reply::status(400)).collect());
    let exporter = exporter(&collector.url());
    for id in 1..=5 {
        exporter.send(roots([id]));
        collector.next();
    }
    assert_eq!(wait_settled(&exporter).dropped(), 5);
    assert_eq!(codes(&notices(&exporter)), ["otlp_refused"]);
}

#[test]
fn rejected_spans_are_counted_and_not_resent() {
    let collector = collector(vec![Reply::Rejected(2, "too old")]);
    let exporter = exporter(&collector.url());
    exporter.send(roots([1, 2, 3]));
    let stats = wait_settled(&exporter);
    assert_eq!((stats.delivered, stats.rejected, stats.requests), (1, 2, 1));
    let notices = notices(&exporter);
    assert_eq!(codes(&notices), ["otlp_rejected"]);
    assert!(
        notices[0].1.contains("rejected 2 spans: \"too old\""),
        "{}",
        notices[0].1
    );
}

#[test]
fn an_html_page_is_not_an_otlp_response() {
    let page = Reply::Http(
        200,
        vec![("content-type", "text/html".into())],
        b"<html>Welcome!</html>".into(),
    );
    let collector = collector(vec![page]);
    let exporter = exporter(&collector.url());
    exporter.send(roots([1]));
    let stats = wait_settled(&exporter);
    assert_eq!(stats.dropped_by[&Reason::InvalidResponse], 1);
    assert_eq!(ids(&collector.rest()), [1]);
    assert!(notices(&exporter)[0].1.contains("not an OTLP response"));
}

/// Starts a server that replies to everything with the same bytes. Returns its URL.
fn reply_with(bytes: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(bytes);
        }
    });
    url
}

#[test]
fn a_malformed_response_is_not_retried_and_gives_a_hint() {
    for garbage in [
        &b"SSH-2.0-OpenSSH_9.2\r\n"[..],
        b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",
    ] {
        let exporter = exporter(&reply_with(garbage));
        exporter.send(roots([1]));
        let stats = wait_settled(&exporter);
        assert_eq!(
            stats.dropped_by.get(&Reason::InvalidResponse),
            Some(&1),
            "{garbage:?}: {:?}",
            stats.last_error
        );
        let notices = notices(&exporter);
        assert_eq!(codes(&notices), ["otlp_refused"]);
        assert!(
            notices[0].1.contains("grpc://HOST:4317"),
            "{}",
            notices[0].1
        );
    }
}

#[test]
fn an_endless_response_is_cut() {
    let endless: &[u8] = vec![b'x'; 3 << 20].leak();
    let mut response = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 99999999\r\n\r\n".to_vec();
    response.extend_from_slice(endless);
    let exporter = exporter(&reply_with(response.leak()));
    exporter.send(roots([1]));
    assert_eq!(wait_settled(&exporter).dropped_by[&Reason::Refused], 1);
}

#[test]
fn a_collector_that_starts_late_gets_all_spans_in_order() {
    let address = ports::local(ports::free().unwrap());
    let exporter = exporter(&format!("http://{address}"));
    for id in 1..=30 {
        exporter.send(roots([id]));
    }
    let tried = || Ok(Some(()).filter(|()| exporter.stats().retries > 2));
    wait::until("some retries", DEADLINE, tried).unwrap();
    assert_eq!(exporter.stats().waiting, 30);
    let collector = Collector::on(
        TcpListener::bind(address).unwrap(),
        Protocol::Http,
        vec![],
        None,
    );
    assert_eq!(wait_settled(&exporter).delivered, 30);
    assert_eq!(ids(&collector.rest()), (1..=30).collect::<Vec<_>>());
    let notices = notices(&exporter);
    assert_eq!(codes(&notices), ["otlp_waiting", "otlp_delivering"]);
    assert!(
        notices[0]
            .1
            .contains("cannot be reached: Connection refused"),
        "{}",
        notices[0].1
    );
    assert!(
        notices[1].1.contains("30 spans were queued"),
        "{}",
        notices[1].1
    );
}

#[test]
fn requests_stay_below_4_mib_and_all_spans_arrive() {
    let collector = collector(vec![]);
    let config = OtlpConfig {
        spool_bytes: 64 << 20,
        ..config(&collector.url())
    };
    let exporter = Exporter::start(&config).unwrap();
    exporter.send(batch(
        "shop",
        (1..=12).map(|id| large(id, 900_000)).collect(),
    ));
    assert_eq!(wait_settled(&exporter).delivered, 12);
    let requests = collector.rest();
    assert_eq!(ids(&requests), (1..=12).collect::<Vec<_>>());
    assert_eq!(requests.len(), 3);
    for request in requests {
        assert!(request.bytes <= 4 << 20, "{}", request.bytes);
    }
}

#[test]
fn send_never_blocks_and_a_full_spool_drops_whole_subtrees() {
    let collector = collector(vec![Reply::Hang]);
    let mut config = config(&collector.url());
    config.timeout = Duration::from_secs(2);
    config.spool_spans = 10;
    let exporter = Exporter::start(&config).unwrap();
    let began = Instant::now();
    for id in 1..=10_000 {
        // Every tenth span is a root; the others are its children.
        let root = (id - 1) / 10 * 10 + 1;
        exporter.send(batch(
            "shop",
            vec![span(id, if id == root { 0 } else { root })],
        ));
    }
    assert!(began.elapsed() < config.timeout, "{:?}", began.elapsed());
    collector.next();
    let stats = wait_settled(&exporter);
    let mut ids = vec![0];
    for request in collector.rest() {
        for span in &request.request.resource_spans[0].scope_spans[0].spans {
            let id = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_be_bytes);
            assert!(ids.contains(&id(&span.parent_span_id)));
            assert!(!ids.contains(&id(&span.span_id)));
            ids.push(id(&span.span_id));
        }
    }
    assert_eq!(stats.delivered as usize, ids.len() - 1);
    assert_eq!(stats.dropped(), 10_000 - stats.delivered);
    assert!(stats.dropped_by[&Reason::SpoolFull] > 0 && stats.dropped_by[&Reason::ParentLost] > 0);
    assert!(codes(&notices(&exporter)).contains(&"otlp_dropped"));
}
