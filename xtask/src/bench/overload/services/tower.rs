//! A tower service with the layer of `deploy/readers/rust/examples/tower.rs`. It takes every request immediately, but works on
//! only WORKERS of them for MS milliseconds each, as with a pool of connections to a database.

use std::{
    convert::Infallible,
    env,
    error::Error,
    os::fd::{AsFd as _, OwnedFd},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
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
use tokio::{net::TcpListener, sync::Semaphore, time::sleep};
use tower::{Layer, Service, ServiceBuilder, service_fn};

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
async fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [port, page, workers, ms] = args.as_slice() else {
        return Err("usage: overload-tower PORT PAGE WORKERS MS".into());
    };
    let page = Arc::new(Page::open(page));
    let pool = Arc::new(Semaphore::new(workers.parse()?));
    let work = Duration::from_millis(ms.parse()?);
    let listener = TcpListener::bind(("127.0.0.1", port.parse()?)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        let Ok(connection) = stream.as_fd().try_clone_to_owned().map(Arc::new) else {
            continue;
        };
        let pool = Arc::clone(&pool);
        let respond = move |_: Request<Incoming>| {
            let pool = Arc::clone(&pool);
            async move {
                // Never closed, so there is always a permit in the end.
                let _permit = pool.acquire().await;
                sleep(work).await;
                Ok::<_, Infallible>(Response::new(Full::from("done\n")))
            }
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
