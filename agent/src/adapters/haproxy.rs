//! HAProxy's agent-check: replies to each connection with a line that sets the server's weight in percent, or its `maxconn`.
//!
//! HAProxy keeps the last reply. This is why the adapters run in a process of their own: it continues to reply 100% when the
//! agent is gone.

use std::{sync::Arc, time::Duration};

use tailback_page::Pressure;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Semaphore,
    time::timeout,
};

use super::{Shared, listen::Endpoint};
use crate::config::signal::Haproxy;

/// Maximum number of connections that are held open until the client closes. On any further one, the reply is sent
/// without waiting for that.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take to read the reply and close: HAProxy's default check interval.
const TIMEOUT: Duration = Duration::from_secs(2);

/// The reply. It changes either the `maxconn`, if the configuration has one, or the weight, never both: the controller could not
/// attribute the effect to one of them.
///
/// Excess requests wait in HAProxy while a `maxconn` holds, where the agent does not see them. So the admit ratio rises, although
/// the overload goes on.
fn reply(pressure: &Pressure, maxconn: Option<u32>, is_drained: bool) -> String {
    if is_drained {
        return "drain\n".to_owned();
    }
    // `ready` ends an earlier `drain`.
    let Some(maxconn) = maxconn else {
        let percent = (pressure.admit_ratio * 100.0).round().clamp(1.0, 100.0);
        return format!("up ready {percent}%\n");
    };
    let scaled = (f64::from(maxconn) * pressure.admit_ratio).round().max(1.0) as u32;
    let limit = pressure
        .concurrency_limit
        .map_or(scaled, |limit| limit.min(maxconn));
    format!("up ready 100% maxconn:{limit}\n")
}

/// Serves until dropped.
pub async fn serve(config: Haproxy, endpoint: Endpoint, shared: Arc<Shared>) {
    let (listener, stats) = endpoint.listen().await;
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let mut stream = listener.accept().await;
        let pressure = shared.pressure(&config.target);
        let text = reply(&pressure, config.maxconn, shared.is_drained(&config.target));
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            // The reply fits into the socket buffer of a new connection, so the write completes at once.
            let _ = timeout(Duration::ZERO, stream.write_all(text.as_bytes())).await;
            stats.rejected();
            continue;
        };
        stats.replied(&text);
        tokio::spawn(async move {
            let exchange = async {
                stream.write_all(text.as_bytes()).await?;
                stream.shutdown().await?;
                // Wait for HAProxy to close: closing with unread data (`agent-send`) would discard the reply.
                let mut further = [0; 256];
                while stream.read(&mut further).await? > 0 {}
                Ok::<(), std::io::Error>(())
            };
            // A client that is too slow gets no reply and will check again.
            let _ = timeout(TIMEOUT, exchange).await;
            drop(slot);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_the_weight_or_maxconn_follows_and_is_100_percent_without_an_agent() {
        let at = |admit_ratio: f64| Pressure {
            alive: true,
            admit_ratio,
            ..Pressure::NONE
        };
        assert_eq!(reply(&at(0.62), None, false), "up ready 62%\n");
        assert_eq!(
            reply(&at(0.62), Some(50), false),
            "up ready 100% maxconn:31\n"
        );
        assert_eq!(
            reply(&at(0.05), Some(3), false),
            "up ready 100% maxconn:1\n"
        );
        let with_limit = Pressure {
            concurrency_limit: Some(6),
            ..at(0.62)
        };
        assert_eq!(
            reply(&with_limit, Some(50), false),
            "up ready 100% maxconn:6\n"
        );
        assert_eq!(
            reply(&with_limit, Some(5), false),
            "up ready 100% maxconn:5\n"
        );
        assert_eq!(reply(&at(0.0), None, false), "up ready 1%\n");
        assert_eq!(reply(&at(0.5), Some(9), true), "drain\n");
        assert_eq!(
            reply(&Pressure::NONE, Some(9), false),
            "up ready 100% maxconn:9\n"
        );
    }
}
