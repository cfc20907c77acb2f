//! OTLP/gRPC framing of a request that the exporter has encoded: one unary call. Pure.
//!
//! The parent module says why this is not tonic's client. Protocol: `doc/PROTOCOL-HTTP2.md` in grpc/grpc.

use std::{
    io::Read as _,
    time::{Duration, SystemTime},
};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use flate2::read::GzDecoder;
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri, Version, header, uri::PathAndQuery};
use percent_encoding::percent_decode;

use super::response::{self, ExportOutcome, Problem};

/// The path of the method that exports spans.
const EXPORT: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
/// Size of the prefix of each message: a compression flag and the length.
const PREFIX_BYTES: usize = 5;
/// Maximum size of a response after decompression, bytes.
const MAX_MESSAGE_BYTES: u64 = 64 << 10;

/// Decodes base64 with or without padding: senders differ.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The URL of the export method on a collector.
pub fn export_url(collector: &Uri) -> Result<Uri, http::Error> {
    let mut parts = collector.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::from_static(EXPORT));
    Ok(Uri::from_parts(parts)?)
}

/// Turns the exporter's OTLP/HTTP request into a gRPC call.
pub fn call(mut request: Request<Bytes>, timeout: Duration) -> Request<Bytes> {
    *request.version_mut() = Version::HTTP_2;
    let headers = request.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    let timeout = HeaderValue::try_from(format!("{}m", timeout.as_millis().min(99_999_999)));
    if let Ok(timeout) = timeout {
        headers.insert("grpc-timeout", timeout);
    }
    let encoding = headers.remove(header::CONTENT_ENCODING);
    let compressed = encoding.is_some();
    if let Some(encoding) = encoding {
        headers.insert("grpc-encoding", encoding);
    }
    request.map(|message| {
        let mut framed = BytesMut::with_capacity(PREFIX_BYTES + message.len());
        framed.put_u8(u8::from(compressed));
        // At most MAX_REQUEST_BYTES.
        framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
        framed.put(message);
        framed.freeze()
    })
}

/// Classifies a response. Without a body the gRPC status is in the headers, otherwise in the trailers.
pub fn classify(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    trailers: &HeaderMap,
    now: SystemTime,
) -> ExportOutcome {
    let with_status = [headers, trailers]
        .into_iter()
        .find(|map| map.contains_key("grpc-status"));
    let Some(map) = with_status else {
        if !status.is_success() {
            // From a proxy, or from a server that does not speak gRPC.
            return response::over_http(status, headers, body, now);
        }
        return invalid(format!(
            "returned {status} without a gRPC status: is this an OTLP/gRPC endpoint?"
        ));
    };
    let code = map
        .get("grpc-status")
        .and_then(|code| code.to_str().ok()?.parse::<i32>().ok());
    match code {
        None => invalid("returned an invalid gRPC status".to_owned()),
        Some(0) => match message(headers, body) {
            Some(message) => response::accepted(&HeaderMap::new(), &message),
            None => invalid(format!(
                "returned {} bytes that are not a gRPC message",
                body.len()
            )),
        },
        Some(code) => {
            let text = map
                .get("grpc-message")
                .map(HeaderValue::as_bytes)
                .unwrap_or_default();
            let text = percent_decode(text).decode_utf8_lossy().into_owned();
            let details = map
                .get("grpc-status-details-bin")
                .map(HeaderValue::as_bytes)
                .unwrap_or_default();
            let details = BASE64.decode(details).unwrap_or_default();
            response::over_grpc(&tonic::Status::with_details(
                code.into(),
                text,
                details.into(),
            ))
        }
    }
}

/// Extracts the single message of a body. A server may compress its response if our request was compressed.
fn message(headers: &HeaderMap, body: &[u8]) -> Option<Vec<u8>> {
    let (prefix, message) = body.split_at_checked(PREFIX_BYTES)?;
    let length = u32::from_be_bytes(prefix[1..].try_into().ok()?);
    if usize::try_from(length) != Ok(message.len()) {
        return None;
    }
    match prefix[0] {
        0 => Some(message.to_vec()),
        1 if headers.get("grpc-encoding")? == "gzip" => {
            let mut plain = Vec::new();
            GzDecoder::new(message)
                .take(MAX_MESSAGE_BYTES)
                .read_to_end(&mut plain)
                .ok()?;
            Some(plain)
        }
        _ => None,
    }
}

fn invalid(text: String) -> ExportOutcome {
    ExportOutcome::Invalid(Problem::new("invalid", text))
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::collector::trace::v1::{
        ExportTracePartialSuccess, ExportTraceServiceResponse,
    };
    use prost::Message as _;
    use tonic_types::{ErrorDetails, StatusExt as _};

    use flate2::{Compression, read::GzEncoder};

    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn map(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect()
    }

    fn with_trailers(body: &[u8], trailers: &[(&'static str, &str)]) -> ExportOutcome {
        classify(StatusCode::OK, &HeaderMap::new(), body, &map(trailers), NOW)
    }

    fn framed(message: &[u8]) -> Vec<u8> {
        let request = Request::new(Bytes::copy_from_slice(message));
        call(request, Duration::from_secs(1)).into_body().to_vec()
    }

    fn is_invalid(outcome: &ExportOutcome) -> bool {
        matches!(outcome, ExportOutcome::Invalid(_))
    }

    #[test]
    fn a_call_is_the_message_with_its_prefix() {
        let request = Request::builder().header("content-type", "application/x-protobuf");
        let call = call(
            request.body(Bytes::from_static(b"spans")).unwrap(),
            Duration::from_millis(1500),
        );
        assert_eq!(call.body().as_ref(), b"\0\0\0\0\x05spans");
        assert_eq!(call.headers()["content-type"], "application/grpc");
        assert_eq!(call.headers()["grpc-timeout"], "1500m");
        assert_eq!(call.headers()["te"], "trailers");
        assert_eq!(call.version(), Version::HTTP_2);
    }

    #[test]
    fn a_compressed_request_is_marked_as_compressed() {
        let request = Request::builder()
            .header("content-encoding", "gzip")
            .body(Bytes::from_static(b"z"))
            .unwrap();
        let call = call(request, Duration::from_secs(1));
        assert_eq!(call.body().as_ref(), b"\x01\0\0\0\x01z");
        assert_eq!(call.headers()["grpc-encoding"], "gzip");
        assert!(!call.headers().contains_key("content-encoding"));
    }

    #[test]
    fn the_call_has_the_path_of_the_export_method() {
        let url = export_url(&"https://c:4317/".parse().unwrap()).unwrap();
        assert_eq!(
            url,
            "https://c:4317/opentelemetry.proto.collector.trace.v1.TraceService/Export"
        );
    }

    #[test]
    fn a_success_reports_rejected_spans() {
        assert_eq!(
            with_trailers(&framed(b""), &[("grpc-status", "0")]),
            ExportOutcome::Accepted {
                rejected: 0,
                message: String::new()
            }
        );
        let partial = ExportTracePartialSuccess {
            rejected_spans: 2,
            error_message: "late".into(),
        };
        let response = ExportTraceServiceResponse {
            partial_success: Some(partial),
        }
        .encode_to_vec();
        assert_eq!(
            with_trailers(&framed(&response), &[("grpc-status", "0")]),
            ExportOutcome::Accepted {
                rejected: 2,
                message: "late".into()
            }
        );
    }

    #[test]
    fn a_compressed_response_is_decompressed_within_bounds() {
        let gzip = |message: &[u8]| {
            let mut packed = Vec::new();
            let mut encoder = GzEncoder::new(message, Compression::default());
            encoder.read_to_end(&mut packed).unwrap();
            let mut body = framed(&packed);
            body[0] = 1;
            body
        };
        let trailers = map(&[("grpc-status", "0")]);
        let headers = map(&[("grpc-encoding", "gzip")]);
        let of = |body: &[u8]| classify(StatusCode::OK, &headers, body, &trailers, NOW);
        let accepted = ExportOutcome::Accepted {
            rejected: 0,
            message: String::new(),
        };
        assert_eq!(of(&gzip(b"")), accepted);
        assert!(
            is_invalid(&of(&gzip(&[0; 10 << 20]))),
            "a decompression bomb"
        );
        assert!(is_invalid(&of(b"\x01\0\0\0\x02no")));
        assert!(is_invalid(&with_trailers(
            &gzip(b""),
            &[("grpc-status", "0")]
        )));
    }

    #[test]
    fn an_error_has_its_message_and_retry_delay_in_trailers_or_headers() {
        let asked = ErrorDetails::with_retry_info(Some(Duration::from_secs(3)));
        let status = tonic::Status::with_error_details(tonic::Code::Unavailable, "", asked);
        let details = BASE64.encode(status.details());
        let pairs = [
            ("grpc-status", "14"),
            ("grpc-message", "too%20busy"),
            ("grpc-status-details-bin", &*details),
        ];
        let expected = ExportOutcome::Retry {
            after: Some(Duration::from_secs(3)),
            why: Problem::new("Unavailable", "returned Unavailable: \"too busy\""),
        };
        assert_eq!(with_trailers(b"", &pairs), expected);
        assert_eq!(
            classify(StatusCode::OK, &map(&pairs), b"", &HeaderMap::new(), NOW),
            expected
        );
    }

    #[test]
    fn invalid_status_details_do_not_hide_the_status() {
        let pairs = [
            ("grpc-status", "8"),
            ("grpc-status-details-bin", "!!! no base64 !!!"),
        ];
        let refused = ExportOutcome::Refused(Problem::new(
            "ResourceExhausted",
            "returned ResourceExhausted",
        ));
        assert_eq!(with_trailers(b"", &pairs), refused);
        let pairs = [
            ("grpc-status", "3"),
            ("grpc-message", "%ff%0a"),
            ("grpc-status-details-bin", "AAAA"),
        ];
        let text = "returned InvalidArgument: \"\u{fffd}\\n\"";
        assert_eq!(
            with_trailers(b"", &pairs),
            ExportOutcome::Refused(Problem::new("InvalidArgument", text))
        );
    }

    #[test]
    fn a_response_that_is_not_grpc_is_invalid() {
        assert!(is_invalid(&with_trailers(b"hello", &[])));
        assert!(is_invalid(&with_trailers(b"", &[("grpc-status", "fine")])));
        for body in [
            &b""[..],
            b"\0\0\0",
            b"\0\0\0\0\x09short",
            b"\x01\0\0\0\0",
            b"\0\0\0\0\x02\xff\xff",
        ] {
            assert!(
                is_invalid(&with_trailers(body, &[("grpc-status", "0")])),
                "{body:?}"
            );
        }
    }

    #[test]
    fn a_proxys_error_is_classified_as_http() {
        let proxy = |status| classify(status, &HeaderMap::new(), b"", &HeaderMap::new(), NOW);
        assert!(matches!(
            proxy(StatusCode::BAD_GATEWAY),
            ExportOutcome::Retry { .. }
        ));
        assert!(matches!(
            proxy(StatusCode::NOT_FOUND),
            ExportOutcome::Refused(_)
        ));
    }
}
