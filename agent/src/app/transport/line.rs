//! A command of one line on a connection of its own, whose end is the end of the answer: HAProxy's runtime API.

use anyhow::Result;
use tokio::io::AsyncWriteExt as _;

use super::{Endpoint, Origin, text};

pub async fn ask(endpoint: &Endpoint, from: &Origin, command: &str) -> Result<String> {
    let mut connection = endpoint.connect(from, None).await?;
    connection
        .write_all(format!("{command}\n").as_bytes())
        .await?;
    text(connection.rest().await?)
}
