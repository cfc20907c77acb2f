//! The agent, as asked over its stream.

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

use crate::signal::stream::SOCKET;

const PATIENCE: Duration = Duration::from_secs(2);
/// An answer is no longer than this.
const MOST: u64 = 64 << 20;

/// What it answers to a question.
pub async fn ask(directory: &Path, what: &str) -> Result<String> {
    let (reader, _writer) = say(directory, SOCKET, &json!({"ask": what})).await?;
    read(reader).await
}

/// The same of the guard, over its own socket.
pub async fn ask_guard(directory: &Path) -> Result<String> {
    let (reader, _writer) = say(directory, super::SOCKET, &json!({"ask": "status"})).await?;
    read(reader).await
}

/// Whether an agent is there, even one that does not answer.
pub async fn is_there(directory: &Path) -> bool {
    UnixStream::connect(directory.join(SOCKET)).await.is_ok()
}

/// Listens to what happens.
pub async fn subscribe(directory: &Path, request: &Value) -> Result<Subscription> {
    let (reader, writer) = say(directory, SOCKET, request).await?;
    Ok(Subscription {
        lines: BufReader::new(reader).lines(),
        _writer: writer,
    })
}

pub struct Subscription {
    lines: Lines<BufReader<OwnedReadHalf>>,
    /// The agent takes its closing for our going away.
    _writer: OwnedWriteHalf,
}

impl Subscription {
    /// `None`: the agent is gone.
    pub async fn next(&mut self) -> Option<String> {
        self.lines.next_line().await.ok().flatten()
    }
}

async fn say(
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
    let said = timeout(PATIENCE, connect).await;
    said.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .with_context(|| format!("nobody answers at {}", path.display()))
}

async fn read(reader: OwnedReadHalf) -> Result<String> {
    let mut text = String::new();
    match timeout(PATIENCE, reader.take(MOST).read_to_string(&mut text)).await {
        Ok(Ok(_)) if text.starts_with("{\"type\":\"error\"") => bail!("it answers {}", text.trim()),
        Ok(Ok(_)) if !text.is_empty() => Ok(text),
        Ok(Ok(_)) => bail!("it closes without an answer"),
        Ok(Err(error)) => Err(error).context("cannot read its answer"),
        Err(_) => bail!(
            "no answer within {} s: it hangs or is stopped",
            PATIENCE.as_secs()
        ),
    }
}
