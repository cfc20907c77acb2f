//! Client of the sockets of the agent and of the adapter process.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

use crate::signal::{directory::ADAPTERS_SOCKET, stream::SOCKET};

/// How long connecting and reading a reply may take; after that, the other side counts as hung.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Largest reply read, bytes: far more than the status or metrics of thousands of services.
const MAX_REPLY_BYTES: u64 = 64 << 20;

/// Sends a request (`status`, `metrics`) to the agent and returns its reply.
pub async fn ask(directory: &Path, what: &str) -> Result<String> {
    let (reader, _writer) = send(directory, SOCKET, &json!({"ask": what})).await?;
    read_text(reader).await
}

/// Asks the agent for its metrics as protobuf messages.
pub async fn ask_metrics_as_protobuf(directory: &Path) -> Result<Vec<u8>> {
    let request = json!({"ask": "metrics", "format": "protobuf"});
    let (reader, _writer) = send(directory, SOCKET, &request).await?;
    read(reader).await
}

/// Asks the adapter process for its status, on its own socket, and returns the text of its reply.
pub async fn ask_adapter_process(directory: &Path) -> Result<String> {
    let (reader, _writer) = send(directory, ADAPTERS_SOCKET, &json!({"ask": "status"})).await?;
    read_text(reader).await
}

/// Returns the status of the agent.
pub async fn status(directory: &Path) -> Result<Value> {
    parse(&ask(directory, "status").await?)
}

/// Returns the status of the adapter process.
pub async fn adapter_process_status(directory: &Path) -> Result<Value> {
    parse(&ask_adapter_process(directory).await?)
}

fn parse(reply: &str) -> Result<Value> {
    serde_json::from_str(reply).context("invalid JSON in the reply")
}

/// Whether an agent process exists, even if it does not reply.
pub async fn is_running(directory: &Path) -> bool {
    UnixStream::connect(directory.join(SOCKET)).await.is_ok()
}

/// Subscribes to the agent's events.
pub async fn subscribe(directory: &Path, request: &Value) -> Result<Subscription> {
    let (reader, writer) = send(directory, SOCKET, request).await?;
    Ok(Subscription {
        lines: BufReader::new(reader).lines(),
        _writer: writer,
    })
}

/// A stream of event lines.
pub struct Subscription {
    lines: Lines<BufReader<OwnedReadHalf>>,
    /// Kept open: the agent disconnects a client that closes its side.
    _writer: OwnedWriteHalf,
}

impl Subscription {
    /// The next line; `None` if the agent is gone.
    pub async fn next(&mut self) -> Option<String> {
        self.lines.next_line().await.ok().flatten()
    }
}

async fn send(
    directory: &Path,
    socket: &str,
    request: &Value,
) -> Result<(OwnedReadHalf, OwnedWriteHalf)> {
    let path = directory.join(socket);
    let connect = async {
        let stream = UnixStream::connect(&path).await?;
        let (reader, mut writer) = stream.into_split();
        writer.write_all(format!("{request}\n").as_bytes()).await?;
        Ok::<_, std::io::Error>((reader, writer))
    };
    let connected = timeout(TIMEOUT, connect).await;
    connected
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .with_context(|| format!("cannot connect to {}", path.display()))
}

async fn read_text(reader: OwnedReadHalf) -> Result<String> {
    String::from_utf8(read(reader).await?).context("cannot read the reply")
}

async fn read(reader: OwnedReadHalf) -> Result<Vec<u8>> {
    let mut reply = Vec::new();
    let mut reader = reader.take(MAX_REPLY_BYTES);
    match timeout(TIMEOUT, reader.read_to_end(&mut reply)).await {
        Ok(Ok(_)) if reply.starts_with(b"{\"type\":\"error\"") => {
            bail!("error reply: {}", String::from_utf8_lossy(&reply).trim())
        }
        Ok(Ok(_)) if !reply.is_empty() => Ok(reply),
        Ok(Ok(_)) => bail!("connection closed without a reply"),
        Ok(Err(error)) => Err(error).context("cannot read the reply"),
        Err(_) => bail!("no reply within {} s: hung or stopped", TIMEOUT.as_secs()),
    }
}
