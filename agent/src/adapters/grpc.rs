//! A gRPC server for the adapters that need one: HTTP/2 without TLS, one service per endpoint.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{Request, Response};
use hyper::body::{Body as HttpBody, Bytes, Frame, Incoming, SizeHint};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::time::{sleep, timeout};
use tonic::{Status, body::Body};

use super::listen::{Endpoint, Slot, Slots};

/// Concurrent connections. A proxy may open one for each of its clients.
const MAX_CONNECTIONS: usize = 1_024;
/// Concurrent calls per connection.
const MAX_CALLS: u32 = 4;
/// Unsent bytes buffered per call.
const MAX_SEND_BUFFER: usize = 16 << 10;
/// Largest request message, bytes.
pub const MAX_MESSAGE: usize = 16 << 10;
/// HTTP/2 flow control window for a call and for a connection, bytes: the default of RFC 9113, 6.9.2.
const WINDOW: u32 = 65_535;
/// Interval of keep-alive pings.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// Time limit for four things: the reply to a ping, the first call of a connection, the request message of a call, and a read
/// when the flow control window is full. A slower client is disconnected.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How often a connection is checked against these limits.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Serves until dropped. `answer` handles each call.
pub async fn serve<A, F>(endpoint: Endpoint, answer: A)
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let (listener, stats) = endpoint.listen().await;
    let slots = Slots::new(MAX_CONNECTIONS);
    loop {
        let (stream, slot) = listener.accept_within(&slots, &stats).await;
        let (answer, stats) = (answer.clone(), Arc::clone(&stats));
        tokio::spawn(async move {
            let connection = stats.connection();
            let calls = Arc::new(Calls::new(slot));
            let of_connection = Arc::clone(&calls);
            let service = hyper::service::service_fn(move |request| {
                let call = of_connection.begin();
                let answer = answer(request);
                async move {
                    let response = with_timeout(answer).await;
                    Ok::<_, Infallible>(response.map(|body| Watched { body, call }))
                }
            });
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .max_concurrent_streams(MAX_CALLS)
                .max_send_buf_size(MAX_SEND_BUFFER)
                .initial_stream_window_size(WINDOW)
                .initial_connection_window_size(WINDOW)
                .keep_alive_interval(PING_INTERVAL)
                .keep_alive_timeout(TIMEOUT);
            // An error is the client's: it disconnected, or does not speak HTTP/2.
            tokio::select! {
                _ = builder.serve_connection(TokioIo::new(stream), service) => {}
                () = calls.stuck() => stats.closed(),
                () = calls.slot.revoked() => {}
            }
            drop((connection, calls));
        });
    }
}

/// The calls of one connection.
struct Calls {
    slot: Slot,
    state: Mutex<CallsState>,
}

#[derive(Default)]
struct CallsState {
    last_id: u64,
    /// For each open call, since when the client has room for no further message.
    open: HashMap<u64, Option<Instant>>,
}

impl Calls {
    fn new(slot: Slot) -> Self {
        Self {
            slot,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, CallsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>) -> Call {
        let mut state = self.lock();
        state.last_id += 1;
        let id = state.last_id;
        state.open.insert(id, None);
        self.slot.set_busy(true);
        Call {
            id,
            calls: Arc::clone(self),
        }
    }

    /// Returns if the client makes no call in time, or does not read the messages of one.
    async fn stuck(&self) {
        let began = Instant::now();
        loop {
            sleep(CHECK_INTERVAL).await;
            let state = self.lock();
            let never_calls = state.last_id == 0 && began.elapsed() > TIMEOUT;
            let mut full_since = state.open.values().flatten();
            if never_calls || full_since.any(|since| since.elapsed() > TIMEOUT) {
                return;
            }
        }
    }
}

/// One call, until it is dropped.
struct Call {
    id: u64,
    calls: Arc<Calls>,
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut state = self.calls.lock();
        state.open.remove(&self.id);
        if state.open.is_empty() {
            self.calls.slot.set_busy(false);
        }
    }
}

/// The body of a response. The server polls it for the next frame only when the client's flow control window has room. So if it
/// is not polled, the client does not read.
struct Watched {
    body: Body,
    call: Call,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        let full_since = frame.is_ready().then(Instant::now);
        self.call.calls.lock().open.insert(self.call.id, full_since);
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Fails a call whose request message does not arrive in time. The reply has no time limit.
async fn with_timeout(answer: impl Future<Output = Response<Body>>) -> Response<Body> {
    match timeout(TIMEOUT, answer).await {
        Ok(response) => response,
        Err(_) => {
            Status::deadline_exceeded("the request message did not arrive in time").into_http()
        }
    }
}

/// The reply to a call of an unknown method.
pub fn no_such_method(path: &str) -> Response<Body> {
    Status::unimplemented(format!("no such method: {path}")).into_http()
}
