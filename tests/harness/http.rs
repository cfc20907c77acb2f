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

/// Like [`get`], over HTTP/1.1, for servers that refuse 1.0.
pub fn get_1_1(to: SocketAddr, path: &str, timeout: Duration) -> Result<Response> {
    let fetch = || -> Result<Vec<u8>> {
        let mut stream = TcpStream::connect_timeout(&to, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut raw = Vec::new();
        stream.read_to_end(&mut raw)?;
        Ok(raw)
    };
    let raw = fetch().with_context(|| format!("GET http://{to}{path}"))?;
    let mut response =
        parse(&raw).with_context(|| format!("read the response of http://{to}{path}"))?;
    let head = String::from_utf8_lossy(&raw[..raw.len() - response.body.len()]).to_lowercase();
    if head.contains("\r\ntransfer-encoding: chunked\r\n") {
        response.body = dechunked(&response.body)
            .with_context(|| format!("read the chunks of http://{to}{path}"))?;
    }
    Ok(response)
}

/// The content of a body in chunks: each has its length, in hexadecimal, on a line before it; the last one is empty.
fn dechunked(mut body: &[u8]) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    loop {
        let end = body.windows(2).position(|two| two == b"\r\n");
        let Some((line, rest)) = end.map(|end| (&body[..end], &body[end + 2..])) else {
            bail!("the body ended before its last chunk");
        };
        let length = usize::from_str_radix(std::str::from_utf8(line)?.trim(), 16)?;
        if length == 0 {
            return Ok(content);
        }
        let Some((chunk, rest)) = rest.split_at_checked(length) else {
            bail!("the body ended within a chunk");
        };
        content.extend_from_slice(chunk);
        body = rest.strip_prefix(b"\r\n").unwrap_or(rest);
    }
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
    fn chunks_are_joined_and_a_missing_end_is_an_error() {
        assert_eq!(
            dechunked(b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n").unwrap(),
            b"abc0123456789"
        );
        for broken in [&b"3\r\nab"[..], b"3\r\nabc\r\n", b"x\r\n", b""] {
            assert!(dechunked(broken).is_err());
        }
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
