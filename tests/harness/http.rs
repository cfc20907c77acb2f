//! A minimal HTTP client: one GET. Uses HTTP/1.0, so that every server sends the whole response and closes.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// A complete response.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub body: Vec<u8>,
}

/// Sends a GET request for `path` to `to`. `timeout` applies to connecting and to each read and write.
pub fn get(to: SocketAddr, path: &str, timeout: Duration) -> Result<Response> {
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
    parse(&raw).with_context(|| format!("read the response of http://{to}{path}"))
}

/// The request as text.
pub(crate) fn request(to: SocketAddr, path: &str) -> String {
    format!("GET {path} HTTP/1.0\r\nHost: {to}\r\n\r\n")
}

/// Status code of a response, from its first line.
pub(crate) fn status(raw: &[u8]) -> Option<u16> {
    let line = raw.split(|byte| *byte == b'\n').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    words
        .next()?
        .starts_with("HTTP/1.")
        .then(|| words.next()?.trim().parse().ok())?
}

fn parse(raw: &[u8]) -> Result<Response> {
    let Some(status) = status(raw) else {
        bail!(
            "not HTTP: {:?}",
            String::from_utf8_lossy(&raw[..raw.len().min(80)])
        );
    };
    let Some(head) = raw.windows(4).position(|four| four == b"\r\n\r\n") else {
        bail!("the response ended within the headers");
    };
    Ok(Response {
        status,
        body: raw[head + 4..].to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_is_split_into_status_and_body() {
        let response = parse(b"HTTP/1.1 404 Not Found\r\nA: b\r\n\r\nno\r\n").unwrap();
        assert_eq!((response.status, &response.body[..]), (404, &b"no\r\n"[..]));
    }

    #[test]
    fn non_http_input_is_an_error() {
        assert!(
            parse(b"+PONG\r\n")
                .unwrap_err()
                .to_string()
                .contains("not HTTP")
        );
        assert!(parse(b"HTTP/1.1 200 OK\r\nA: b").is_err());
    }
}
