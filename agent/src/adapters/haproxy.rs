//! HAProxy's agent-check: a line to each connection, which says what share of its weight a server is to get.
//!
//! HAProxy keeps what it was told last. That is why this lives in a process of its own, which goes on to say 100% when the
//! agent is gone.

use std::{sync::Arc, time::Duration};

use tailback_page::Pressure;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Semaphore,
    time::timeout,
};

use super::{Shared, listen::Door};
use crate::config::signal::Haproxy;

const MOST: usize = 64;
const PATIENCE: Duration = Duration::from_secs(2);

/// What to say; `out`: the server is to be drained.
fn report(pressure: &Pressure, maxconn: Option<u32>, out: bool) -> String {
    if out {
        return "drain\n".to_owned();
    }
    let share = (pressure.admit_ratio * 100.0).round().clamp(1.0, 100.0);
    let maxconn = maxconn.map_or_else(String::new, |maxconn| {
        let share = (f64::from(maxconn) * pressure.admit_ratio).round().max(1.0) as u32;
        let most = pressure
            .concurrency_limit
            .map_or(share, |most| most.min(maxconn));
        format!(" maxconn:{most}")
    });
    // Without `ready` a server that was drained would stay so.
    format!("up ready {share}%{maxconn}\n")
}

/// Serves until dropped.
pub async fn serve(config: Haproxy, door: Door, shared: Arc<Shared>) {
    let (listener, tally) = door.opened().await;
    let room = Arc::new(Semaphore::new(MOST));
    loop {
        let mut stream = listener.accept().await;
        let pressure = shared.pressure(&config.target);
        let text = report(&pressure, config.maxconn, shared.is_out(&config.target));
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            // A new connection takes a line at once; only the wait for its end is left out.
            let _ = timeout(Duration::ZERO, stream.write_all(text.as_bytes())).await;
            tally.refused();
            continue;
        };
        tally.said(&text);
        tokio::spawn(async move {
            let answer = async {
                stream.write_all(text.as_bytes()).await?;
                stream.shutdown().await?;
                // Until HAProxy closes: with something unread (`agent-send`) our closing would take the answer with it.
                let mut further = [0; 256];
                while stream.read(&mut further).await? > 0 {}
                Ok::<(), std::io::Error>(())
            };
            // Whoever does not take the answer asks again.
            let _ = timeout(PATIENCE, answer).await;
            drop(place);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_follows_what_is_admitted_and_is_whole_when_nobody_publishes() {
        let at = |admit_ratio: f64| Pressure {
            alive: true,
            admit_ratio,
            ..Pressure::NONE
        };
        assert_eq!(report(&at(0.62), None, false), "up ready 62%\n");
        assert_eq!(
            report(&at(0.62), Some(50), false),
            "up ready 62% maxconn:31\n"
        );
        assert_eq!(report(&at(0.05), Some(3), false), "up ready 5% maxconn:1\n");
        let knows = Pressure {
            concurrency_limit: Some(6),
            ..at(0.62)
        };
        assert_eq!(report(&knows, Some(50), false), "up ready 62% maxconn:6\n");
        assert_eq!(report(&knows, Some(5), false), "up ready 62% maxconn:5\n");
        assert_eq!(report(&at(0.0), None, false), "up ready 1%\n");
        assert_eq!(report(&at(0.5), Some(9), true), "drain\n");
        assert_eq!(
            report(&Pressure::NONE, Some(9), false),
            "up ready 100% maxconn:9\n"
        );
    }
}
