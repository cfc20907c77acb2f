//! The HTTP client under the exporter, for both protocols (see the parent module for why it is our own).
//!
//! It classifies each response here, where all of it is available, and keeps the result until the delivery takes it.

use std::{
    error::Error,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use opentelemetry_http::{HttpClient, HttpError};

use super::{
    config::{ConfigError, OtlpConfig, Protocol},
    grpc,
    response::{self, ExportOutcome, Problem},
    tls,
};
use crate::text::bounded;

/// Maximum number of bytes read of a response. OTLP responses are tiny; a longer error page is cut.
const MAX_RESPONSE_BYTES: usize = 64 << 10;
const USER_AGENT: HeaderValue =
    HeaderValue::from_static(concat!("tailback/", env!("CARGO_PKG_VERSION")));

type Connector = HttpsConnector<HttpConnector>;

/// The client, with the classified response to the last request.
pub struct Wire {
    protocol: Protocol,
    headers: HeaderMap,
    timeout: Duration,
    connector: Connector,
    client: Mutex<Client<Connector, Full<Bytes>>>,
    outcome: Mutex<Option<ExportOutcome>>,
}

impl Wire {
    /// Reads the certificates. The first request connects.
    pub fn new(config: &OtlpConfig) -> Result<Self, ConfigError> {
        let builder = HttpsConnectorBuilder::new()
            .with_tls_config(tls::client(config)?)
            .https_or_http();
        let connector = match config.protocol {
            Protocol::HttpProtobuf => builder.enable_http1().build(),
            Protocol::Grpc => builder.enable_http2().build(),
        };
        Ok(Self {
            protocol: config.protocol,
            headers: config.headers.iter().cloned().collect(),
            timeout: config.timeout,
            client: Mutex::new(client(&connector, config.protocol)),
            connector,
            outcome: Mutex::new(None),
        })
    }

    /// Takes the classified response to the last request; `None` if nothing was sent.
    pub fn take_outcome(&self) -> Option<ExportOutcome> {
        lock(&self.outcome).take()
    }

    async fn exchange(&self, request: Request<Bytes>) -> Exchange {
        let client = lock(&self.client).clone();
        let exchange = async {
            let response = client.request(request.map(Full::new)).await?;
            let (head, body) = response.into_parts();
            let (body, trailers) = read(body).await?;
            Ok(Received {
                head,
                body,
                trailers,
            })
        };
        match tokio::time::timeout(self.timeout, exchange).await {
            Ok(exchange) => exchange,
            Err(_) => Err(Failure::Timeout(self.timeout)),
        }
    }
}

fn client(connector: &Connector, protocol: Protocol) -> Client<Connector, Full<Bytes>> {
    Client::builder(TokioExecutor::new())
        .http2_only(protocol == Protocol::Grpc)
        .pool_max_idle_per_host(1)
        .build(connector.clone())
}

/// Locks a mutex. A poisoned one is used all the same: its plain values stay consistent if a thread panics.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A complete response, with trailers.
struct Received {
    head: http::response::Parts,
    body: Bytes,
    trailers: HeaderMap,
}

type Exchange = Result<Received, Failure>;

/// Reads the body, up to [`MAX_RESPONSE_BYTES`], and the trailers.
async fn read(mut body: Incoming) -> Result<(Bytes, HeaderMap), hyper::Error> {
    let mut read = BytesMut::new();
    let mut trailers = HeaderMap::new();
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) => {
                read.extend_from_slice(&data[..data.len().min(MAX_RESPONSE_BYTES - read.len())]);
                if read.len() == MAX_RESPONSE_BYTES {
                    break;
                }
            }
            Err(frame) => trailers = frame.into_trailers().unwrap_or_default(),
        }
    }
    Ok((read.freeze(), trailers))
}

#[async_trait]
impl HttpClient for Wire {
    async fn send_bytes(&self, mut request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        request.headers_mut().insert(header::USER_AGENT, USER_AGENT);
        request.headers_mut().extend(self.headers.clone());
        if self.protocol == Protocol::Grpc {
            request = grpc::call(request, self.timeout);
        }
        let exchange = self.exchange(request).await;
        if exchange.is_err() {
            // Drop the connection pool: a connection whose peer vanished silently would be reused again and again.
            *lock(&self.client) = client(&self.connector, self.protocol);
        }
        let now = SystemTime::now();
        let outcome = match &exchange {
            Ok(Received {
                head,
                body,
                trailers,
            }) => match self.protocol {
                Protocol::HttpProtobuf => {
                    response::over_http(head.status, &head.headers, body, now)
                }
                Protocol::Grpc => grpc::classify(head.status, &head.headers, body, trailers, now),
            },
            Err(failure) => failure.outcome(),
        };
        *lock(&self.outcome) = Some(outcome);
        // The exporter only logs this result.
        exchange
            .map(|received| Response::from_parts(received.head, Bytes::new()))
            .map_err(Into::into)
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire")
            .field("protocol", &self.protocol)
            .finish_non_exhaustive()
    }
}

/// Why there is no response.
#[derive(Debug)]
enum Failure {
    Timeout(Duration),
    Request(hyper_util::client::legacy::Error),
    ExportOutcome(hyper::Error),
}

impl From<hyper_util::client::legacy::Error> for Failure {
    fn from(error: hyper_util::client::legacy::Error) -> Self {
        Self::Request(error)
    }
}

impl From<hyper::Error> for Failure {
    fn from(error: hyper::Error) -> Self {
        Self::ExportOutcome(error)
    }
}

impl Failure {
    fn outcome(&self) -> ExportOutcome {
        let why = match self {
            Self::Timeout(after) => {
                Problem::new("timeout", format!("did not respond within {after:?}"))
            }
            Self::Request(error) if error.is_connect() => Problem::new(
                "connect",
                format!("cannot be reached: {}", root_cause(error)),
            ),
            Self::Request(_) | Self::ExportOutcome(_) => {
                let hyper = self.hyper();
                let cause = root_cause(self);
                if hyper.is_some_and(hyper::Error::is_parse) {
                    let text = format!(
                        "did not respond with HTTP ({cause}): is this the port of another protocol?"
                    );
                    return ExportOutcome::Invalid(Problem::new("invalid", text));
                }
                Problem::new("broken", format!("broke the connection: {cause}"))
            }
        };
        ExportOutcome::Retry { after: None, why }
    }

    fn hyper(&self) -> Option<&hyper::Error> {
        match self {
            Self::Timeout(_) => None,
            Self::Request(error) => error.source()?.downcast_ref(),
            Self::ExportOutcome(error) => Some(error),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Timeout(after) => write!(f, "no response within {after:?}"),
            Self::Request(error) => error.fmt(f),
            Self::ExportOutcome(error) => error.fmt(f),
        }
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Timeout(_) => None,
            Self::Request(error) => error.source(),
            Self::ExportOutcome(error) => error.source(),
        }
    }
}

/// The innermost error: the outer ones only say which layers it passed through.
fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    bounded(&innermost.to_string(), 200)
}
