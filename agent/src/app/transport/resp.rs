//! RESP, the protocol of Redis (version 2).

use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::AsyncWriteExt as _;

use super::{Connection, Endpoint, LoginRefused, MAX_ANSWER_BYTES, Origin, Password};

/// Maximum depth of arrays in arrays.
const MAX_DEPTH: usize = 8;
/// Maximum number of elements of a reply, in all its lists. Replies of a few hundred are asked for.
const MAX_ELEMENTS: usize = 16_384;
/// Memory that an element takes, bytes: its place, with what its list keeps free.
const ELEMENT_BYTES: usize = 64;
/// Memory that a list takes beside its elements, as a number of elements: a list of one has room for four.
const LIST_ELEMENTS: usize = 3;
/// Longest line, bytes: numbers, states and errors are shorter.
const MAX_LINE_BYTES: usize = 4 << 10;

#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Nothing,
    Number(i64),
    Text(Vec<u8>),
    Error(String),
    List(Vec<Self>),
}

impl Reply {
    /// A number, or a text that is one.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(*number as f64),
            Self::Text(_) => self.text()?.trim().parse().ok(),
            _ => None,
        }
    }

    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    pub fn list(&self) -> &[Self] {
        match self {
            Self::List(list) => list,
            _ => &[],
        }
    }
}

/// A connection to Redis.
pub struct Client {
    connection: Connection,
    /// Bytes that may still be read of this answer.
    budget: usize,
}

impl Client {
    /// `login`: a user and its password.
    pub async fn connect(
        endpoint: &Endpoint,
        from: &Origin,
        login: Option<(&str, &Password)>,
    ) -> Result<Self> {
        let only = login.map(|(_, password)| password.only);
        let mut client = Self {
            connection: endpoint.connect(from, only).await?,
            budget: MAX_ANSWER_BYTES,
        };
        if let Some((user, password)) = login {
            let command = ["AUTH", user, password.text.as_str()]
                .map(str::to_owned)
                .to_vec();
            let replies = client.ask(&[command]).await?;
            if let Some(Reply::Error(error)) = replies.first() {
                let error = crate::text::harmless(error);
                return Err(LoginRefused(format!("login as {user}: {error}")).into());
            }
        }
        Ok(client)
    }

    /// Whether more commands can be sent.
    pub fn is_open(&self) -> bool {
        self.connection.is_idle()
    }

    /// The next commands belong to another answer.
    pub fn begin(&mut self) {
        self.budget = MAX_ANSWER_BYTES;
        self.connection.held.release();
    }

    /// The replies to several commands, which are sent at once.
    pub async fn ask(&mut self, commands: &[Vec<String>]) -> Result<Vec<Reply>> {
        let mut request = Vec::new();
        for command in commands {
            request.extend(format!("*{}\r\n", command.len()).into_bytes());
            for argument in command {
                request.extend(format!("${}\r\n{argument}\r\n", argument.len()).into_bytes());
            }
        }
        self.connection.write_all(&request).await?;
        let held = Arc::clone(&self.connection.held);
        // The replies to the commands before have been used.
        held.release();
        let mut replies = Vec::new();
        for _ in commands {
            let mut parser = Parser::default();
            let parse = |bytes: &[u8]| {
                let before = parser.weight;
                let reply = parser.parse(bytes)?;
                held.add((parser.weight - before) * ELEMENT_BYTES)?;
                Ok(reply)
            };
            let reply = self.connection.message(&mut self.budget, parse).await?;
            if let Reply::Error(error) = &reply {
                if error.starts_with("NOAUTH") {
                    let why = "it requires a password: set one in [[app.login]]";
                    return Err(LoginRefused(why.to_owned()).into());
                }
                ensure!(
                    !error.starts_with("NOPERM"),
                    "its user lacks a right: {}",
                    crate::text::harmless(error)
                );
            }
            replies.push(reply);
        }
        Ok(replies)
    }
}

/// The reply at the beginning of `bytes`, and its length; `None` if it is not complete.
pub fn parse(bytes: &[u8]) -> Result<Option<(Reply, usize)>> {
    Parser::default().parse(bytes)
}

/// Reads one reply while it arrives. However small its pieces are, nothing is parsed twice.
#[derive(Default)]
struct Parser {
    /// Lists that are not complete: the number of missing elements, and the elements.
    open: Vec<(usize, Vec<Reply>)>,
    /// Elements that lists have announced.
    elements: usize,
    /// Memory of what was parsed, in elements.
    weight: usize,
    /// Number of bytes parsed.
    at: usize,
    /// Number of bytes after them that were searched for the end of the line.
    searched: usize,
}

/// The next part of a reply.
enum Part {
    Whole(Reply),
    /// A list with this number of elements, at least one.
    List(usize),
}

impl Parser {
    /// `bytes`: those of the last call, and what followed. Returns the reply and its length.
    fn parse(&mut self, bytes: &[u8]) -> Result<Option<(Reply, usize)>> {
        while let Some(part) = self.part(bytes)? {
            self.weight += 1;
            let mut whole = match part {
                Part::Whole(reply) => reply,
                Part::List(len) => {
                    self.weight += LIST_ELEMENTS;
                    self.elements += len;
                    ensure!(
                        self.elements <= MAX_ELEMENTS,
                        "a reply has too many elements"
                    );
                    ensure!(self.open.len() < MAX_DEPTH, "a reply has too many levels");
                    self.open.push((len, Vec::new()));
                    continue;
                }
            };
            loop {
                let Some((missing, mut list)) = self.open.pop() else {
                    return Ok(Some((whole, self.at)));
                };
                list.push(whole);
                if missing > 1 {
                    self.open.push((missing - 1, list));
                    break;
                }
                whole = Reply::List(list);
            }
        }
        Ok(None)
    }

    fn part(&mut self, bytes: &[u8]) -> Result<Option<Part>> {
        let rest = bytes.get(self.at..).unwrap_or_default();
        let unread = rest.get(self.searched..).unwrap_or_default();
        let Some(end) = unread.windows(2).position(|two| two == b"\r\n") else {
            ensure!(
                rest.len() <= MAX_LINE_BYTES,
                "a line of a reply is too long"
            );
            // The last byte may be the first one of the end.
            self.searched = rest.len().saturating_sub(1);
            return Ok(None);
        };
        let end = self.searched + end;
        let mut len = end + 2;
        let Some((kind, line)) = rest[..end].split_first() else {
            bail!("a reply is empty");
        };
        let text = || std::str::from_utf8(line).context("a reply is not text");
        let number = || -> Result<i64> { text()?.parse().context("a reply has no valid number") };
        let part = match kind {
            b'+' => Part::Whole(Reply::Text(line.to_vec())),
            b'-' => Part::Whole(Reply::Error(String::from_utf8_lossy(line).into_owned())),
            b':' => Part::Whole(Reply::Number(number()?)),
            b'$' => match usize::try_from(number()?) {
                Err(_) => Part::Whole(Reply::Nothing),
                Ok(size) => {
                    ensure!(size <= MAX_ANSWER_BYTES, "a reply is too long");
                    let Some(text) = rest.get(len..len + size + 2) else {
                        // Only its short first line is parsed again.
                        return Ok(None);
                    };
                    len += size + 2;
                    Part::Whole(Reply::Text(text[..size].to_vec()))
                }
            },
            b'*' => match usize::try_from(number()?) {
                Err(_) => Part::Whole(Reply::Nothing),
                Ok(0) => Part::Whole(Reply::List(Vec::new())),
                Ok(count) => {
                    // Each element takes 4 bytes at least.
                    ensure!(count <= MAX_ANSWER_BYTES / 4, "a reply is too long");
                    Part::List(count)
                }
            },
            other => bail!("not a reply of Redis: it begins with the byte {other}"),
        };
        self.at += len;
        self.searched = 0;
        Ok(Some(part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(bytes: &[u8]) -> Reply {
        let (reply, len) = parse(bytes).unwrap().unwrap();
        assert_eq!(len, bytes.len());
        reply
    }

    #[test]
    fn replies_are_read() {
        assert_eq!(one(b":12\r\n"), Reply::Number(12));
        assert_eq!(one(b"+OK\r\n").text(), Some("OK"));
        assert_eq!(one(b"$-1\r\n"), Reply::Nothing);
        assert_eq!(one(b"$4\r\na\r\nb\r\n").text(), Some("a\r\nb"));
        let list = one(b"*3\r\n$1\r\nx\r\n:2\r\n*1\r\n$3\r\n1.5\r\n");
        assert_eq!(list.list().len(), 3);
        assert_eq!(list.list()[2].list()[0].number(), Some(1.5));
        assert_eq!(one(b"-ERR no\r\n"), Reply::Error("ERR no".to_owned()));
    }

    #[test]
    fn a_reply_that_arrives_byte_by_byte_is_parsed_once() {
        let count = MAX_ELEMENTS;
        let mut whole = format!("*{count}\r\n").into_bytes();
        whole.extend(b":1\r\n".repeat(count));
        let mut parser = Parser::default();
        // Quadratic work would take minutes.
        for end in 0..whole.len() {
            assert!(parser.parse(&whole[..end]).unwrap().is_none(), "{end}");
        }
        let (reply, len) = parser.parse(&whole).unwrap().unwrap();
        assert_eq!((reply.list().len(), len), (count, whole.len()));
    }

    #[test]
    fn an_incomplete_reply_waits_for_more() {
        let whole = b"*2\r\n$5\r\nhello\r\n:7\r\n";
        for end in 0..whole.len() {
            assert!(parse(&whole[..end]).unwrap().is_none(), "{end}");
        }
    }

    #[test]
    fn the_elements_of_all_lists_of_a_reply_are_bounded() {
        let mut parser = Parser::default();
        let lists = MAX_ELEMENTS / 2;
        let mut bytes = format!("*{lists}\r\n").into_bytes();
        bytes.extend(b"*1\r\n:1\r\n".repeat(lists - 1));
        assert!(parser.parse(&bytes).unwrap().is_none());
        assert_eq!(
            parser.weight,
            1 + LIST_ELEMENTS + (lists - 1) * (2 + LIST_ELEMENTS)
        );
        bytes.extend(b"*2\r\n");
        let error = parser.parse(&bytes).unwrap_err();
        assert!(error.to_string().contains("too many elements"), "{error}");
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        for bytes in [
            b"HTTP/1.1 200 OK\r\n".as_slice(),
            b"\r\n",
            b":x\r\n",
            b"$99999999999\r\n",
            b"*99999999\r\n",
            b"*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n:1\r\n",
        ] {
            assert!(parse(bytes).is_err(), "{}", String::from_utf8_lossy(bytes));
        }
        assert!(parse(&vec![b'+'; 100_000]).is_err());
    }
}
