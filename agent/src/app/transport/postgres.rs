//! PostgreSQL's protocol, version 3: a login, and simple queries.

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::AsyncWriteExt as _;

use super::{
    Connection, Endpoint, LoginRefused, MAX_ANSWER_BYTES, Origin, Password,
    scram::{Login, MECHANISM, Signature},
};
use crate::app::{
    lines,
    series::{Names, SeriesSet},
};

/// Version 3.0 of the protocol.
const VERSION: u32 = 196_608;
/// Maximum number of columns of a row.
const MAX_COLUMNS: usize = 256;

/// A session.
pub struct Client(Connection);

impl Client {
    pub async fn connect(
        endpoint: &Endpoint,
        from: &Origin,
        (user, database): (&str, &str),
        login: Option<&Password>,
    ) -> Result<Self> {
        let only = login.map(|login| login.only);
        let mut connection = endpoint.connect(from, only).await?;
        connection.write_all(&startup(user, database)).await?;
        let mut client = Self(connection);
        let mut budget = MAX_ANSWER_BYTES;
        let mut scram = None;
        let mut signature: Option<Signature> = None;
        let password = || {
            login.map(|login| login.text.as_str()).ok_or_else(|| {
                LoginRefused(format!(
                    "it requires a password for user {user}: set one in [[app.login]]"
                ))
            })
        };
        let mut is_proved = false;
        loop {
            let (method, data) = match client.0.message(&mut budget, message).await? {
                Message::Other(b'R', body) => authentication(&body)?,
                Message::Error(error) => {
                    return Err(LoginRefused(format!("login as {user}: {error}")).into());
                }
                Message::Ready => return Ok(client),
                _ => continue,
            };
            match method {
                // Accepted: a server that has begun SCRAM must have proved that it knows the password, too.
                0 => ensure!(scram.is_none() || is_proved, "it skips its part of SCRAM"),
                // The password as it is.
                3 => {
                    ensure!(scram.is_none(), "it asks for the password within SCRAM");
                    client.send(b'p', &text(&[password()?])).await?;
                }
                // SASL: the mechanisms that the server has.
                10 => {
                    ensure!(scram.is_none(), "it begins SCRAM twice");
                    let mut mechanisms = data.split(|byte| *byte == 0);
                    ensure!(
                        mechanisms.any(|name| name == MECHANISM.as_bytes()),
                        "it offers user {user} no supported SASL mechanism: use SCRAM-SHA-256"
                    );
                    let begun = Login::new(password()?)?;
                    let first = begun.first();
                    let mut body = text(&[MECHANISM]);
                    body.extend((first.len() as u32).to_be_bytes());
                    body.extend(first.into_bytes());
                    client.send(b'p', &body).await?;
                    scram = Some(begun);
                }
                11 => {
                    // Each one costs many rounds of hashing, on the thread that polls all services.
                    ensure!(signature.is_none(), "it repeats a message of SCRAM");
                    let begun = scram.as_ref().context("an unexpected SCRAM message")?;
                    let (reply, expected) = begun.reply(&data)?;
                    client.send(b'p', reply.as_bytes()).await?;
                    signature = Some(expected);
                }
                12 => {
                    let expected = signature.as_ref();
                    expected
                        .context("an unexpected SCRAM message")?
                        .check(&data)?;
                    is_proved = true;
                }
                method => {
                    return Err(LoginRefused(format!(
                        "it asks the user {user} for a password in a way that is not supported ({method}): use SCRAM, a \
                         plain password or `trust`"
                    ))
                    .into());
                }
            }
        }
    }

    /// Whether another query can be sent.
    pub fn is_open(&self) -> bool {
        self.0.is_idle()
    }

    async fn send(&mut self, kind: u8, body: &[u8]) -> Result<()> {
        Ok(self.0.write_all(&packet(kind, body)).await?)
    }

    /// The rows of the answer to one query.
    pub async fn query(
        &mut self,
        query: &str,
        (table, labels): (&str, &[String]),
        names: &Names,
    ) -> Result<SeriesSet> {
        self.0.held.release();
        self.send(b'Q', &text(&[query])).await?;
        let mut budget = MAX_ANSWER_BYTES;
        let mut columns = Vec::new();
        let mut out = SeriesSet::default();
        let mut failure = None;
        loop {
            match self.0.message(&mut budget, message).await? {
                Message::Columns(names) => columns = names,
                Message::Row(fields) => {
                    lines::rows(&columns, &fields, table, labels, names, &mut out);
                }
                Message::Error(error) => failure = Some(error),
                Message::Ready => {
                    return match failure {
                        Some(error) => bail!("{query}: {error}"),
                        None => {
                            self.0.held.release();
                            Ok(out)
                        }
                    };
                }
                Message::Other(..) => {}
            }
        }
    }
}

/// The first packet: it has no type.
pub fn startup(user: &str, database: &str) -> Vec<u8> {
    let mut body = VERSION.to_be_bytes().to_vec();
    body.extend(text(&[
        "user",
        user,
        "database",
        database,
        "application_name",
        "tailback",
    ]));
    body.push(0);
    let mut packet = (body.len() as u32 + 4).to_be_bytes().to_vec();
    packet.extend(body);
    packet
}

/// Texts, each with a zero byte at its end.
fn text(texts: &[&str]) -> Vec<u8> {
    let mut body = Vec::new();
    for text in texts {
        body.extend(text.bytes().filter(|byte| *byte != 0));
        body.push(0);
    }
    body
}

fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![kind];
    packet.extend((body.len() as u32 + 4).to_be_bytes());
    packet.extend(body);
    packet
}

/// What the server sends.
#[derive(Debug, PartialEq)]
pub enum Message {
    Columns(Vec<String>),
    /// An absent field is empty.
    Row(Vec<String>),
    Error(String),
    Ready,
    Other(u8, Vec<u8>),
}

/// The message at the beginning of `bytes`, and its length; `None` if it is not complete.
pub fn message(bytes: &[u8]) -> Result<Option<(Message, usize)>> {
    let Some((kind, rest)) = bytes.split_first() else {
        return Ok(None);
    };
    ensure!(
        kind.is_ascii_alphabetic() || kind.is_ascii_digit(),
        "not an answer of PostgreSQL's protocol: it begins with the byte {kind}"
    );
    let Some(len) = rest.first_chunk() else {
        return Ok(None);
    };
    let len = u32::from_be_bytes(*len) as usize;
    ensure!(
        (4..=MAX_ANSWER_BYTES).contains(&len),
        "not an answer of PostgreSQL's protocol: a message of {len} bytes"
    );
    let Some(body) = rest.get(4..len) else {
        return Ok(None);
    };
    let message = match kind {
        b'T' => Message::Columns(columns(body).context("invalid description of rows")?),
        b'D' => Message::Row(row(body).context("invalid row")?),
        b'E' => Message::Error(error(body)),
        b'Z' => Message::Ready,
        other => Message::Other(*other, body.to_vec()),
    };
    Ok(Some((message, 1 + len)))
}

/// The method of a request for a password, and what belongs to it.
fn authentication(body: &[u8]) -> Result<(u32, Vec<u8>)> {
    let (method, data) = body
        .split_first_chunk()
        .context("an invalid request for a password")?;
    Ok((u32::from_be_bytes(*method), data.to_vec()))
}

fn count(body: &[u8]) -> Option<(usize, &[u8])> {
    let (count, rest) = body.split_first_chunk()?;
    let count = usize::from(u16::from_be_bytes(*count));
    (count <= MAX_COLUMNS).then_some((count, rest))
}

fn columns(body: &[u8]) -> Option<Vec<String>> {
    let (count, mut rest) = count(body)?;
    let mut columns = Vec::new();
    for _ in 0..count {
        let end = rest.iter().position(|byte| *byte == 0)?;
        columns.push(String::from_utf8_lossy(&rest[..end]).into_owned());
        // Table, column, type, size, modifier, format.
        rest = rest.get(end + 1 + 18..)?;
    }
    Some(columns)
}

fn row(body: &[u8]) -> Option<Vec<String>> {
    let (count, mut rest) = count(body)?;
    let mut fields = Vec::new();
    for _ in 0..count {
        let (len, after) = rest.split_first_chunk()?;
        let len = i32::from_be_bytes(*len);
        // -1: no value.
        let len = usize::try_from(len).unwrap_or(0);
        fields.push(String::from_utf8_lossy(after.get(..len)?).into_owned());
        rest = &after[len..];
    }
    Some(fields)
}

/// The text for people of an error.
fn error(body: &[u8]) -> String {
    let mut fields = body.split(|byte| *byte == 0);
    let text = fields.find_map(|field| field.strip_prefix(b"M"));
    let text = String::from_utf8_lossy(text.unwrap_or_default()).into_owned();
    crate::text::harmless(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend((body.len() as u32 + 4).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn one(kind: u8, body: &[u8]) -> Message {
        let bytes = framed(kind, body);
        for end in 0..bytes.len() {
            assert!(message(&bytes[..end]).unwrap().is_none(), "{end}");
        }
        let (message, len) = message(&bytes).unwrap().unwrap();
        assert_eq!(len, bytes.len());
        message
    }

    #[test]
    fn rows_and_columns_are_read() {
        let mut body = vec![0, 2];
        for name in ["database", "cl_waiting"] {
            body.extend(name.bytes());
            body.extend([0; 19]);
        }
        let expected = Message::Columns(vec!["database".to_owned(), "cl_waiting".to_owned()]);
        assert_eq!(one(b'T', &body), expected);
        let body = [0, 2, 0, 0, 0, 2, b'1', b'2', 255, 255, 255, 255];
        assert_eq!(
            one(b'D', &body),
            Message::Row(vec!["12".to_owned(), String::new()])
        );
        assert_eq!(one(b'Z', b"I"), Message::Ready);
        let error = one(b'E', b"SFATAL\0Mno such user\0\0");
        assert_eq!(error, Message::Error("no such user".to_owned()));
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        for bytes in [
            b"\0\0\0\0\0".as_slice(),
            b"HTTP/1.1 200",
            &framed(b'D', &[0, 1, 0, 0, 0, 9]),
            &framed(b'T', &[0, 1, b'a']),
            &framed(b'T', &[255, 255]),
            b"D\0\0\0\0",
        ] {
            assert!(message(bytes).is_err(), "{bytes:?}");
        }
    }
}
