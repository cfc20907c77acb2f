//! The export settings: `--otlp`, else the standard `OTEL_EXPORTER_OTLP_*` variables. Pure: the environment is an argument.
//!
//! Three additions to the OpenTelemetry specification: `grpc://` and `grpcs://` select gRPC; if no protocol is set, port
//! 4317 without a path means gRPC, the only protocol on that port by convention; an invalid value is an error instead
//! of a warning and a default.

mod endpoint;

use std::{env, ffi::OsString, fmt, path::PathBuf, time::Duration};

use http::{HeaderName, HeaderValue, Uri};
use percent_encoding::percent_decode_str;

use self::endpoint::{ConfiguredUrl, UrlForm};

/// The OTLP transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    HttpProtobuf,
    Grpc,
}

/// All settings of the delivery.
#[derive(Clone, Debug)]
pub struct OtlpConfig {
    /// OTLP/HTTP: the full request URL. OTLP/gRPC: scheme, host and port.
    pub endpoint: Uri,
    pub protocol: Protocol,
    /// Sent with every request. Never printed: they may contain credentials.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Time limit of one request, from connecting to the end of the response.
    pub timeout: Duration,
    pub gzip: bool,
    pub tls: TlsFiles,
    /// Capacity of the spool, in spans.
    pub spool_spans: usize,
    /// Capacity of the spool, in encoded bytes. In memory, spans take about three times as much.
    pub spool_bytes: usize,
    pub retry: Retry,
}

/// PEM files. `None` means the system's certificate authorities and no client certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// `OTEL_EXPORTER_OTLP_CERTIFICATE`
    pub authorities: Option<PathBuf>,
    /// `OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE`
    pub certificate: Option<PathBuf>,
    /// `OTEL_EXPORTER_OTLP_CLIENT_KEY`
    pub key: Option<PathBuf>,
}

/// Backoff between retries of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// The first wait; each further one doubles.
    pub initial: Duration,
    /// The longest wait.
    pub max: Duration,
    /// The longest wait that a collector may request.
    pub max_requested: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            initial: Duration::from_millis(500),
            max: Duration::from_secs(30),
            max_requested: Duration::from_secs(300),
        }
    }
}

/// An invalid setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The option or environment variable.
    pub setting: String,
    pub problem: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.setting, self.problem)
    }
}

impl std::error::Error for ConfigError {}

pub(super) fn invalid_setting(setting: &str, problem: impl Into<String>) -> ConfigError {
    ConfigError {
        setting: setting.to_owned(),
        problem: problem.into(),
    }
}

/// The command-line option for the endpoint.
const FLAG: &str = "--otlp";

/// Headers that the protocol sets; the environment must not.
const RESERVED: [&str; 7] = [
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "host",
    "te",
    "transfer-encoding",
];

impl OtlpConfig {
    /// The settings from `--otlp URL`, if given, and the environment. `None` if no endpoint is set.
    ///
    /// # Errors
    ///
    /// Names the invalid option or variable.
    pub fn from_env_and(url: Option<&str>) -> Result<Option<Self>, ConfigError> {
        Self::resolve(url, &|name| env::var_os(name))
    }

    /// Like [`Self::from_env_and`], with the caller's environment.
    ///
    /// # Errors
    ///
    /// Names the invalid option or variable.
    pub fn resolve(
        url: Option<&str>,
        env: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Option<Self>, ConfigError> {
        let env = Environment(env);
        let given = if let Some(url) = url {
            ConfiguredUrl::new(FLAG, url, UrlForm::BaseOrFull)
        } else {
            if env
                .get("OTEL_SDK_DISABLED")?
                .is_some_and(|is| is.eq_ignore_ascii_case("true"))
                || env
                    .get("OTEL_TRACES_EXPORTER")?
                    .is_some_and(|is| is == "none")
            {
                return Ok(None);
            }
            let traces = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
            let base = "OTEL_EXPORTER_OTLP_ENDPOINT";
            if let Some(url) = env.get(traces)? {
                ConfiguredUrl::new(traces, &url, UrlForm::Full)
            } else if let Some(url) = env.get(base)? {
                ConfiguredUrl::new(base, &url, UrlForm::Base)
            } else {
                return Ok(None);
            }
        };
        let (endpoint, protocol) = given.resolve(&env)?;
        Ok(Some(Self {
            headers: headers(&env)?,
            timeout: timeout(&env)?,
            gzip: gzip(&env)?,
            tls: tls_files(&env)?,
            ..Self::to(endpoint, protocol)
        }))
    }

    /// The default settings for an endpoint.
    pub fn to(endpoint: Uri, protocol: Protocol) -> Self {
        Self {
            endpoint,
            protocol,
            headers: Vec::new(),
            timeout: Duration::from_secs(10),
            gzip: false,
            tls: TlsFiles::default(),
            spool_spans: 8192,
            spool_bytes: 4 << 20,
            retry: Retry::default(),
        }
    }

    /// Whether the connection is encrypted.
    pub fn is_https(&self) -> bool {
        self.endpoint.scheme_str() == Some("https")
    }
}

/// Environment variables; an empty one counts as unset.
struct Environment<'a>(&'a dyn Fn(&str) -> Option<OsString>);

impl Environment<'_> {
    fn get(&self, name: &str) -> Result<Option<String>, ConfigError> {
        let Some(value) = (self.0)(name).filter(|value| !value.is_empty()) else {
            return Ok(None);
        };
        let text = value.into_string();
        text.map(|value| Some(value.trim().to_owned()))
            .map_err(|_| invalid_setting(name, "is not valid UTF-8"))
    }

    /// The variable for traces, else the one for all signals, with its name for errors.
    fn signal(&self, what: &str) -> Result<Option<(String, String)>, ConfigError> {
        for name in [
            format!("OTEL_EXPORTER_OTLP_TRACES_{what}"),
            format!("OTEL_EXPORTER_OTLP_{what}"),
        ] {
            if let Some(value) = self.get(&name)? {
                return Ok(Some((name, value)));
            }
        }
        Ok(None)
    }
}

fn protocol(env: &Environment<'_>) -> Result<Option<Protocol>, ConfigError> {
    let Some((name, value)) = env.signal("PROTOCOL")? else {
        return Ok(None);
    };
    match value.to_ascii_lowercase().as_str() {
        "grpc" => Ok(Some(Protocol::Grpc)),
        "http/protobuf" => Ok(Some(Protocol::HttpProtobuf)),
        _ => Err(invalid_setting(
            &name,
            format!("{value:?} is not supported: use grpc or http/protobuf"),
        )),
    }
}

fn timeout(env: &Environment<'_>) -> Result<Duration, ConfigError> {
    let Some((name, value)) = env.signal("TIMEOUT")? else {
        return Ok(Duration::from_secs(10));
    };
    match value.parse() {
        Ok(ms @ 1..=3_600_000) => Ok(Duration::from_millis(ms)),
        _ => Err(invalid_setting(
            &name,
            format!("{value:?} is not a number of milliseconds from 1 to 3600000"),
        )),
    }
}

fn gzip(env: &Environment<'_>) -> Result<bool, ConfigError> {
    let Some((name, value)) = env.signal("COMPRESSION")? else {
        return Ok(false);
    };
    match value.to_ascii_lowercase().as_str() {
        "gzip" => Ok(true),
        "none" => Ok(false),
        _ => Err(invalid_setting(
            &name,
            format!("{value:?} is not supported: use gzip or none"),
        )),
    }
}

fn tls_files(env: &Environment<'_>) -> Result<TlsFiles, ConfigError> {
    let path = |what| {
        env.signal(what)
            .map(|found| found.map(|(_, value)| PathBuf::from(value)))
    };
    let files = TlsFiles {
        authorities: path("CERTIFICATE")?,
        certificate: path("CLIENT_CERTIFICATE")?,
        key: path("CLIENT_KEY")?,
    };
    if files.certificate.is_some() != files.key.is_some() {
        let both = "a client certificate needs its key and vice versa (…_CLIENT_CERTIFICATE, …_CLIENT_KEY)";
        return Err(invalid_setting(
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
            both,
        ));
    }
    Ok(files)
}

/// Parses `key=value,key=value` with percent-encoded values. Errors never print a value: it may be a credential.
fn headers(env: &Environment<'_>) -> Result<Vec<(HeaderName, HeaderValue)>, ConfigError> {
    let Some((name, list)) = env.signal("HEADERS")? else {
        return Ok(Vec::new());
    };
    let mut headers = Vec::new();
    for (i, entry) in list
        .split(',')
        .enumerate()
        .filter(|(_, entry)| !entry.trim().is_empty())
    {
        let Some((key, value)) = entry.split_once('=') else {
            return Err(invalid_setting(
                &name,
                format!("entry {} is not key=value", i + 1),
            ));
        };
        let key: HeaderName = key.trim().parse().map_err(|_| {
            invalid_setting(
                &name,
                format!("the key of entry {} is not a valid header name", i + 1),
            )
        })?;
        if RESERVED.contains(&key.as_str()) || key.as_str().starts_with("grpc-") {
            return Err(invalid_setting(
                &name,
                format!("{key} is set by the protocol"),
            ));
        }
        let decoded = percent_decode_str(value.trim()).decode_utf8();
        let value = decoded
            .ok()
            .and_then(|value| HeaderValue::from_str(&value).ok());
        let mut value = value.ok_or_else(|| {
            invalid_setting(
                &name,
                format!("the value of {key} is not a valid header value"),
            )
        })?;
        value.set_sensitive(true);
        headers.push((key, value));
    }
    Ok(headers)
}

#[cfg(test)]
mod tests;
