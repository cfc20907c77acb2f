//! A collector that counts the spans that it receives over OTLP/HTTP. It can go away and come back.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

/// Largest request that is read, bytes; the agent's are at most 4 MiB.
const MAX_REQUEST_BYTES: usize = 8 << 20;
/// A client that sends nothing for this long is disconnected.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Field numbers of `ExportTraceServiceRequest.resource_spans`, `ResourceSpans.scope_spans` and `ScopeSpans.spans`.
const PATH_TO_SPANS: [u64; 3] = [1, 2, 2];

/// Stops listening on drop.
pub struct Collector {
    address: SocketAddr,
    spans: Arc<AtomicU64>,
    running: Option<Running>,
}

struct Running {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Collector {
    /// Listens on this port of 127.0.0.1.
    pub fn start(port: u16) -> Result<Self> {
        let mut collector = Self {
            address: crate::ports::local(port),
            spans: Arc::default(),
            running: None,
        };
        collector.come_back()?;
        Ok(collector)
    }

    /// For `--otlp`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Spans received so far.
    pub fn spans(&self) -> u64 {
        self.spans.load(Ordering::Relaxed)
    }

    /// Refuses connections from now on, and closes those that are open.
    pub fn go_away(&mut self) {
        if let Some(running) = self.running.take() {
            running.is_over.store(true, Ordering::Relaxed);
            // Wakes the thread that accepts.
            let _ = TcpStream::connect(self.address);
            let _ = running.thread.join();
        }
    }

    /// Listens again.
    pub fn come_back(&mut self) -> Result<()> {
        let listener = crate::sockets::listen(self.address, 16, false)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let (over, spans) = (Arc::clone(&is_over), Arc::clone(&self.spans));
        let thread = thread::Builder::new()
            .name("collector".to_owned())
            .spawn(move || accept(&listener, &over, &spans))
            .context("start a thread")?;
        self.running = Some(Running { is_over, thread });
        Ok(())
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.go_away();
    }
}

/// One connection after the other: the agent uses one.
fn accept(listener: &TcpListener, is_over: &AtomicBool, spans: &AtomicU64) {
    for stream in listener.incoming() {
        if is_over.load(Ordering::Relaxed) {
            return;
        }
        // An error ends the connection; the agent sends again what was not acknowledged.
        let _ = stream
            .map_err(Into::into)
            .and_then(|stream| serve(stream, is_over, spans));
        if is_over.load(Ordering::Relaxed) {
            return;
        }
    }
}

fn serve(stream: TcpStream, is_over: &AtomicBool, spans: &AtomicU64) -> Result<()> {
    // Short, so that the end is noticed.
    const POLL: Duration = Duration::from_millis(50);
    stream.set_read_timeout(Some(POLL))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let mut idle = Duration::ZERO;
        // Wait for the first byte of the next request.
        while let Err(error) = reader.fill_buf() {
            let is_timeout = matches!(
                error.kind(),
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
            );
            idle += POLL;
            if !is_timeout || idle > TIMEOUT || is_over.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
        writer.set_read_timeout(Some(TIMEOUT))?;
        let Some(body) = request(&mut reader)? else {
            return Ok(());
        };
        spans.fetch_add(count(&body, &PATH_TO_SPANS)?, Ordering::Relaxed);
        writer.write_all(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n",
        )?;
        writer.set_read_timeout(Some(POLL))?;
    }
}

/// The body of a request; `None` at the end of the connection.
fn request(reader: &mut BufReader<TcpStream>) -> Result<Option<Vec<u8>>> {
    let mut length = 0;
    let mut line = String::new();
    let mut lines = 0;
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        lines += 1;
        ensure!(lines < 100, "a request with too many headers");
        let text = line.trim_end();
        if text.is_empty() {
            break;
        }
        if let Some((name, value)) = text.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse()?;
        }
    }
    ensure!(length <= MAX_REQUEST_BYTES, "a request of {length} bytes");
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(Some(body))
}

/// Counts the messages at the end of a path of field numbers.
fn count(mut message: &[u8], path: &[u64]) -> Result<u64> {
    let Some((wanted, rest)) = path.split_first() else {
        return Ok(1);
    };
    let mut found = 0;
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        let (field, wire_type) = (tag >> 3, tag & 7);
        let bytes = match wire_type {
            0 => {
                varint(&mut message)?;
                continue;
            }
            1 => 8,
            2 => usize::try_from(varint(&mut message)?)?,
            5 => 4,
            _ => bail!("wire type {wire_type} in a request"),
        };
        let (part, after) = message.split_at_checked(bytes).context("a cut request")?;
        if field == *wanted && wire_type == 2 {
            found += count(part, rest)?;
        }
        message = after;
    }
    Ok(found)
}

fn varint(message: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first().context("a cut request")?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    bail!("a number of more than 10 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two spans in two scopes of a resource, with a resource field before them and a schema URL after.
    const REQUEST: &[u8] = &[
        0x0a, 15, // resource_spans
        0x0a, 1, 0xff, // resource
        0x12, 3, 0x12, 1, 0xff, // scope_spans, spans
        0x12, 2, 0x12, 0, // scope_spans, spans
        0x1a, 1, 0xff, // schema_url
    ];

    #[test]
    fn spans_are_counted() {
        assert_eq!(count(REQUEST, &PATH_TO_SPANS).unwrap(), 2);
        assert_eq!(count(&[], &PATH_TO_SPANS).unwrap(), 0);
        assert!(count(&REQUEST[..10], &PATH_TO_SPANS).is_err());
    }

    #[test]
    fn a_collector_goes_away_and_comes_back_with_its_count() {
        let mut collector = Collector::start(crate::ports::free().unwrap()).unwrap();
        let post = |collector: &Collector| -> Result<()> {
            let mut stream = TcpStream::connect(collector.address)?;
            let head = format!(
                "POST /v1/traces HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
                REQUEST.len()
            );
            stream.write_all(head.as_bytes())?;
            stream.write_all(REQUEST)?;
            let mut reply = [0; 12];
            stream.read_exact(&mut reply)?;
            ensure!(reply == *b"HTTP/1.1 200");
            Ok(())
        };
        post(&collector).unwrap();
        collector.go_away();
        assert!(post(&collector).is_err());
        collector.come_back().unwrap();
        post(&collector).unwrap();
        assert_eq!(collector.spans(), 4);
    }
}
