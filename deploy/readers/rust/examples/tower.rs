//! A tower layer that sheds load as the page asks: 503 with Retry-After.
//!
//! `cargo run -p tailback-page --example tower -- 8080 /run/tailback/tower/page`

use std::{
    convert::Infallible,
    os::fd::{AsFd as _, OwnedFd},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response, StatusCode, header::RETRY_AFTER};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tailback_page::Page;
use tower::{Layer, Service, ServiceBuilder, service_fn};

/// The layer: holds the page and the connection, and decides by how long a request waited on it.
#[derive(Clone)]
struct Admit(Arc<Page>, Arc<OwnedFd>);

impl<S> Layer<S> for Admit {
    type Service = Admitted<S>;
    fn layer(&self, inner: S) -> Self::Service {
        Admitted(inner, self.clone())
    }
}

#[derive(Clone)]
struct Admitted<S>(S, Admit);

impl<S, R> Service<R> for Admitted<S>
where
    S: Service<R, Response = Response<Full<Bytes>>, Error: Send, Future: Send + 'static> + 'static,
    S::Error: 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: R) -> Self::Future {
        let Admit(page, connection) = &self.1;
        if page.should_admit_from(connection) {
            return Box::pin(self.0.call(request));
        }
        let mut rejection = Response::new(Full::from("busy\n"));
        *rejection.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        let seconds = page.pressure().retry_after_seconds();
        rejection.headers_mut().insert(RETRY_AFTER, seconds.into());
        Box::pin(std::future::ready(Ok(rejection)))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let port: u16 = args.next().ok_or("usage: tower PORT PAGE")?.parse()?;
    let page = Arc::new(Page::open(args.next().ok_or("usage: tower PORT PAGE")?));
    let respond =
        |_: Request<Incoming>| async { Ok::<_, Infallible>(Response::new(Full::from("ok\n"))) };
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        // Out of file descriptors: drop this connection and go on.
        let Ok(connection) = stream.as_fd().try_clone_to_owned().map(Arc::new) else {
            continue;
        };
        let service = ServiceBuilder::new()
            .layer(Admit(Arc::clone(&page), connection))
            .service(service_fn(respond));
        let service = TowerToHyperService::new(service);
        tokio::spawn(async move {
            let builder = Builder::new(TokioExecutor::new());
            // A client that disconnects is not an error.
            let _ = builder
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}
