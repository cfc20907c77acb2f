//! A socket of systemd's pressure protocol (`MEMORY_PRESSURE_WATCH` and its like): a client connects, may write its threshold,
//! and gets a byte whenever the pressure rises above it.

use std::{sync::Arc, time::Duration};

use tailback_page::Pressure;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Semaphore,
    time::timeout,
};

use super::{
    Shared,
    adapter_stats::AdapterStats,
    clock,
    listen::{Door, Stream},
};
use crate::config::signal::PressureSocket;

const MOST: usize = 256;
const EVERY: Duration = Duration::from_millis(50);

/// Above what the client wants to hear of it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Threshold {
    Level(u32),
    Score(f64),
}

impl Threshold {
    /// A level's name or a score; anything else, such as what the kernel's own files want (`some 150000 1000000`), is heeded
    /// as a warning.
    fn of(text: &str) -> Self {
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

    fn is_passed(self, pressure: &Pressure) -> bool {
        match self {
            Self::Level(level) => pressure.level >= level,
            Self::Score(score) => pressure.score >= score,
        }
    }
}

/// Serves until dropped.
pub async fn serve(config: PressureSocket, door: Door, shared: Arc<Shared>) {
    let (listener, tally) = door.opened().await;
    let room = Arc::new(Semaphore::new(MOST));
    loop {
        let (stream, place) = listener.accept_within(&room, &tally).await;
        let (target, tally, shared) = (
            config.target.clone(),
            Arc::clone(&tally),
            Arc::clone(&shared),
        );
        tokio::spawn(async move {
            let listener = tally.listener();
            watch(stream, &target, &tally, &shared).await;
            drop((listener, place));
        });
    }
}

async fn watch(mut stream: Box<dyn Stream>, target: &str, tally: &AdapterStats, shared: &Shared) {
    let mut threshold = Threshold::Level(1);
    let mut was_passed = false;
    let mut clock = clock(EVERY);
    let mut text = [0; 128];
    loop {
        tokio::select! {
            _ = clock.tick() => {}
            read = stream.read(&mut text) => match read {
                Ok(0) | Err(_) => return,
                Ok(length) => threshold = Threshold::of(&String::from_utf8_lossy(&text[..length])),
            },
        }
        let is_passed = threshold.is_passed(&shared.pressure(target));
        if is_passed && !was_passed {
            match timeout(EVERY, stream.write_all(b"\n")).await {
                Ok(Ok(())) => tally.said("a byte"),
                Ok(Err(_)) => return,
                // It has not read the bytes of thousands of rises: one more tells it nothing.
                Err(_) => tally.refused(),
            }
        }
        was_passed = is_passed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_writes_first_is_its_threshold() {
        assert_eq!(Threshold::of("critical\n"), Threshold::Level(2));
        assert_eq!(Threshold::of("0.8"), Threshold::Score(0.8));
        assert_eq!(Threshold::of("some 150000 1000000\0"), Threshold::Level(1));
        assert_eq!(Threshold::of("-1"), Threshold::Level(1));
        let pressure = Pressure {
            level: 2,
            score: 0.95,
            ..Pressure::NONE
        };
        assert!(
            Threshold::Level(2).is_passed(&pressure) && !Threshold::Level(3).is_passed(&pressure)
        );
        assert!(
            Threshold::Score(0.9).is_passed(&pressure)
                && !Threshold::Score(1.0).is_passed(&pressure)
        );
    }
}
