//! gRPC, for the adapters that speak it: HTTP/2 without TLS, one service each.

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

use super::listen::Door;

/// Connections at once, and calls on one of them: a proxy may open a connection for each of its clients.
const MOST: usize = 1_024;
const CALLS: u32 = 4;
/// What may be sent and not read on a call; of what comes, a message, and what is not read of a call and of a connection.
const UNREAD: usize = 16 << 10;
pub const MESSAGE: usize = 16 << 10;
const WINDOW: u32 = 65_535;
/// A client that does not answer a ping is gone; one that calls nothing for so long after it came is let go.
const PING_EVERY: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves until dropped. `answer` is asked for each call.
pub async fn serve<A, F>(door: Door, answer: A)
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let (listener, tally) = door.opened().await;
    let room = Arc::new(Semaphore::new(MOST));
    loop {
        let (stream, place) = listener.accept_within(&room, &tally).await;
        let (answer, tally) = (answer.clone(), Arc::clone(&tally));
        tokio::spawn(async move {
            let listener = tally.listener();
            let calls = Arc::new(AtomicBool::new(false));
            let called = Arc::clone(&calls);
            let service = hyper::service::service_fn(move |request| {
                called.store(true, Ordering::Relaxed);
                let answer = answer(request);
                async move { Ok::<_, Infallible>(within(answer).await) }
            });
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .max_concurrent_streams(CALLS)
                .max_send_buf_size(UNREAD)
                .initial_stream_window_size(WINDOW)
                .initial_connection_window_size(WINDOW)
                .keep_alive_interval(PING_EVERY)
                .keep_alive_timeout(PATIENCE);
            let never_calls = async {
                sleep(PATIENCE).await;
                if calls.load(Ordering::Relaxed) {
                    std::future::pending::<()>().await;
                }
            };
            // A client that goes away, or speaks something else, is no fault of ours.
            tokio::select! {
                _ = builder.serve_connection(TokioIo::new(stream), service) => {}
                () = never_calls => tally.refused(),
            }
            drop((listener, place));
        });
    }
}

/// What is asked has to come within some time; what is answered takes as long as it takes.
async fn within(answer: impl Future<Output = Response<Body>>) -> Response<Body> {
    match timeout(PATIENCE, answer).await {
        Ok(response) => response,
        Err(_) => Status::deadline_exceeded("the request did not come").into_http(),
    }
}

/// What a call is told for which there is no method.
pub fn no_such_method(path: &str) -> Response<Body> {
    Status::unimplemented(format!("there is no {path} here")).into_http()
}
