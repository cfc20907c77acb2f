//! A scripted collector for OTLP/HTTP and OTLP/gRPC that records the requests it receives.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io::Read as _,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use prost::Message as _;
use tokio::sync::oneshot;
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};

/// Deadline of each wait, long enough for a slow machine.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// OTLP protocol of the collector.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Http,
    Grpc,
}

/// One scripted reply.
pub enum Reply {
    /// Status, headers, body.
    Http(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// A gRPC status in a trailers-only response.
    Grpc(tonic::Status),
    /// Success, with this many rejected spans and an error message.
    Rejected(i64, &'static str),
    /// No response; the connection stays open.
    Hang,
    /// No response; the connection is closed.
    Break,
}

impl Reply {
    pub fn status(status: u16) -> Self {
        Self::Http(status, Vec::new(), Vec::new())
    }

    pub fn retry_after(status: u16, after: &str) -> Self {
        Self::Http(status, vec![("retry-after", after.to_owned())], Vec::new())
    }
}

/// A received request.
pub struct Received {
    pub at: Instant,
    pub path: String,
    pub headers: HeaderMap,
    /// Size before compression.
    pub bytes: usize,
    pub request: ExportTraceServiceRequest,
    /// Whether another request was still in flight.
    pub overlaps: bool,
}

impl Received {
    /// Ids of its spans in order; see `spans::span`.
    pub fn ids(&self) -> Vec<u64> {
        let spans = self
            .request
            .resource_spans
            .iter()
            .flat_map(|one| &one.scope_spans)
            .flat_map(|one| &one.spans);
        spans
            .map(|span| u64::from_be_bytes(span.span_id.as_slice().try_into().unwrap()))
            .collect()
    }
}

/// A collector that listens until dropped.
pub struct Collector {
    pub address: SocketAddr,
    received: mpsc::Receiver<Received>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Clone)]
struct Service {
    protocol: Protocol,
    script: Arc<Mutex<VecDeque<Reply>>>,
    received: mpsc::Sender<Received>,
    in_flight: Arc<AtomicUsize>,
}

impl Collector {
    /// Replies as scripted, then accepts everything.
    pub fn start(protocol: Protocol, script: Vec<Reply>) -> Self {
        Self::on(
            TcpListener::bind("127.0.0.1:0").unwrap(),
            protocol,
            script,
            None,
        )
    }

    /// Accepts everything over TLS.
    pub fn with_tls(protocol: Protocol, tls: ServerConfig) -> Self {
        Self::on(
            TcpListener::bind("127.0.0.1:0").unwrap(),
            protocol,
            Vec::new(),
            Some(tls),
        )
    }

    /// Like [`Collector::start`], on a given listener, optionally with TLS.
    pub fn on(
        listener: TcpListener,
        protocol: Protocol,
        script: Vec<Reply>,
        tls: Option<ServerConfig>,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let (sender, received) = mpsc::channel();
        let service = Service {
            protocol,
            script: Arc::new(Mutex::new(script.into())),
            received: sender,
            in_flight: Arc::default(),
        };
        let tls = tls.map(|config| TlsAcceptor::from(Arc::new(config)));
        let (stop, stopped) = oneshot::channel();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                tokio::select! {
                    () = serve(listener, service, tls) => {}
                    _ = stopped => {}
                }
            });
        });
        Self {
            address,
            received,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Waits for the next request.
    pub fn next(&self) -> Received {
        self.received
            .recv_timeout(DEADLINE)
            .expect("another request")
    }

    /// All requests so far that [`Self::next`] did not return.
    pub fn rest(&self) -> Vec<Received> {
        self.received.try_iter().collect()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

async fn serve(listener: TcpListener, service: Service, tls: Option<TlsAcceptor>) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let service = service.clone();
        let tls = tls.clone();
        tokio::spawn(async move {
            match tls {
                None => service.connection(TokioIo::new(stream)).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        service.connection(TokioIo::new(stream)).await;
                    }
                }
            }
        });
    }
}

impl Service {
    async fn connection<T>(self, io: T)
    where
        T: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let protocol = self.protocol;
        let service = service_fn(move |request| self.clone().request(request));
        // Errors are expected: clients close connections.
        let _ = match protocol {
            Protocol::Http => {
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(io, service)
                    .await
            }
            Protocol::Grpc => {
                hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(io, service)
                    .await
            }
        };
    }

    async fn request(
        self,
        request: Request<Incoming>,
    ) -> Result<Response<BoxBody<Bytes, Infallible>>, &'static str> {
        let before = self.in_flight.fetch_add(1, Ordering::SeqCst);
        // Decremented even if the client gives up.
        let _done = Done(Arc::clone(&self.in_flight));
        let at = Instant::now();
        let (head, body) = request.into_parts();
        let body = body
            .collect()
            .await
            .map_err(|_| "the client disconnected")?
            .to_bytes();
        let message = self.message(&head.headers, &body);
        let received = Received {
            at,
            path: head.uri.path().to_owned(),
            headers: head.headers,
            bytes: message.len(),
            request: ExportTraceServiceRequest::decode(message.as_slice()).unwrap(),
            overlaps: before > 0,
        };
        let reply = self.script.lock().unwrap().pop_front();
        self.received.send(received).unwrap();
        match reply.unwrap_or(Reply::Rejected(0, "")) {
            Reply::Http(status, headers, body) => {
                let mut response = Response::builder().status(status);
                for (name, value) in headers {
                    response = response.header(name, value);
                }
                Ok(response.body(Full::new(body.into()).boxed()).unwrap())
            }
            Reply::Grpc(status) => {
                let mut response = Response::new(Full::default().boxed());
                status.add_header(response.headers_mut()).unwrap();
                Ok(response)
            }
            Reply::Rejected(rejected_spans, message) => Ok(self.accepted(rejected_spans, message)),
            Reply::Hang => std::future::pending().await,
            Reply::Break => Err("scripted disconnect"),
        }
    }

    /// The request without framing and compression.
    fn message(&self, headers: &HeaderMap, body: &[u8]) -> Vec<u8> {
        let (compressed, body) = match self.protocol {
            Protocol::Http => (
                headers
                    .get("content-encoding")
                    .is_some_and(|of| of == "gzip"),
                body,
            ),
            Protocol::Grpc => {
                let length = u32::from_be_bytes(body[1..5].try_into().unwrap()) as usize;
                assert_eq!(length, body.len() - 5);
                let compressed = body[0] == 1;
                assert_eq!(
                    compressed,
                    headers.get("grpc-encoding").is_some_and(|of| of == "gzip")
                );
                (compressed, &body[5..])
            }
        };
        let mut message = Vec::new();
        if compressed {
            flate2::read::GzDecoder::new(body)
                .read_to_end(&mut message)
                .unwrap();
        } else {
            message.extend_from_slice(body);
        }
        message
    }

    fn accepted(&self, rejected_spans: i64, message: &str) -> Response<BoxBody<Bytes, Infallible>> {
        let partial = ExportTracePartialSuccess {
            rejected_spans,
            error_message: message.to_owned(),
        };
        let partial_success =
            Some(partial).filter(|partial| *partial != ExportTracePartialSuccess::default());
        let message = ExportTraceServiceResponse { partial_success }.encode_to_vec();
        match self.protocol {
            Protocol::Http => Response::builder()
                .header("content-type", "application/x-protobuf")
                .body(Full::new(message.into()).boxed())
                .unwrap(),
            Protocol::Grpc => {
                let mut framed = vec![0];
                framed.extend((message.len() as u32).to_be_bytes());
                framed.extend(message);
                let trailers =
                    HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
                let trailers = std::future::ready(Some(Ok(trailers)));
                Response::builder()
                    .header("content-type", "application/grpc")
                    .body(Full::new(framed.into()).with_trailers(trailers).boxed())
                    .unwrap()
            }
        }
    }
}

/// Decrements the number of requests in flight on drop.
struct Done(Arc<AtomicUsize>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
