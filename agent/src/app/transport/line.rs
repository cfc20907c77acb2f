//! A command of one line on a connection of its own, whose end is the end of the answer: HAProxy's runtime API.

use std::sync::Arc;

use anyhow::Result;
use tokio::io::AsyncWriteExt as _;

use super::{Endpoint, text};
use crate::app::own::Own;

pub async fn ask(endpoint: &Endpoint, own: &Arc<Own>, command: &str) -> Result<String> {
    let mut connection = endpoint.connect(own, None).await?;
    connection
        .write_all(format!("{command}\n").as_bytes())
        .await?;
    text(connection.rest().await?)
}
