//! Classifies a collector's response: accepted, retry, or refused. Pure.
//!
//! Follows the OTLP specification (Failures, OTLP/HTTP Response, OTLP/gRPC Throttling).

use std::time::{Duration, SystemTime};

use http::{HeaderMap, StatusCode, header};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use prost::Message as _;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::text::bounded;

/// Maximum number of bytes of a collector's message that our own message repeats.
const MAX_MESSAGE: usize = 300;

/// The outcome of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExportOutcome {
    /// Accepted, except for `rejected` spans.
    Accepted { rejected: u64, message: String },
    /// Retry, not before `after` if the collector asks for it.
    Retry {
        after: Option<Duration>,
        why: Problem,
    },
    /// Refused for good: never retry this request.
    Refused(Problem),
    /// Not a valid OTLP response: the collector may or may not have accepted the spans.
    Invalid(Problem),
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// A short name that identifies the kind of problem: `connect`, `timeout`, `400`, `Unavailable`, …
    pub kind: String,
    /// As a clause whose subject is the collector: `returned 503 Service Unavailable: "…"`.
    pub text: String,
}

impl Problem {
    pub fn new(kind: &str, text: impl Into<String>) -> Self {
        Self {
            kind: kind.to_owned(),
            text: text.into(),
        }
    }
}

/// Classifies a response over HTTP.
pub fn over_http(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    now: SystemTime,
) -> ExportOutcome {
    if status.is_success() {
        return accepted(headers, body);
    }
    let mut text = format!("returned {status}");
    let message = error_message(headers, body);
    if !message.is_empty() {
        text.push_str(&format!(": {message}"));
    } else if let Some(to) = headers
        .get(header::LOCATION)
        .filter(|_| status.is_redirection())
    {
        text.push_str(&format!(
            " to {:?}",
            bounded(&String::from_utf8_lossy(to.as_bytes()), MAX_MESSAGE)
        ));
    }
    let why = Problem::new(status.as_str(), text);
    match status.as_u16() {
        429 | 502 | 503 | 504 => {
            let after = headers
                .get(header::RETRY_AFTER)
                .and_then(|value| value.to_str().ok());
            ExportOutcome::Retry {
                after: after.and_then(|value| retry_after(value, now)),
                why,
            }
        }
        _ => ExportOutcome::Refused(why),
    }
}

/// Parses `Retry-After` (RFC 9110, 10.2.3): seconds, or a date.
fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// Parses a success, which may report rejected spans.
pub(super) fn accepted(headers: &HeaderMap, body: &[u8]) -> ExportOutcome {
    let is_json = content_type(headers).is_some_and(|of| of.starts_with("application/json"));
    let partial = if is_json {
        partial_from_json(body)
    } else {
        partial_from_proto(body)
    };
    match partial {
        Some((rejected, message)) => ExportOutcome::Accepted {
            rejected,
            message: bounded(&message, MAX_MESSAGE),
        },
        None => {
            let of = content_type(headers)
                .map(|of| format!(" of {:?}", bounded(of, 80)))
                .unwrap_or_default();
            let text = format!(
                "returned {} bytes{of} that are not an OTLP response",
                body.len()
            );
            ExportOutcome::Invalid(Problem::new("invalid", text))
        }
    }
}

/// The number of rejected spans and the collector's message; 0 with a message is a warning.
fn partial_from_proto(body: &[u8]) -> Option<(u64, String)> {
    let response = ExportTraceServiceResponse::decode(body).ok()?;
    let partial = response.partial_success.unwrap_or_default();
    Some((
        u64::try_from(partial.rejected_spans).unwrap_or(0),
        partial.error_message,
    ))
}

/// Some collectors respond with JSON to protobuf requests. OTLP/JSON writes 64-bit integers as strings.
fn partial_from_json(body: &[u8]) -> Option<(u64, String)> {
    let body: serde_json::Value = serde_json::from_slice(body).ok()?;
    let partial = body.as_object()?.get("partialSuccess");
    let rejected = partial.and_then(|partial| partial.get("rejectedSpans"));
    let rejected = rejected.and_then(|n| n.as_u64().or_else(|| n.as_str()?.parse().ok()));
    let message = partial.and_then(|partial| partial.get("errorMessage")?.as_str());
    Some((
        rejected.unwrap_or(0),
        message.unwrap_or_default().to_owned(),
    ))
}

fn content_type(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::CONTENT_TYPE)?.to_str().ok()
}

/// The message in the body of an error, quoted: that of a `google.rpc.Status`, or the text itself.
fn error_message(headers: &HeaderMap, body: &[u8]) -> String {
    let of = content_type(headers).unwrap_or_default();
    let text = if of.starts_with("application/x-protobuf") {
        tonic_types::Status::decode(body)
            .map(|status| status.message)
            .unwrap_or_default()
    } else {
        String::from_utf8_lossy(body).into_owned()
    };
    match text.trim() {
        "" => String::new(),
        text => format!("\"{}\"", bounded(text, MAX_MESSAGE)),
    }
}

/// Classifies a gRPC status other than OK.
pub fn over_grpc(status: &tonic::Status) -> ExportOutcome {
    let retry_info = status.get_details_retry_info();
    let after = retry_info.and_then(|info| info.retry_delay);
    let code = status.code();
    let mut text = format!("returned {code:?}");
    if !status.message().is_empty() {
        text.push_str(&format!(": \"{}\"", bounded(status.message(), MAX_MESSAGE)));
    }
    let why = Problem::new(&format!("{code:?}"), text);
    match code {
        Code::ResourceExhausted if after.is_none() => ExportOutcome::Refused(why),
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss => ExportOutcome::Retry {
            after: after.filter(|after| !after.is_zero()),
            why,
        },
        _ => ExportOutcome::Refused(why),
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTracePartialSuccess;
    use tonic_types::ErrorDetails;

    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.clone(), value.parse().unwrap()))
            .collect()
    }

    fn http(status: u16, pairs: &[(header::HeaderName, &str)], body: &[u8]) -> ExportOutcome {
        over_http(
            StatusCode::from_u16(status).unwrap(),
            &headers(pairs),
            body,
            NOW,
        )
    }

    fn refused(outcome: ExportOutcome) -> String {
        match outcome {
            ExportOutcome::Refused(why) => why.text,
            other => panic!("{other:?}"),
        }
    }

    fn retry(outcome: ExportOutcome) -> Option<Duration> {
        match outcome {
            ExportOutcome::Retry { after, .. } => after,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_empty_success_accepts_all_spans() {
        let accepted = ExportOutcome::Accepted {
            rejected: 0,
            message: String::new(),
        };
        assert_eq!(http(200, &[], b""), accepted);
        assert_eq!(
            http(200, &[(header::CONTENT_TYPE, "application/json")], b"{}"),
            accepted
        );
        assert_eq!(http(202, &[], b""), accepted);
    }

    #[test]
    fn a_partial_success_reports_rejected_spans_in_protobuf_and_json() {
        let accepted = ExportOutcome::Accepted {
            rejected: 3,
            message: "too old".into(),
        };
        let partial = ExportTracePartialSuccess {
            rejected_spans: 3,
            error_message: "too old".into(),
        };
        let body = ExportTraceServiceResponse {
            partial_success: Some(partial),
        }
        .encode_to_vec();
        assert_eq!(
            http(
                200,
                &[(header::CONTENT_TYPE, "application/x-protobuf")],
                &body
            ),
            accepted
        );
        let json = br#"{"partialSuccess":{"rejectedSpans":"3","errorMessage":"too old"}}"#;
        assert_eq!(
            http(
                200,
                &[(header::CONTENT_TYPE, "application/json; charset=utf-8")],
                json
            ),
            accepted
        );
    }

    #[test]
    fn a_negative_number_of_rejected_spans_counts_as_zero() {
        let partial = ExportTracePartialSuccess {
            rejected_spans: -5,
            error_message: String::new(),
        };
        let body = ExportTraceServiceResponse {
            partial_success: Some(partial),
        }
        .encode_to_vec();
        assert_eq!(
            http(200, &[], &body),
            ExportOutcome::Accepted {
                rejected: 0,
                message: String::new()
            }
        );
    }

    #[test]
    fn a_success_that_is_not_otlp_is_invalid() {
        for (of, body) in [
            ("text/html", "<html>Welcome</html>"),
            ("application/json", "[1"),
            ("application/json", "7"),
        ] {
            let outcome = http(200, &[(header::CONTENT_TYPE, of)], body.as_bytes());
            assert!(
                matches!(&outcome, ExportOutcome::Invalid(why) if why.text.contains(of)),
                "{outcome:?}"
            );
        }
    }

    #[test]
    fn only_the_status_codes_of_the_specification_are_retried() {
        for status in 300..600 {
            let again = matches!(http(status, &[], b""), ExportOutcome::Retry { .. });
            assert_eq!(again, [429, 502, 503, 504].contains(&status), "{status}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let after = |value| retry(http(503, &[(header::RETRY_AFTER, value)], b""));
        assert_eq!(after("7"), Some(Duration::from_secs(7)));
        assert_eq!(
            after("Thu, 01 Jan 1970 00:01:00 GMT"),
            Some(Duration::from_secs(60))
        );
        assert_eq!(
            retry_after(
                "Thu, 01 Jan 1970 00:01:00 GMT",
                NOW + Duration::from_secs(90)
            ),
            Some(Duration::ZERO)
        );
        for nonsense in ["", "soon", "-1", "1.5", "99999999999999999999999"] {
            assert_eq!(after(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn a_refusal_quotes_the_collectors_message_bounded_and_escaped() {
        let text = refused(http(
            400,
            &[(header::CONTENT_TYPE, "text/plain")],
            b"bad\nspan\x1b[2J\xff",
        ));
        assert_eq!(
            text,
            "returned 400 Bad Request: \"bad\\nspan\\u{1b}[2J\u{fffd}\""
        );
        let long = refused(http(400, &[], "x".repeat(1 << 20).as_bytes()));
        assert!(long.len() < MAX_MESSAGE + 100);
        let status = tonic_types::Status {
            code: 3,
            message: "no trace id".into(),
            details: vec![],
        };
        let proto = [(header::CONTENT_TYPE, "application/x-protobuf")];
        assert_eq!(
            refused(http(400, &proto, &status.encode_to_vec())),
            "returned 400 Bad Request: \"no trace id\""
        );
        assert_eq!(
            refused(http(400, &proto, b"\xff\xff")),
            "returned 400 Bad Request"
        );
    }

    #[test]
    fn a_redirect_is_refused_with_its_location() {
        let text = refused(http(301, &[(header::LOCATION, "https://c/v1/traces")], b""));
        assert_eq!(
            text,
            "returned 301 Moved Permanently to \"https://c/v1/traces\""
        );
    }

    #[test]
    fn grpc_codes_are_retried_as_the_specification_says() {
        for code in 1..=16 {
            let again = matches!(
                over_grpc(&tonic::Status::new(code.into(), "")),
                ExportOutcome::Retry { .. }
            );
            assert_eq!(
                again,
                [1, 4, 10, 11, 14, 15].contains(&code),
                "{:?}",
                Code::from(code)
            );
        }
    }

    #[test]
    fn grpc_retry_info_is_honoured_and_makes_resource_exhausted_retryable() {
        let asked = ErrorDetails::with_retry_info(Some(Duration::from_secs(9)));
        for code in [Code::Unavailable, Code::ResourceExhausted] {
            let status = tonic::Status::with_error_details(code, "busy", asked.clone());
            assert_eq!(retry(over_grpc(&status)), Some(Duration::from_secs(9)));
        }
        let text = refused(over_grpc(&tonic::Status::resource_exhausted(
            "message too large",
        )));
        assert_eq!(text, "returned ResourceExhausted: \"message too large\"");
    }
}
