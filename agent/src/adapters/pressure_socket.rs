//! A socket that speaks systemd's pressure protocol (as in `MEMORY_PRESSURE_WATCH`): a client connects, may write a threshold,
//! and receives a byte whenever the pressure rises to it.

use std::{sync::Arc, time::Duration};

use tailback_page::Pressure;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use super::{
    Shared,
    adapter_stats::AdapterStats,
    clock,
    listen::{Endpoint, Slots, Stream},
};
use crate::config::signal::PressureSocket;

/// Concurrent connections.
const MAX_CONNECTIONS: usize = 256;
/// How often the pressure is checked, and how long a write of one byte may take.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// When the client wants to be notified.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Threshold {
    Level(u32),
    Score(f64),
}

impl Threshold {
    /// Parses the name of a level or a score. Anything else, such as a trigger of the kernel's own PSI files
    /// (`some 150000 1000000`), means `warn`.
    fn parse(text: &str) -> Self {
        let text = text.trim_matches(['\0', '\n', ' ']);
        match text {
            "critical" => Self::Level(2),
            "full" => Self::Level(3),
            _ => match text.parse::<f64>() {
                Ok(score) if score > 0.0 => Self::Score(score),
                _ => Self::Level(1),
            },
        }
    }

    fn is_reached(self, pressure: &Pressure) -> bool {
        match self {
            Self::Level(level) => pressure.level >= level,
            Self::Score(score) => pressure.score >= score,
        }
    }
}

/// Serves until dropped.
pub async fn serve(config: PressureSocket, endpoint: Endpoint, shared: Arc<Shared>) {
    let (listener, stats) = endpoint.listen().await;
    let slots = Slots::new(MAX_CONNECTIONS);
    loop {
        let (stream, slot) = listener.accept_within(&slots, &stats).await;
        let (target, stats, shared) = (
            config.target.clone(),
            Arc::clone(&stats),
            Arc::clone(&shared),
        );
        tokio::spawn(async move {
            let connection = stats.connection();
            // All of these connections are idle: if there are too many, the process with the most of them loses its oldest.
            tokio::select! {
                () = watch(stream, &target, &stats, &shared) => {}
                () = slot.revoked() => {}
            }
            drop((connection, slot));
        });
    }
}

async fn watch(mut stream: Box<dyn Stream>, target: &str, stats: &AdapterStats, shared: &Shared) {
    let mut threshold = Threshold::Level(1);
    let mut was_reached = false;
    let mut clock = clock(CHECK_INTERVAL);
    let mut text = [0; 128];
    loop {
        tokio::select! {
            _ = clock.tick() => {}
            read = stream.read(&mut text) => match read {
                Ok(0) | Err(_) => return,
                Ok(length) => threshold = Threshold::parse(&String::from_utf8_lossy(&text[..length])),
            },
        }
        let is_reached = threshold.is_reached(&shared.pressure(target));
        if is_reached && !was_reached {
            match timeout(CHECK_INTERVAL, stream.write_all(b"\n")).await {
                Ok(Ok(())) => stats.replied("notified"),
                Ok(Err(_)) => return,
                // The socket buffer is full: the client has thousands of unread notifications.
                Err(_) => stats.rejected(),
            }
        }
        was_reached = is_reached;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_can_write_its_threshold() {
        assert_eq!(Threshold::parse("critical\n"), Threshold::Level(2));
        assert_eq!(Threshold::parse("0.8"), Threshold::Score(0.8));
        assert_eq!(
            Threshold::parse("some 150000 1000000\0"),
            Threshold::Level(1)
        );
        assert_eq!(Threshold::parse("-1"), Threshold::Level(1));
        let pressure = Pressure {
            level: 2,
            score: 0.95,
            ..Pressure::NONE
        };
        assert!(
            Threshold::Level(2).is_reached(&pressure) && !Threshold::Level(3).is_reached(&pressure)
        );
        assert!(
            Threshold::Score(0.9).is_reached(&pressure)
                && !Threshold::Score(1.0).is_reached(&pressure)
        );
    }
}
