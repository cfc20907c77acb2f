//! The unix stream `agent.sock`: JSON lines, to whoever asks with a line.
//!
//! `{"target": "shop", "min_level": "warn"}` subscribes, both optional: how things stand at once, then levels, episodes and
//! causes as they happen. `{"ask": "status"}` and `{"ask": "metrics"}` are answered and the connection closed. Who does not
//! read is let go, never waited for.

use std::{
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Semaphore, broadcast::error::RecvError},
    time::timeout,
};

use super::{
    metrics,
    state::{Line, SharedState, Subscriber},
    status,
};
use crate::{
    collect::{record_serving_cpu_time, unix_ns},
    event::Level,
};

/// Who listens at once, at most; and who is connected, for questions are answered beside.
const MOST: usize = 64;
const MOST_CONNECTED: usize = 128;
/// A request is one line of at most so many bytes, that comes within this time.
const LINE: u64 = 4_096;
const PATIENCE: Duration = Duration::from_secs(5);

/// The socket's name within the directory.
pub const SOCKET: &str = "agent.sock";

/// What a client may say.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    #[serde(default)]
    ask: Option<Ask>,
    #[serde(default)]
    target: Option<String>,
    #[serde(default)]
    min_level: Level,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Ask {
    Status,
    Metrics,
}

/// Takes the name of a socket whose owner is gone, with `mode`.
pub fn bind(path: &Path, mode: u32) -> Result<UnixListener> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|old| old.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        // Whoever listened there is gone.
        let _ = std::fs::remove_file(path);
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set who may connect to {}", path.display()))?;
    Ok(listener)
}

/// Serves until dropped.
pub async fn serve(listener: UnixListener, state: Arc<SharedState>, directory: PathBuf) {
    let room = Arc::new(Semaphore::new(MOST_CONNECTED));
    let listening = Arc::new(Semaphore::new(MOST));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors, mostly: those that there are will end.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            state.counts.refused.fetch_add(1, Ordering::Relaxed);
            let text = format!("{MOST_CONNECTED} are connected already");
            let (_, mut writer) = stream.into_split();
            // The buffer of a new connection has room; we wait for nobody.
            let _ = timeout(Duration::ZERO, writer.write_all(error(&text).as_bytes())).await;
            record_serving_cpu_time();
            continue;
        };
        let (state, directory) = (Arc::clone(&state), directory.clone());
        let listening = Arc::clone(&listening);
        tokio::spawn(async move {
            serve_one(stream, &state, &directory, &listening).await;
            record_serving_cpu_time();
            drop(place);
        });
    }
}

async fn serve_one(
    stream: UnixStream,
    state: &SharedState,
    directory: &Path,
    listening: &Semaphore,
) {
    let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader.take(LINE));
    let mut line = String::new();
    let request = match timeout(PATIENCE, reader.read_line(&mut line)).await {
        Ok(Ok(0)) => return,
        Ok(Ok(_)) => understand(&line).map_err(|error| error.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no line came within 5 seconds".to_owned()),
    };
    let request = match request {
        Ok(request) => request,
        Err(why) => {
            state.counts.not_understood.fetch_add(1, Ordering::Relaxed);
            let text = format!(
                "not understood: {why}; say {{\"target\": \"NAME\", \"min_level\": \"warn\"}} (both optional), \
                 {{\"ask\": \"status\"}} or {{\"ask\": \"metrics\"}}"
            );
            let _ = timeout(PATIENCE, writer.write_all(error(&text).as_bytes())).await;
            return;
        }
    };
    let answer = match request.ask {
        Some(Ask::Status) => status::agent(state, directory),
        Some(Ask::Metrics) => metrics::render(state),
        None => {
            let Ok(_place) = listening.try_acquire() else {
                state.counts.refused.fetch_add(1, Ordering::Relaxed);
                let text = error(&format!("{MOST} listen already"));
                let _ = timeout(PATIENCE, writer.write_all(text.as_bytes())).await;
                return;
            };
            let subscriber = Subscriber {
                pid: pid.and_then(|pid| u32::try_from(pid).ok()),
                target: request.target,
                min_level: request.min_level,
                since_unix_ns: unix_ns(),
                lines: 0,
            };
            let number = state.enter(subscriber.clone());
            tell(
                state,
                number,
                &subscriber,
                reader.into_inner().into_inner(),
                writer,
            )
            .await;
            state.leave(number);
            return;
        }
    };
    let _ = timeout(PATIENCE, writer.write_all(answer.as_bytes())).await;
}

/// An object: serde would take a list for one, too.
fn understand(line: &str) -> serde_json::Result<Request> {
    let object: Map<String, Value> = serde_json::from_str(line)?;
    serde_json::from_value(Value::Object(object))
}

async fn tell(
    state: &SharedState,
    number: u64,
    subscriber: &Subscriber,
    mut reader: OwnedReadHalf,
    mut writer: OwnedWriteHalf,
) {
    let mut lines = state.listen();
    let is_wanted = |target: Option<&str>, level: Level| {
        level >= subscriber.min_level
            && subscriber
                .target
                .as_deref()
                .is_none_or(|wanted| target == Some(wanted))
    };
    let standing = status::standing(&state.snapshot(), |name| is_wanted(Some(name), Level::Full));
    if timeout(PATIENCE, writer.write_all(standing.as_bytes()))
        .await
        .is_err()
    {
        state.counts.too_slow.fetch_add(1, Ordering::Relaxed);
        return;
    }
    // What it says further is of no interest, but its going away is.
    let mut further = [0; 256];
    loop {
        let line: Arc<Line> = tokio::select! {
            line = lines.recv() => match line {
                Ok(line) => line,
                Err(RecvError::Lagged(_)) => {
                    state.counts.too_slow.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Err(RecvError::Closed) => return,
            },
            read = reader.read(&mut further) => match read {
                Ok(0) | Err(_) => return,
                Ok(_) => continue,
            },
        };
        if !is_wanted(line.target.as_deref(), line.level) {
            continue;
        }
        match timeout(PATIENCE, writer.write_all(line.text.as_bytes())).await {
            Ok(Ok(())) => state.got(number),
            Ok(Err(_)) => return,
            Err(_) => {
                state.counts.too_slow.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
    }
}

fn error(text: &str) -> String {
    format!("{}\n", serde_json::json!({"type": "error", "text": text}))
}
