//! The unix stream `agent.sock`: JSON lines for clients that send a one-line request.
//!
//! `{"target": "shop", "min_level": "warn"}` subscribes (both keys are optional): the present state first, then levels,
//! episodes and causes as they happen. `{"ask": "status"}`, `{"ask": "metrics"}` and `{"ask": "live"}` get one reply, and the
//! connection is closed; `"format": "protobuf"` gets metrics as Prometheus's protobuf messages. Slow clients are disconnected after 5 s or when 1,024 lines behind; the agent never blocks on them.

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

/// Maximum number of subscribers.
const MAX_SUBSCRIBERS: usize = 64;
/// Maximum number of connections, including those that only ask one question.
const MAX_CONNECTIONS: usize = 128;
/// Longest request line, in bytes.
const MAX_REQUEST_BYTES: u64 = 4_096;
/// Time limit for a client to send its request, and to read what is written to it.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// The socket's name within the directory.
pub const SOCKET: &str = "agent.sock";

/// A client's request.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    #[serde(default)]
    ask: Option<Ask>,
    /// Of the reply to `metrics`.
    #[serde(default)]
    format: Format,
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
    Live,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    #[default]
    Text,
    Protobuf,
}

/// Listens on a unix socket with this file mode, replacing a stale socket file.
pub fn bind(path: &Path, mode: u32) -> Result<UnixListener> {
    if is_socket(path) && std::os::unix::net::UnixStream::connect(path).is_err() {
        // The previous owner has exited.
        let _ = std::fs::remove_file(path);
    }
    bind_new(path, mode)
}

/// Listens on a unix socket in a directory whose lock this agent holds, replacing any other. If a process still listens on that one,
/// its agent has released the lock, and it is about to exit.
pub fn bind_locked(path: &Path, mode: u32) -> Result<UnixListener> {
    if is_socket(path) {
        let _ = std::fs::remove_file(path);
    }
    bind_new(path, mode)
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|old| old.file_type().is_socket())
}

fn bind_new(path: &Path, mode: u32) -> Result<UnixListener> {
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", path.display()))?;
    Ok(listener)
}

/// Serves until dropped.
pub async fn serve(listener: UnixListener, state: Arc<SharedState>, directory: PathBuf) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let subscriptions = Arc::new(Semaphore::new(MAX_SUBSCRIBERS));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Mostly out of file descriptors: wait until connections end.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            state.counts.rejected.fetch_add(1, Ordering::Relaxed);
            let text = format!("too many connections ({MAX_CONNECTIONS})");
            let (_, mut writer) = stream.into_split();
            // The socket buffer of a new connection has room, so this does not block.
            let _ = timeout(Duration::ZERO, writer.write_all(error(&text).as_bytes())).await;
            record_serving_cpu_time();
            continue;
        };
        let (state, directory) = (Arc::clone(&state), directory.clone());
        let subscriptions = Arc::clone(&subscriptions);
        tokio::spawn(async move {
            serve_one(stream, &state, &directory, &subscriptions).await;
            record_serving_cpu_time();
            drop(place);
        });
    }
}

async fn serve_one(
    stream: UnixStream,
    state: &SharedState,
    directory: &Path,
    subscriptions: &Semaphore,
) {
    let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader.take(MAX_REQUEST_BYTES));
    let mut line = String::new();
    let request = match timeout(CLIENT_TIMEOUT, reader.read_line(&mut line)).await {
        Ok(Ok(0)) => return,
        Ok(Ok(_)) => parse(&line).map_err(|error| error.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no request within 5 seconds".to_owned()),
    };
    let request = match request {
        Ok(request) => request,
        Err(why) => {
            state
                .counts
                .invalid_commands
                .fetch_add(1, Ordering::Relaxed);
            let text = format!(
                "invalid command: {why}; valid are {{\"target\": \"NAME\", \"min_level\": \"warn\"}} (both optional), \
                 {{\"ask\": \"status\"}}, {{\"ask\": \"metrics\"}} or {{\"ask\": \"live\"}}"
            );
            let _ = timeout(CLIENT_TIMEOUT, writer.write_all(error(&text).as_bytes())).await;
            return;
        }
    };
    let reply = match request.ask {
        Some(Ask::Status) => status::agent(state, directory).into_bytes(),
        Some(Ask::Metrics) => match request.format {
            Format::Text => metrics::render(state).text().into_bytes(),
            Format::Protobuf => metrics::render(state).protobuf(),
        },
        Some(Ask::Live) => status::live(state, directory).into_bytes(),
        None => {
            let Ok(_place) = subscriptions.try_acquire() else {
                state.counts.rejected.fetch_add(1, Ordering::Relaxed);
                let text = error(&format!("too many subscribers ({MAX_SUBSCRIBERS})"));
                let _ = timeout(CLIENT_TIMEOUT, writer.write_all(text.as_bytes())).await;
                return;
            };
            let subscriber = Subscriber {
                pid: pid.and_then(|pid| u32::try_from(pid).ok()),
                target: request.target,
                min_level: request.min_level,
                since_unix_ns: unix_ns(),
                lines: 0,
            };
            let number = state.add_subscriber(subscriber.clone());
            forward(
                state,
                number,
                &subscriber,
                reader.into_inner().into_inner(),
                writer,
            )
            .await;
            state.remove_subscriber(number);
            return;
        }
    };
    let _ = timeout(CLIENT_TIMEOUT, writer.write_all(&reply)).await;
}

/// Parses a request. It must be a JSON object: serde would also accept a list.
fn parse(line: &str) -> serde_json::Result<Request> {
    let object: Map<String, Value> = serde_json::from_str(line)?;
    serde_json::from_value(Value::Object(object))
}

/// Sends the present state, then each line that the subscriber wants, until it disconnects or is too slow.
async fn forward(
    state: &SharedState,
    number: u64,
    subscriber: &Subscriber,
    mut reader: OwnedReadHalf,
    mut writer: OwnedWriteHalf,
) {
    let mut lines = state.subscribe();
    let is_wanted = |target: Option<&str>, level: Level| {
        level >= subscriber.min_level
            && subscriber
                .target
                .as_deref()
                .is_none_or(|wanted| target == Some(wanted))
    };
    // Further input is ignored; only the end of the connection matters.
    let mut further = [0; 256];
    let snapshot = loop {
        tokio::select! {
            // The state first: a client may have closed its half of the connection after the request.
            biased;
            snapshot = state.current_snapshot() => break snapshot,
            read = reader.read(&mut further) => match read {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            },
        }
    };
    let standing = status::standing(&snapshot, |name| is_wanted(Some(name), Level::Full));
    if timeout(CLIENT_TIMEOUT, writer.write_all(standing.as_bytes()))
        .await
        .is_err()
    {
        state.counts.too_slow.fetch_add(1, Ordering::Relaxed);
        return;
    }
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
        match timeout(CLIENT_TIMEOUT, writer.write_all(line.text.as_bytes())).await {
            Ok(Ok(())) => state.count_line(number),
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

#[cfg(test)]
mod tests {
    use tailback_tests::temp::TempDir;

    use super::*;
    use crate::{
        emit::json::reference::assert_documented,
        sample::Target,
        signal::{PressureTracker, state::Snapshot},
    };

    #[test]
    fn the_keys_of_an_error_are_those_of_the_documentation() {
        let error = serde_json::from_str(&error("too many subscribers")).unwrap();
        assert_documented("error", &[error]);
    }

    #[tokio::test]
    async fn the_next_agent_takes_the_socket_of_one_that_is_still_exiting() {
        let temp = TempDir::new("stream").unwrap();
        let path = temp.path().join(SOCKET);
        let exiting = bind_locked(&path, 0o660).unwrap();
        let next = bind_locked(&path, 0o660).unwrap();
        let _client = UnixStream::connect(&path).await.unwrap();
        tokio::select! {
            biased;
            _ = exiting.accept() => panic!("the exiting agent was asked"),
            client = next.accept() => assert!(client.is_ok()),
        }
    }

    #[tokio::test]
    async fn a_subscriber_of_a_hung_agent_gets_the_state_first_when_it_continues() {
        let shop = Arc::new(Target {
            name: "shop".to_owned(),
            ..Target::default()
        });
        let pressures =
            PressureTracker::default().read(0, std::iter::empty(), std::iter::once(&shop));
        let state = Arc::new(SharedState::default());
        let (client, server) = UnixStream::pair().unwrap();
        let (client_reader, mut client_writer) = client.into_split();
        client_writer
            .write_all(b"{\"target\": \"shop\"}\n")
            .await
            .unwrap();
        let served = tokio::spawn({
            let state = Arc::clone(&state);
            async move { serve_one(server, &state, Path::new("/"), &Semaphore::new(1)).await }
        });
        while state.subscribers().is_empty() {
            tokio::task::yield_now().await;
        }
        // An event of the sample that ends the hang; its state is set afterwards.
        state.publish(Line {
            target: Some("shop".to_owned()),
            level: Level::Full,
            text: "{\"type\": \"level\"}\n".to_owned(),
        });
        tokio::task::yield_now().await;
        state.set(Snapshot {
            until_ns: u64::MAX,
            pressures: Arc::new(pressures),
            names: Arc::new(vec!["shop".to_owned()]),
            ..Snapshot::default()
        });
        let mut lines = BufReader::new(client_reader).lines();
        for expected in ["pressure", "level"] {
            let line = lines.next_line().await.unwrap().unwrap();
            let line: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(line["type"], expected);
        }
        drop((lines, client_writer));
        served.await.unwrap();
    }
}
