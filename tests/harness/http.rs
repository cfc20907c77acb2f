//! The least of HTTP: one GET. Version 1.0, so that every server answers in one piece and closes.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// What was answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

/// Asks `to` for `path`.
pub fn get(to: SocketAddr, path: &str, timeout: Duration) -> Result<Answer> {
    let fetch = || -> Result<Vec<u8>> {
        let mut stream = TcpStream::connect_timeout(&to, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        stream.write_all(request(to, path).as_bytes())?;
        let mut raw = Vec::new();
        stream.read_to_end(&mut raw)?;
        Ok(raw)
    };
    let raw = fetch().with_context(|| format!("GET http://{to}{path}"))?;
    parse(&raw).with_context(|| format!("read the answer of http://{to}{path}"))
}

/// The bytes to send.
pub(crate) fn request(to: SocketAddr, path: &str) -> String {
    format!("GET {path} HTTP/1.0\r\nHost: {to}\r\n\r\n")
}

/// The status of an answer, from its first line.
pub(crate) fn status(raw: &[u8]) -> Option<u16> {
    let line = raw.split(|byte| *byte == b'\n').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    words
        .next()?
        .starts_with("HTTP/1.")
        .then(|| words.next()?.trim().parse().ok())?
}

fn parse(raw: &[u8]) -> Result<Answer> {
    let Some(status) = status(raw) else {
        bail!(
            "not HTTP: {:?}",
            String::from_utf8_lossy(&raw[..raw.len().min(80)])
        );
    };
    let Some(head) = raw.windows(4).position(|four| four == b"\r\n\r\n") else {
        bail!("it ended within the headers");
    };
    Ok(Answer {
        status,
        body: raw[head + 4..].to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_status_and_what_follows_the_headers() {
        let answer = parse(b"HTTP/1.1 404 Not Found\r\nA: b\r\n\r\nno\r\n").unwrap();
        assert_eq!((answer.status, &answer.body[..]), (404, &b"no\r\n"[..]));
    }

    #[test]
    fn what_is_not_http_is_said_to_be() {
        assert!(
            parse(b"+PONG\r\n")
                .unwrap_err()
                .to_string()
                .contains("not HTTP")
        );
        assert!(parse(b"HTTP/1.1 200 OK\r\nA: b").is_err());
    }
}
