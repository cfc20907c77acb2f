//! A collector that answers by a script, over HTTP/1.1 or HTTP/2, and shows what it was sent.

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

/// Long enough for a slow machine; a test that waits for it has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What is spoken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    Http,
    Grpc,
}

/// One answer of the script.
pub enum Say {
    /// Status, headers, body.
    Http(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// A gRPC status, in headers alone.
    Grpc(tonic::Status),
    /// Taken, but for so many.
    Rejected(i64, &'static str),
    /// No answer, the connection stays.
    Hang,
    /// No answer, the connection ends.
    Break,
}

impl Say {
    pub fn status(status: u16) -> Self {
        Self::Http(status, Vec::new(), Vec::new())
    }

    pub fn retry_after(status: u16, after: &str) -> Self {
        Self::Http(status, vec![("retry-after", after.to_owned())], Vec::new())
    }
}

/// One request.
pub struct Seen {
    pub at: Instant,
    pub path: String,
    pub headers: HeaderMap,
    /// Before compression.
    pub bytes: usize,
    pub request: ExportTraceServiceRequest,
    /// Another request was not answered yet.
    pub overlaps: bool,
}

impl Seen {
    /// The numbers of its spans, in order: see `spans::span`.
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

/// Listens until dropped.
pub struct Collector {
    pub address: SocketAddr,
    seen: mpsc::Receiver<Seen>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Clone)]
struct Service {
    speaks: Speaks,
    script: Arc<Mutex<VecDeque<Say>>>,
    seen: mpsc::Sender<Seen>,
    in_flight: Arc<AtomicUsize>,
}

impl Collector {
    /// Answers as `script` says, then takes everything.
    pub fn start(speaks: Speaks, script: Vec<Say>) -> Self {
        Self::on(
            TcpListener::bind("127.0.0.1:0").unwrap(),
            speaks,
            script,
            None,
        )
    }

    pub fn with_tls(speaks: Speaks, tls: ServerConfig) -> Self {
        Self::on(
            TcpListener::bind("127.0.0.1:0").unwrap(),
            speaks,
            Vec::new(),
            Some(tls),
        )
    }

    pub fn on(
        listener: TcpListener,
        speaks: Speaks,
        script: Vec<Say>,
        tls: Option<ServerConfig>,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let (sender, seen) = mpsc::channel();
        let service = Service {
            speaks,
            script: Arc::new(Mutex::new(script.into())),
            seen: sender,
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
            seen,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next request, in the order in which they came.
    pub fn next(&self) -> Seen {
        self.seen.recv_timeout(PATIENCE).expect("another request")
    }

    /// All requests so far that were not taken by [`Self::next`].
    pub fn rest(&self) -> Vec<Seen> {
        self.seen.try_iter().collect()
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
        let speaks = self.speaks;
        let service = service_fn(move |request| self.clone().request(request));
        // How a connection ends is the client's business here.
        let _ = match speaks {
            Speaks::Http => {
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(io, service)
                    .await
            }
            Speaks::Grpc => {
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
        // Also when the client gives up.
        let _done = Done(Arc::clone(&self.in_flight));
        let at = Instant::now();
        let (head, body) = request.into_parts();
        let body = body
            .collect()
            .await
            .map_err(|_| "the client broke off")?
            .to_bytes();
        let message = self.message(&head.headers, &body);
        let seen = Seen {
            at,
            path: head.uri.path().to_owned(),
            headers: head.headers,
            bytes: message.len(),
            request: ExportTraceServiceRequest::decode(message.as_slice()).unwrap(),
            overlaps: before > 0,
        };
        let say = self.script.lock().unwrap().pop_front();
        self.seen.send(seen).unwrap();
        match say.unwrap_or(Say::Rejected(0, "")) {
            Say::Http(status, headers, body) => {
                let mut response = Response::builder().status(status);
                for (name, value) in headers {
                    response = response.header(name, value);
                }
                Ok(response.body(Full::new(body.into()).boxed()).unwrap())
            }
            Say::Grpc(status) => {
                let mut response = Response::new(Full::default().boxed());
                status.add_header(response.headers_mut()).unwrap();
                Ok(response)
            }
            Say::Rejected(rejected_spans, said) => Ok(self.taken(rejected_spans, said)),
            Say::Hang => std::future::pending().await,
            Say::Break => Err("as the script says"),
        }
    }

    /// The request as it was before framing and compression.
    fn message(&self, headers: &HeaderMap, body: &[u8]) -> Vec<u8> {
        let (compressed, body) = match self.speaks {
            Speaks::Http => (
                headers
                    .get("content-encoding")
                    .is_some_and(|of| of == "gzip"),
                body,
            ),
            Speaks::Grpc => {
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

    fn taken(&self, rejected_spans: i64, said: &str) -> Response<BoxBody<Bytes, Infallible>> {
        let partial = ExportTracePartialSuccess {
            rejected_spans,
            error_message: said.to_owned(),
        };
        let partial_success =
            Some(partial).filter(|partial| *partial != ExportTracePartialSuccess::default());
        let message = ExportTraceServiceResponse { partial_success }.encode_to_vec();
        match self.speaks {
            Speaks::Http => Response::builder()
                .header("content-type", "application/x-protobuf")
                .body(Full::new(message.into()).boxed())
                .unwrap(),
            Speaks::Grpc => {
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

struct Done(Arc<AtomicUsize>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
