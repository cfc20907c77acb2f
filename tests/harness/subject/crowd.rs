//! Roles that never serve a request: many services, holders of sockets, receivers of descriptors, short-lived processes.

use std::{
    env,
    io::IoSliceMut,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg, sockopt::socket_acceptconn,
};
use tailback_tests::{idle::raise_file_limit, sockets};

/// Maximum number of descriptors received over a unix socket.
const MAX_RECEIVED: usize = 8;

/// Sleeps forever.
fn park() -> Result<()> {
    loop {
        thread::park();
    }
}

/// Sleeps with this many threads, including the first.
pub fn park_with(threads: u32) -> Result<()> {
    for _ in 1..threads {
        thread::Builder::new().stack_size(64 * 1024).spawn(park)?;
    }
    println!("parked");
    park()
}

/// Listens and never accepts the `waiting` connections that it opens to itself.
pub fn jam(address: SocketAddr, backlog: i32, waiting: u32) -> Result<()> {
    let listener = sockets::listen(address, backlog, false)?;
    let address = listener.local_addr()?;
    let clients: Vec<TcpStream> = (0..waiting)
        .map(|_| TcpStream::connect(address).with_context(|| format!("connect to {address}")))
        .collect::<Result<_>>()?;
    println!("listening {address}");
    let kept = park();
    drop((listener, clients));
    kept
}

/// Starts `count` processes, each with its own [`jam`].
pub fn crowd(count: u32, waiting: u32) -> Result<()> {
    let waiting = waiting.to_string();
    let mut all: Vec<Child> = Vec::new();
    for _ in 0..count {
        let mut one = Command::new(env::current_exe()?);
        all.push(
            one.args(["jam", "--listen", "127.0.0.1:0", "--waiting", &waiting])
                .spawn()?,
        );
    }
    println!("{} started", all.len());
    park()
}

/// Holds this many sockets: both ends of connections to its own listener.
pub fn hold(sockets: u32) -> Result<()> {
    raise_file_limit(sockets as usize + 100)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut held = Vec::new();
    while held.len() < sockets as usize {
        let client = TcpStream::connect(address)?;
        let (server, _) = listener.accept()?;
        // Thousands of ports in TIME_WAIT would disturb later tests.
        sockets::reset_on_close(&client)?;
        sockets::reset_on_close(&server)?;
        held.extend([client, server]);
    }
    println!("listening {address}");
    let kept = park();
    drop(held);
    kept
}

/// Receives descriptors over a unix socket and holds them.
pub fn receive(from: &str, threads: u32) -> Result<()> {
    let sender = UnixStream::connect(from).with_context(|| format!("connect to {from}"))?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_RECEIVED))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(
        &sender,
        &mut [IoSliceMut::new(&mut byte)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut received: Vec<OwnedFd> = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            received.extend(files);
        }
    }
    let listeners = received
        .iter()
        .filter(|file| socket_acceptconn(file.as_fd()).unwrap_or(false));
    println!("received {} of {}", listeners.count(), received.len());
    let kept = park_with(threads);
    drop(received);
    kept
}

/// Starts processes that exit at once, `per_s` per second.
pub fn short_lived(per_s: u32) -> Result<()> {
    let gap = Duration::from_secs(1) / per_s.max(1);
    let program = env::current_exe()?;
    println!("spawning");
    let (mut due, mut count) = (Instant::now(), 0_u64);
    loop {
        due += gap;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        Command::new(&program).arg("quit").status()?;
        count += 1;
        if count.is_multiple_of(100) {
            println!("{count} died");
        }
    }
}
