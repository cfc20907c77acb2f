//! Sockets with the settings that the standard library does not offer.

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
    socket_with(family, SocketType::STREAM, flags, None).context("make a socket")
}

/// Listens with this backlog; on `[::]` for IPv4 as well.
pub fn listen(address: SocketAddr, backlog: i32, reuseport: bool) -> Result<TcpListener> {
    listen_with(address, backlog, reuseport, None)
}

/// As [`listen`]; what is accepted has this receive buffer (the kernel doubles it).
pub fn listen_with(
    address: SocketAddr,
    backlog: i32,
    reuseport: bool,
    recv_buffer: Option<usize>,
) -> Result<TcpListener> {
    let told = || format!("listen on {address}");
    let socket = socket(address, SocketFlags::empty())?;
    // For a port of the kernel's choice this would allow it to choose the same one twice.
    set_socket_reuseaddr(&socket, address.port() != 0).with_context(told)?;
    set_socket_reuseport(&socket, reuseport).with_context(told)?;
    if address.is_ipv6() {
        set_ipv6_v6only(&socket, false).with_context(told)?;
    }
    if let Some(bytes) = recv_buffer {
        set_socket_recv_buffer_size(&socket, bytes).with_context(told)?;
    }
    bind(&socket, &address).with_context(told)?;
    listen_on(&socket, backlog).with_context(told)?;
    Ok(TcpListener::from(socket))
}

/// Begins to connect, and does not wait for it.
pub fn begin_connect(to: SocketAddr) -> Result<TcpStream> {
    let socket = socket(to, SocketFlags::NONBLOCK)?;
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(error) => Err(error).with_context(|| format!("connect to {to}")),
    }
}

/// Closed with a reset: no port is left in TIME_WAIT, and what is on its way is dropped.
pub fn reset_on_close(stream: &impl AsFd) -> Result<()> {
    set_socket_linger(stream, Some(Duration::ZERO)).context("set SO_LINGER")
}

/// The longest backlog that this network namespace allows.
pub fn longest_backlog() -> Result<u32> {
    let file = "/proc/sys/net/core/somaxconn";
    let text = fs::read_to_string(file).with_context(|| format!("read {file}"))?;
    text.trim()
        .parse()
        .with_context(|| format!("read {file}: {text:?}"))
}
