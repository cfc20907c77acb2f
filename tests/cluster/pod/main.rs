//! The program in the pods that `cargo xtask test --cluster` starts: a web service, which knows nothing of the agent, and a reader of
//! the page, which tests run beside it.
#![forbid(unsafe_code)]

use std::{
    env,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use tailback_page::Page;
use tailback_tests::sockets;

const PORT: u16 = 8080;
const BACKLOG: i32 = 128;
const WORKERS: usize = 2;
/// Interval at which `watch` reads the page.
const WATCH_INTERVAL: Duration = Duration::from_millis(2);
/// Interval of its report.
const REPORT_INTERVAL: Duration = Duration::from_millis(500);

fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        // A request takes this CPU time, ms.
        ["compute", ms] => {
            let time = millis(ms)?;
            serve(move || {
                burn(time);
                Ok(())
            })
        }
        // A request sleeps, ms.
        ["sleep", ms] => {
            let time = millis(ms)?;
            serve(move || {
                thread::sleep(time);
                Ok(())
            })
        }
        // A request calls another service.
        ["relay", upstream] => {
            let upstream = upstream.to_owned();
            serve(move || call(&upstream))
        }
        ["page", file] => {
            println!("{}", of_page(&Page::open(file)));
            Ok(())
        }
        ["watch", file] => watch(file),
        _ => bail!("unknown arguments {words:?}"),
    }
}

fn millis(text: &str) -> Result<Duration> {
    let ms = text
        .parse()
        .with_context(|| format!("a time in ms: {text}"))?;
    Ok(Duration::from_millis(ms))
}

/// Uses this much CPU time of the calling thread.
fn burn(time: Duration) {
    let used = || {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(
            now.tv_sec.cast_unsigned(),
            u32::try_from(now.tv_nsec).unwrap_or(0),
        )
    };
    let end = used() + time;
    while used() < end {}
}

/// Sends a request, and waits for the end of the response.
fn call(upstream: &str) -> Result<()> {
    let mut addresses = upstream.to_socket_addrs()?;
    let address = addresses.next().context("no address")?;
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Workers that accept from one listener, each a request at a time.
fn serve(work: impl Fn() -> Result<()> + Clone + Send + 'static) -> Result<()> {
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
    let listener = sockets::listen(address, BACKLOG, false)?;
    println!("listening {address}");
    let workers: Vec<_> = (0..WORKERS)
        .map(|_| {
            let (listener, work) = (listener.try_clone()?, work.clone());
            Ok(thread::spawn(move || worker(&listener, &work)))
        })
        .collect::<Result<_>>()?;
    for worker in workers {
        worker.join().ok().context("a worker panicked")??;
    }
    Ok(())
}

fn worker(listener: &TcpListener, work: &impl Fn() -> Result<()>) -> Result<()> {
    loop {
        let (mut stream, _) = listener.accept()?;
        // A client that has gone, or an upstream that fails, ends this request only.
        let mut request = [0; 1024];
        let served = stream
            .read(&mut request)
            .context("read")
            .and_then(|_| work());
        let response: &[u8] = match served {
            Ok(()) => b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nok\n",
            Err(_) => b"HTTP/1.0 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
        };
        let _ = stream.write_all(response);
    }
}

fn of_page(page: &Page) -> serde_json::Value {
    let pressure = page.pressure();
    json!({
        "alive": pressure.alive,
        "pid": pressure.pid,
        "level": pressure.level_name(),
        "admit_ratio": pressure.admit_ratio,
    })
}

/// Reads the page until standard output is closed. A line for each change, and at intervals, has the state, how often the page was read,
/// how often it had expired, and the longest time for which it had, ms.
fn watch(file: &str) -> Result<()> {
    let page = Page::open(file);
    let (mut reads, mut expired, mut longest) = (0_u64, 0_u64, Duration::ZERO);
    let mut since: Option<Instant> = None;
    let mut last_report: Option<(Instant, bool)> = None;
    loop {
        reads += 1;
        let pressure = page.pressure();
        if pressure.alive {
            since = None;
        } else {
            expired += 1;
            longest = longest.max(since.get_or_insert_with(Instant::now).elapsed());
        }
        let is_due = last_report.is_none_or(|(at, was_alive)| {
            was_alive != pressure.alive || at.elapsed() >= REPORT_INTERVAL
        });
        if is_due {
            last_report = Some((Instant::now(), pressure.alive));
            let line = json!({
                "alive": pressure.alive, "admit_ratio": pressure.admit_ratio, "reads": reads,
                "expired": expired, "longest_ms": u64::try_from(longest.as_millis())?,
            });
            writeln!(std::io::stdout(), "{line}")?;
        }
        thread::sleep(WATCH_INTERVAL);
    }
}
