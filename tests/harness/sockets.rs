//! Sockets with options that the standard library does not offer.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketFlags, SocketType, bind, connect, listen as listen_on, socket_with,
        sockopt::{
            set_ipv6_v6only, set_socket_linger, set_socket_recv_buffer_size, set_socket_reuseaddr,
            set_socket_reuseport,
        },
    },
};

fn socket(address: SocketAddr, flags: SocketFlags) -> Result<rustix::fd::OwnedFd> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = flags | SocketFlags::CLOEXEC;
    socket_with(family, SocketType::STREAM, flags, None).context("create a socket")
}

/// Listens with this backlog. `[::]` accepts IPv4 too.
pub fn listen(address: SocketAddr, backlog: i32, reuseport: bool) -> Result<TcpListener> {
    listen_with(address, backlog, reuseport, None)
}

/// Like [`listen`]; accepted connections have this SO_RCVBUF, bytes (the kernel doubles it).
pub fn listen_with(
    address: SocketAddr,
    backlog: i32,
    reuseport: bool,
    recv_buffer: Option<usize>,
) -> Result<TcpListener> {
    let context = || format!("listen on {address}");
    let socket = socket(address, SocketFlags::empty())?;
    // Not for port 0: with SO_REUSEADDR the kernel might pick the same port twice.
    set_socket_reuseaddr(&socket, address.port() != 0).with_context(context)?;
    set_socket_reuseport(&socket, reuseport).with_context(context)?;
    if address.is_ipv6() {
        set_ipv6_v6only(&socket, false).with_context(context)?;
    }
    if let Some(bytes) = recv_buffer {
        set_socket_recv_buffer_size(&socket, bytes).with_context(context)?;
    }
    bind(&socket, &address).with_context(context)?;
    listen_on(&socket, backlog).with_context(context)?;
    Ok(TcpListener::from(socket))
}

/// Starts connecting without waiting for the handshake.
pub fn begin_connect(to: SocketAddr) -> Result<TcpStream> {
    let socket = socket(to, SocketFlags::NONBLOCK)?;
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(error) => Err(error).with_context(|| format!("connect to {to}")),
    }
}

/// Makes close(2) send a reset: no TIME_WAIT is left, and data in transit is dropped.
pub fn reset_on_close(stream: &impl AsFd) -> Result<()> {
    set_socket_linger(stream, Some(Duration::ZERO)).context("set SO_LINGER")
}

/// Maximum backlog of this network namespace (net.core.somaxconn).
pub fn longest_backlog() -> Result<u32> {
    let file = "/proc/sys/net/core/somaxconn";
    let text = fs::read_to_string(file).with_context(|| format!("read {file}"))?;
    text.trim()
        .parse()
        .with_context(|| format!("read {file}: {text:?}"))
}
