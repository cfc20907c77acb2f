//! HAProxy's agent-check: replies to each connection with a line that sets the server's weight in percent, or its `maxconn`.
//!
//! HAProxy keeps the last reply. This is why the adapters run in a process of their own: it continues to reply 100% when the
//! agent is gone. It is also why a reply follows the admit ratio only if HAProxy checks often. The percentage is never so low
//! that the server's weight rounds to 0 (`agent_checks`).

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde_json::Value;
use tailback_page::Pressure;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use super::{
    Shared,
    adapter_stats::AdapterStats,
    agent_checks::{AgentChecks, Known, min_percent},
    listen::{Endpoint, Peer, Slots, Stream},
    warning::{Consumers, Warning},
};
use crate::config::signal::Haproxy;

/// Concurrent connections. Each is held open until the client closes, or a further one needs its place.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take to read the reply and close: HAProxy's default check interval.
const TIMEOUT: Duration = Duration::from_secs(2);

/// The reply. It changes either the `maxconn`, if the configuration has one, or the weight, never both: the controller could not
/// attribute the effect to one of them.
///
/// Excess requests wait in HAProxy while a `maxconn` holds, where the agent does not see them. So the admit ratio rises, although
/// the overload goes on.
fn reply(pressure: &Pressure, maxconn: Option<u32>, is_drained: bool, client: Known) -> String {
    if is_drained && client.is_fast {
        return "drain\n".to_owned();
    }
    let admit_ratio = if client.is_fast {
        pressure.admit_ratio
    } else {
        1.0
    };
    // `ready` ends an earlier `drain`.
    let Some(maxconn) = maxconn else {
        let percent = client.weight.map_or(100, |weight| {
            let percent = (admit_ratio * 100.0).round().clamp(1.0, 100.0) as u32;
            percent.max(min_percent(weight))
        });
        return format!("up ready {percent}%\n");
    };
    let scaled = (f64::from(maxconn) * admit_ratio).round().max(1.0) as u32;
    let limit = pressure
        .concurrency_limit
        .map_or(scaled, |limit| limit.min(maxconn));
    format!("up ready 100% maxconn:{limit}\n")
}

/// Serves until dropped. `previous` is the status of this adapter in the process that was replaced.
pub async fn serve(config: Haproxy, endpoint: Endpoint, shared: Arc<Shared>, previous: Value) {
    let mut checks = AgentChecks::new(config.maxconn.is_none(), Instant::now());
    checks.restore(&previous["checks"], Instant::now());
    let checks = Arc::new(Checks(Mutex::new(checks)));
    endpoint.stats().set_consumers(Arc::clone(&checks) as _);
    let (listener, stats) = endpoint.listen().await;
    let slots = Slots::new(MAX_CONNECTIONS);
    let check = Arc::new(Check {
        config,
        shared,
        checks,
        stats,
    });
    loop {
        let (stream, slot) = listener.accept_within(&slots, &check.stats).await;
        let check = Arc::clone(&check);
        tokio::spawn(async move {
            tokio::select! {
                exchanged = timeout(TIMEOUT, check.exchange(stream, slot.peer())) => {
                    // It has the reply but does not close.
                    if exchanged.is_err() {
                        check.stats.closed();
                    }
                }
                () = slot.revoked() => {}
            }
            drop(slot);
        });
    }
}

/// What a check needs.
struct Check {
    config: Haproxy,
    shared: Arc<Shared>,
    checks: Arc<Checks>,
    stats: Arc<AdapterStats>,
}

impl Check {
    fn reply(&self, client: Known) -> String {
        let pressure = self.shared.pressure(&self.config.target);
        let is_drained = self.shared.is_drained(&self.config.target);
        reply(&pressure, self.config.maxconn, is_drained, client)
    }

    async fn exchange(&self, mut stream: Box<dyn Stream>, peer: Peer) -> io::Result<()> {
        let mut text = [0; 256];
        let text_timeout = self.checks.lock().text_timeout(peer);
        let received = match timeout(text_timeout, stream.read(&mut text)).await {
            Ok(received) => received?,
            Err(_) => 0,
        };
        let client = self
            .checks
            .lock()
            .check(peer, &text[..received], Instant::now());
        let reply = self.reply(client);
        stream.write_all(reply.as_bytes()).await?;
        stream.shutdown().await?;
        self.stats.replied(&reply);
        // Wait for HAProxy to close: closing with unread data (`agent-send`) would discard the reply.
        let mut further = 0;
        loop {
            match stream.read(&mut text).await? {
                0 => break,
                read => further += read,
            }
        }
        if received == 0 && further > 0 {
            self.checks.lock().text_was_late(peer);
        }
        Ok(())
    }
}

/// The clients of one adapter, for its status.
#[derive(Debug)]
pub struct Checks(pub Mutex<AgentChecks>);

impl Checks {
    fn lock(&self) -> MutexGuard<'_, AgentChecks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Consumers for Checks {
    fn describe(&self, status: &mut Value) {
        status["checks"] = self.lock().to_json(Instant::now());
    }

    fn warnings(&self) -> Vec<Warning> {
        self.lock().warnings(Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: Known = Known {
        weight: Some(100),
        is_fast: true,
    };

    fn at(admit_ratio: f64) -> Pressure {
        Pressure {
            alive: true,
            admit_ratio,
            ..Pressure::NONE
        }
    }

    #[test]
    fn either_the_weight_or_maxconn_follows_and_is_100_percent_without_an_agent() {
        let reply =
            |pressure: &Pressure, maxconn, is_drained| reply(pressure, maxconn, is_drained, FAST);
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

    #[test]
    fn a_weight_is_never_rounded_to_zero_and_100_percent_if_it_is_unknown() {
        let reply = |weight| {
            let client = Known { weight, ..FAST };
            reply(&at(0.05), None, false, client)
        };
        assert_eq!(reply(Some(100)), "up ready 5%\n");
        assert_eq!(reply(Some(10)), "up ready 10%\n");
        assert_eq!(reply(Some(1)), "up ready 100%\n");
        assert_eq!(reply(None), "up ready 100%\n");
    }

    #[test]
    fn a_client_that_checks_rarely_gets_nothing_but_the_concurrency_limit() {
        let slow = Known {
            is_fast: false,
            ..FAST
        };
        let reply = |pressure: &Pressure, maxconn| reply(pressure, maxconn, true, slow);
        assert_eq!(reply(&at(0.05), None), "up ready 100%\n");
        assert_eq!(reply(&at(0.05), Some(40)), "up ready 100% maxconn:40\n");
        let with_limit = Pressure {
            concurrency_limit: Some(6),
            ..at(0.05)
        };
        assert_eq!(reply(&with_limit, Some(40)), "up ready 100% maxconn:6\n");
    }
}
