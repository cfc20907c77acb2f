//! HTTP: all GETs of one poll on one connection, which is then closed, because an idle connection may occupy a thread
//! of the service. Redirects are not followed, nothing is decompressed.

use anyhow::{Context as _, Result, bail, ensure};
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    body::{Body as _, Bytes},
    client::conn::http1::{Builder, SendRequest},
};
use hyper_util::rt::TokioIo;
use tokio::task::JoinHandle;

use super::{Endpoint, MAX_ANSWER_BYTES, MAX_HTTP_BYTES, Origin, TooLarge, text};

/// Largest head of an answer, bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Maximum number of header fields of an answer.
const MAX_HEADERS: usize = 64;

/// A connection.
pub struct Client {
    requests: SendRequest<Empty<Bytes>>,
    host: String,
    driver: JoinHandle<()>,
}

impl Drop for Client {
    /// The connection ends with the client, also while an answer is under way.
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Client {
    pub async fn connect(endpoint: &Endpoint, from: &Origin) -> Result<Self> {
        let mut connection = endpoint.connect(from, None).await?;
        // Also of answers that announce others, without end.
        connection.allowance = Some(MAX_HTTP_BYTES);
        let host = match endpoint {
            Endpoint::Tcp { address, .. } => Endpoint::address(*address).to_string(),
            Endpoint::Unix { .. } => "localhost".to_owned(),
        };
        let handshake = Builder::new()
            .max_buf_size(MAX_HEAD_BYTES)
            .max_headers(MAX_HEADERS)
            .handshake(TokioIo::new(connection));
        let (requests, driver) = handshake.await.context("no HTTP connection")?;
        let driver = tokio::task::spawn_local(async move {
            // Its errors are those of the request.
            let _ = driver.await;
        });
        Ok(Self {
            requests,
            host,
            driver,
        })
    }

    /// Whether another request can be sent.
    pub fn is_open(&self) -> bool {
        !self.requests.is_closed()
    }

    /// The body of the answer to a GET.
    pub async fn get(&mut self, path: &str) -> Result<String> {
        let request = Request::get(path)
            .header(header::HOST, &self.host)
            .header(
                header::USER_AGENT,
                concat!("tailback/", env!("CARGO_PKG_VERSION")),
            )
            .header(header::ACCEPT, "text/plain, application/json;q=0.9")
            .body(Empty::new())?;
        self.requests.ready().await?;
        let response = self.requests.send_request(request).await?;
        let status = response.status();
        if status.is_redirection() {
            bail!("GET {path}: {status}: redirects are not followed");
        }
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            bail!(
                "GET {path}: {status}: it requires credentials, which are not supported over HTTP"
            );
        }
        ensure!(status == StatusCode::OK, "GET {path}: {status}");
        if let Some(encoding) = response.headers().get(header::CONTENT_ENCODING) {
            ensure!(
                encoding == "identity",
                "GET {path}: the answer is compressed, which was not asked for"
            );
        }
        let mut body = response.into_body();
        let announced = body.size_hint().lower();
        let too_large = || Err(TooLarge).with_context(|| format!("GET {path}"));
        if announced > MAX_ANSWER_BYTES as u64 {
            return too_large();
        }
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else {
                continue;
            };
            if bytes.len() + data.len() > MAX_ANSWER_BYTES {
                return too_large();
            }
            bytes.extend_from_slice(&data);
        }
        text(bytes)
    }
}
