//! gRPC, for the adapters that speak it: HTTP/2 without TLS, one service each.

use std::{convert::Infallible, future::Future, sync::Arc, time::Duration};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::Semaphore;
use tonic::{Status, body::Body};

use super::listen::Door;

/// Connections at once, and calls on one of them.
const MOST: usize = 64;
const CALLS: u32 = 64;
/// A client that does not answer a ping is gone.
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
            let service = hyper::service::service_fn(move |request| {
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .max_concurrent_streams(CALLS)
                .keep_alive_interval(PING_EVERY)
                .keep_alive_timeout(PATIENCE);
            // A client that goes away, or speaks something else, is no fault of ours.
            let _ = builder
                .serve_connection(TokioIo::new(stream), service)
                .await;
            drop((listener, place));
        });
    }
}

/// What a call is told for which there is no method.
pub fn no_such_method(path: &str) -> Response<Body> {
    Status::unimplemented(format!("there is no {path} here")).into_http()
}
