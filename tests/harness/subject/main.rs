//! A configurable service for tests: its arguments set the service time, the number of processes, and the address. It prints
//! `listening ADDRESS` once it listens.
#![forbid(unsafe_code)]

mod crowd;

use std::{
    env, fs,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, OwnedFd},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use tailback_tests::{lines::unix_ns, sockets};

/// The command line.
#[derive(Default)]
struct Options {
    listen: Option<SocketAddr>,
    backlog: i32,
    reuseport: bool,
    /// Number of processes that share the listener of the first.
    workers: u32,
    /// Whether standard input is the listener.
    inherited: bool,
    /// File with the service time, ms, read for every request.
    pace: Option<String>,
    threads: u32,
    per_s: u32,
    /// Connections that are never accepted.
    waiting: u32,
    sockets: u32,
    /// Unix socket to receive descriptors from, or FIFO to read from.
    from: Option<String>,
}

fn main() -> Result<()> {
    let mut words = env::args().skip(1);
    let role = words.next().context("missing role")?;
    let options = options(words)?;
    match role.as_str() {
        "serve" => serve(&options, respond),
        "take" => serve(&options, |stream, work| {
            thread::sleep(work);
            drop(stream);
        }),
        "drain" => serve(&options, |stream, _| {
            thread::spawn(move || drain(stream));
        }),
        "spin" => spin(options.threads),
        "read-timed" => read_timed(options.from.as_deref().context("--from is missing")?),
        "churn" => churn(options.per_s),
        "park" => crowd::park_with(options.threads),
        "jam" => {
            let address = options.listen.context("--listen is missing")?;
            crowd::jam(address, options.backlog, options.waiting)
        }
        "crowd" => crowd::crowd(options.workers, options.waiting),
        "hold" => crowd::hold(options.sockets),
        "receive" => crowd::receive(
            options.from.as_deref().context("--from is missing")?,
            options.threads,
        ),
        "short-lived" => crowd::short_lived(options.per_s),
        "quit" => Ok(()),
        _ => bail!("unknown role {role}"),
    }
}

fn options(mut words: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        backlog: 100,
        workers: 1,
        ..Options::default()
    };
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .with_context(|| format!("{word} needs a value"))
        };
        match word.as_str() {
            "--listen" => options.listen = Some(value()?.parse()?),
            "--backlog" => options.backlog = value()?.parse()?,
            "--reuseport" => options.reuseport = true,
            "--workers" => options.workers = value()?.parse()?,
            "--inherited" => options.inherited = true,
            "--pace" => options.pace = Some(value()?),
            "--threads" => options.threads = value()?.parse()?,
            "--waiting" => options.waiting = value()?.parse()?,
            "--sockets" => options.sockets = value()?.parse()?,
            "--from" => options.from = Some(value()?),
            "--per-s" => options.per_s = value()?.parse()?,
            _ => bail!("unknown option {word}"),
        }
    }
    Ok(options)
}

/// Reads times (CLOCK_REALTIME, ns) from a FIFO, each written when it is that time. At the end it prints how long the
/// reads were blocked until the write and from then on until they returned: their number, and mean and 99th percentile of both,
/// in ns. Then it waits to be killed.
fn read_timed(from: &str) -> Result<()> {
    println!("reading");
    let mut input = fs::File::open(from).with_context(|| format!("open {from}"))?;
    let (mut blocked, mut woken) = (Vec::new(), Vec::new());
    loop {
        let mut bytes = [0; 8];
        let begun = unix_ns();
        if input.read_exact(&mut bytes).is_err() {
            break;
        }
        let ended = unix_ns();
        let written = u64::from_le_bytes(bytes);
        // Data that was there already did not block.
        if written > begun {
            blocked.push(written - begun);
            woken.push(ended.saturating_sub(written));
        }
    }
    let words = |times: &mut Vec<u64>| {
        times.sort_unstable();
        let rank = (times.len() * 99).div_ceil(100).saturating_sub(1);
        let mean = times.iter().sum::<u64>() / times.len().max(1) as u64;
        format!("{mean} {}", times.get(rank).copied().unwrap_or(0))
    };
    let count = blocked.len();
    println!(
        "times {count} {} {}",
        words(&mut blocked),
        words(&mut woken)
    );
    loop {
        thread::park();
    }
}

/// Accepts connections and runs `work` on each, in as many processes as configured.
fn serve(options: &Options, work: fn(TcpStream, Duration)) -> Result<()> {
    let listener = if options.inherited {
        TcpListener::from(io::stdin().as_fd().try_clone_to_owned()?)
    } else {
        let address = options.listen.context("--listen is missing")?;
        sockets::listen(address, options.backlog, options.reuseport)?
    };
    let mut others: Vec<Child> = Vec::new();
    for _ in 1..options.workers {
        let inherited = OwnedFd::from(listener.try_clone()?);
        let mut args: Vec<String> = env::args().skip(1).take(1).collect();
        args.push("--inherited".to_owned());
        if let Some(pace) = &options.pace {
            args.extend(["--pace".to_owned(), pace.clone()]);
        }
        others.push(
            Command::new(env::current_exe()?)
                .args(args)
                .stdin(Stdio::from(inherited))
                .spawn()?,
        );
    }
    println!("listening {}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept()?;
        let ms = match &options.pace {
            Some(file) => fs::read_to_string(file)?.trim().parse()?,
            None => 0.0,
        };
        work(stream, Duration::from_secs_f64(ms / 1e3));
    }
}

/// Reads a request, works on it, and responds. Ignores errors: the client will notice them.
fn respond(mut stream: TcpStream, work: Duration) {
    let mut request = Vec::new();
    let mut piece = [0; 1024];
    while !request.windows(4).any(|four| four == b"\r\n\r\n") {
        match stream.read(&mut piece) {
            Ok(length) if length > 0 => request.extend_from_slice(&piece[..length]),
            _ => return,
        }
    }
    thread::sleep(work);
    let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nserved\n");
}

/// Reads until end of file.
fn drain(mut stream: TcpStream) {
    let mut piece = [0; 65_536];
    while stream.read(&mut piece).is_ok_and(|length| length > 0) {}
}

/// Busy loops.
fn spin(threads: u32) -> Result<()> {
    for _ in 1..threads {
        thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    println!("spinning");
    loop {
        std::hint::spin_loop();
    }
}

/// Starts short-lived threads, each with its own pipe, connection and listener.
fn churn(per_s: u32) -> Result<()> {
    let gap = Duration::from_secs(1) / per_s.max(1);
    println!("churning");
    let mut due = Instant::now();
    let mut round: u64 = 0;
    loop {
        due += gap;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let started = thread::Builder::new().spawn(|| -> Result<()> {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let (read, mut write) = io::pipe()?;
            write.write_all(b"soon gone")?;
            let mut client = TcpStream::connect(listener.local_addr()?)?;
            client.write_all(b"soon gone")?;
            sockets::reset_on_close(&client)?;
            let (server, _) = listener.accept()?;
            drop((read, write, server, client));
            Ok(())
        })?;
        started.join().ok().context("a thread panicked")??;
        round += 1;
        if round.is_multiple_of(100) {
            println!("{round} rounds");
        }
    }
}
