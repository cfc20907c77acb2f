use super::*;

type Env<'a> = &'a [(&'a str, &'a str)];

fn resolve(url: Option<&str>, env: Env) -> Result<Option<OtlpConfig>, ConfigError> {
    let lookup = |name: &str| {
        env.iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| OsString::from(value))
    };
    OtlpConfig::resolve(url, &lookup)
}

/// The endpoint and protocol that come out of it.
fn endpoint(url: Option<&str>, env: Env) -> (String, Protocol) {
    let config = resolve(url, env).unwrap().unwrap();
    (config.endpoint.to_string(), config.protocol)
}

fn error(url: Option<&str>, env: Env) -> String {
    resolve(url, env).unwrap_err().to_string()
}

const BASE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const TRACES: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
const PROTOCOL: &str = "OTEL_EXPORTER_OTLP_PROTOCOL";
const HEADERS: &str = "OTEL_EXPORTER_OTLP_HEADERS";
const HTTP: Protocol = Protocol::HttpProtobuf;
const GRPC: Protocol = Protocol::Grpc;

#[test]
fn without_an_endpoint_nothing_is_exported() {
    assert!(resolve(None, &[]).unwrap().is_none());
    assert!(
        resolve(None, &[(BASE, ""), (TRACES, "")])
            .unwrap()
            .is_none()
    );
    assert!(
        resolve(None, &[("OTEL_EXPORTER_OTLP_TIMEOUT", "nonsense")])
            .unwrap()
            .is_none()
    );
}

#[test]
fn the_path_is_appended_to_the_base_endpoint_but_not_to_the_traces_endpoint() {
    let appended = "http://c:4318/v1/traces";
    assert_eq!(
        endpoint(None, &[(BASE, "http://c:4318")]),
        (appended.into(), HTTP)
    );
    assert_eq!(
        endpoint(None, &[(BASE, "http://c:4318/")]),
        (appended.into(), HTTP)
    );
    assert_eq!(
        endpoint(None, &[(BASE, "https://c/otel")]),
        ("https://c/otel/v1/traces".into(), HTTP)
    );
    assert_eq!(
        endpoint(None, &[(TRACES, "http://c:4318/in?key=1")]),
        ("http://c:4318/in?key=1".into(), HTTP)
    );
    assert_eq!(
        endpoint(None, &[(TRACES, "http://c:4318/")]),
        ("http://c:4318/".into(), HTTP)
    );
    let both = [(BASE, "http://base:1"), (TRACES, "http://traces:2/x")];
    assert_eq!(endpoint(None, &both), ("http://traces:2/x".into(), HTTP));
}

#[test]
fn the_option_overrides_the_environment_and_accepts_either_form() {
    let env = [(BASE, "http://base:1"), (TRACES, "http://traces:2/x")];
    let whole = "http://c:4318/v1/traces";
    assert_eq!(endpoint(Some("http://c:4318"), &env), (whole.into(), HTTP));
    assert_eq!(
        endpoint(Some("http://c:4318/v1/traces"), &env),
        (whole.into(), HTTP)
    );
    assert_eq!(
        endpoint(Some("http://[::1]:4318"), &env),
        ("http://[::1]:4318/v1/traces".into(), HTTP)
    );
}

#[test]
fn grpc_is_selected_by_variable_scheme_or_port() {
    assert_eq!(
        endpoint(None, &[(BASE, "http://c:1234"), (PROTOCOL, "grpc")]),
        ("http://c:1234/".into(), GRPC)
    );
    assert_eq!(
        endpoint(Some("grpc://c:1234"), &[]),
        ("http://c:1234/".into(), GRPC)
    );
    assert_eq!(
        endpoint(Some("grpcs://c"), &[]),
        ("https://c:4317/".into(), GRPC)
    );
    assert_eq!(
        endpoint(Some("grpc://[::1]"), &[]),
        ("http://[::1]:4317/".into(), GRPC)
    );
    assert_eq!(
        endpoint(Some("http://c:4317"), &[]),
        ("http://c:4317/".into(), GRPC)
    );
    assert_eq!(
        endpoint(None, &[(BASE, "http://c:4317/")]),
        ("http://c:4317/".into(), GRPC)
    );
}

#[test]
fn the_protocol_variable_overrides_the_port_but_not_the_scheme() {
    let http = [(PROTOCOL, "http/protobuf")];
    assert_eq!(
        endpoint(Some("http://c:4317"), &http),
        ("http://c:4317/v1/traces".into(), HTTP)
    );
    assert_eq!(
        endpoint(Some("grpc://c:4317"), &http),
        ("http://c:4317/".into(), GRPC)
    );
    let both = [
        (PROTOCOL, "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
    ];
    assert_eq!(
        endpoint(Some("http://c:80"), &both),
        ("http://c:80/v1/traces".into(), HTTP)
    );
}

#[test]
fn a_grpc_endpoint_without_a_scheme_is_encrypted_by_default() {
    let grpc = [(BASE, "c:4317"), (PROTOCOL, "grpc")];
    assert_eq!(endpoint(None, &grpc), ("https://c:4317/".into(), GRPC));
    let insecure = [grpc[0], grpc[1], ("OTEL_EXPORTER_OTLP_INSECURE", "true")];
    assert_eq!(endpoint(None, &insecure), ("http://c:4317/".into(), GRPC));
}

#[test]
fn the_environment_can_disable_the_export_unless_the_option_is_set() {
    for off in [
        ("OTEL_TRACES_EXPORTER", "none"),
        ("OTEL_SDK_DISABLED", "true"),
    ] {
        assert!(
            resolve(None, &[(BASE, "http://c:4318"), off])
                .unwrap()
                .is_none()
        );
        assert!(resolve(Some("http://c:4318"), &[off]).unwrap().is_some());
    }
}

#[test]
fn an_invalid_endpoint_is_rejected_with_a_valid_example() {
    for url in [
        "",
        "localhost:4318",
        "ftp://c",
        "http://",
        "http://:4318",
        "http://a b",
        "http:///v1/traces",
        "://c",
    ] {
        let message = error(Some(url), &[]);
        assert!(
            message.starts_with("--otlp: ") && message.contains("http://localhost:4318"),
            "{url:?}: {message}"
        );
    }
    assert!(
        error(None, &[(BASE, "nonsense")]).starts_with("OTEL_EXPORTER_OTLP_ENDPOINT: \"nonsense\"")
    );
    assert!(
        error(Some("grpc://c:4317/v1/traces"), &[])
            .contains("gRPC takes no path: use http://c:4317")
    );
    assert!(error(Some("http://c:4318/?a=b"), &[]).contains("cannot have a query"));
}

#[test]
fn credentials_in_the_url_are_rejected_and_not_printed() {
    let message = error(Some("http://user:secret@c:4318"), &[]);
    assert!(
        message.contains("OTEL_EXPORTER_OTLP_HEADERS") && !message.contains("secret"),
        "{message}"
    );
}

#[test]
fn invalid_timeout_compression_and_protocol_are_named() {
    let config = |extra| resolve(Some("http://c"), &[extra]).map(Option::unwrap);
    let timeout = config(("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2500"))
        .unwrap()
        .timeout;
    assert_eq!(timeout, Duration::from_millis(2500));
    assert!(
        config(("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"))
            .unwrap()
            .gzip
    );
    assert!(
        !config(("OTEL_EXPORTER_OTLP_COMPRESSION", "none"))
            .unwrap()
            .gzip
    );
    for wrong in [
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
        ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "zstd"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "/cert.pem"),
    ] {
        let message = config(wrong).unwrap_err();
        assert_eq!(message.setting, wrong.0, "{message}");
    }
}

#[test]
fn headers_are_decoded_and_marked_sensitive() {
    let env = [
        (HEADERS, " x-Tenant = shop , authorization=Basic%20abc%3D,,"),
        (BASE, "http://c"),
    ];
    let headers = resolve(None, &env).unwrap().unwrap().headers;
    let read: Vec<_> = headers
        .iter()
        .map(|(k, v)| (k.as_str(), v.to_str().unwrap()))
        .collect();
    assert_eq!(
        read,
        [("x-tenant", "shop"), ("authorization", "Basic abc=")]
    );
    assert!(headers.iter().all(|(_, value)| value.is_sensitive()));
    assert!(!format!("{:?}", resolve(None, &env)).contains("Basic"));
}

#[test]
fn an_invalid_header_is_rejected_without_printing_its_value() {
    for list in [
        "secret",
        "a=b,secret",
        "a b=secret",
        "a=%0Asecret",
        "a=%ffsecret",
        "content-length=1",
        "grpc-x=1",
    ] {
        let message = error(Some("http://c"), &[(HEADERS, list)]);
        assert!(
            message.starts_with("OTEL_EXPORTER_OTLP_HEADERS: ") && !message.contains("secret"),
            "{message}"
        );
    }
}

#[cfg(unix)]
#[test]
fn a_value_that_is_not_utf_8_is_rejected() {
    use std::os::unix::ffi::OsStringExt as _;
    let lookup = |name: &str| (name == BASE).then(|| OsString::from_vec(vec![b'h', 0xff]));
    let message = OtlpConfig::resolve(None, &lookup).unwrap_err().to_string();
    assert_eq!(message, "OTEL_EXPORTER_OTLP_ENDPOINT: is not valid UTF-8");
}
