//! A gRPC server for the adapters that need one: HTTP/2 without TLS, one service per endpoint.

use std::{
    convert::Infallible,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};
use tonic::{Status, body::Body};

use super::listen::Endpoint;

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
/// Time limit for the reply to a ping, for the first call of a connection, and for the request message of a call. A slower
/// client is disconnected.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Serves until dropped. `answer` handles each call.
pub async fn serve<A, F>(endpoint: Endpoint, answer: A)
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let (listener, stats) = endpoint.listen().await;
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let (stream, slot) = listener.accept_within(&slots, &stats).await;
        let (answer, stats) = (answer.clone(), Arc::clone(&stats));
        tokio::spawn(async move {
            let connection = stats.connection();
            let has_called = Arc::new(AtomicBool::new(false));
            let called = Arc::clone(&has_called);
            let service = hyper::service::service_fn(move |request| {
                called.store(true, Ordering::Relaxed);
                let answer = answer(request);
                async move { Ok::<_, Infallible>(with_timeout(answer).await) }
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
            let never_calls = async {
                sleep(TIMEOUT).await;
                if has_called.load(Ordering::Relaxed) {
                    std::future::pending::<()>().await;
                }
            };
            // An error is the client's: it disconnected, or does not speak HTTP/2.
            tokio::select! {
                _ = builder.serve_connection(TokioIo::new(stream), service) => {}
                () = never_calls => stats.rejected(),
            }
            drop((connection, slot));
        });
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
