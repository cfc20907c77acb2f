//! System calls that neither the standard library nor rustix offers.

use std::{
    ffi::c_int,
    fs,
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsFd, AsRawFd as _},
};

use anyhow::{Context as _, Result};
use rustix::{
    io::Errno,
    ioctl::{Getter, Opcode, Setter, ioctl},
    thread::{UnshareFlags, unshare_unsafe},
};

/// Bytes in the send queue (SIOCOUTQ, sockios.h): for TCP unacknowledged bytes, for unix sockets the memory of unread
/// ones.
pub fn outgoing(socket: &impl AsFd) -> Result<f64> {
    const SIOCOUTQ: Opcode = 0x5411;
    // SAFETY: SIOCOUTQ writes one int (tcp(7), unix(7)).
    let bytes = unsafe { ioctl(socket, Getter::<SIOCOUTQ, c_int>::new()) }.context("SIOCOUTQ")?;
    Ok(f64::from(bytes))
}

/// Bytes that can be read.
pub fn readable(file: &impl AsFd) -> Result<f64> {
    Ok(rustix::io::ioctl_fionread(file).context("FIONREAD")? as f64)
}

/// Part of SO_MEMINFO (include/uapi/linux/sock_diag.h).
pub struct Memory {
    pub received: u32,
    pub drops: u32,
}

/// SO_MEMINFO (Linux 4.12).
pub fn memory(socket: &impl AsFd) -> Result<Memory> {
    const SO_MEMINFO: c_int = 55;
    let mut account = [0_u32; 9];
    let mut len = size_of_val(&account) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `account`, its size, and the length to `len`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_MEMINFO,
            account.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    succeeded(done).context("SO_MEMINFO")?;
    let [received, .., drops] = account;
    Ok(Memory { received, drops })
}

/// Attaches a filter that drops all input, so that the socket neither answers nor resets.
pub fn drop_all_input(socket: &impl AsFd) -> Result<()> {
    // BPF_RET | BPF_K, 0 bytes.
    let mut code = [libc::sock_filter {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: 0,
    }];
    let program = libc::sock_fprog {
        len: 1,
        filter: code.as_mut_ptr(),
    };
    // SAFETY: the kernel reads a sock_fprog and its one instruction; both live until the call returns.
    let done = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    succeeded(done).context("SO_ATTACH_FILTER")
}

/// setsockopt(2) for an option whose value contains no pointers.
pub fn set_option(
    socket: &impl AsFd,
    level: c_int,
    option: c_int,
    value: &[u8],
) -> std::io::Result<()> {
    // SAFETY: the kernel reads the bytes of `value`, which lives until the call returns.
    let done = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if done < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

fn succeeded(returned: c_int) -> Result<()> {
    if returned < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

/// The part of `struct ifreq` (<net/if.h>) that is used here; the kernel reads 40 bytes.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// Enters a new network namespace with a loopback interface, whose counters and settings no other process shares. Call
/// before starting threads. Returns the reason where that is not possible.
pub fn own_network() -> Result<Option<String>> {
    const SIOCSIFFLAGS: Opcode = 0x8914;
    // SAFETY: this process has no sockets that depend on the old namespace.
    match unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
        Ok(()) => {}
        Err(error @ (Errno::PERM | Errno::INVAL | Errno::NOSYS)) => {
            return Ok(Some(format!("cannot create a network namespace: {error}")));
        }
        Err(error) => return Err(error).context("create a network namespace"),
    }
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("open a socket")?;
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: libc::IFF_UP as libc::c_short,
        rest: [0; 22],
    };
    request.name[..2].copy_from_slice(b"lo");
    // SAFETY: SIOCSIFFLAGS only reads a struct ifreq (netdevice(7)), which `request` matches in size and layout.
    unsafe {
        ioctl(
            &socket,
            Setter::<SIOCSIFFLAGS, InterfaceRequest>::new(request),
        )
    }
    .context("bring the loopback interface up")?;
    Ok(None)
}

/// A counter of our network namespace, for example `TcpExt`, `ListenOverflows`.
pub fn network_counter(group: &str, name: &str) -> Result<f64> {
    const FILES: [&str; 2] = ["/proc/self/net/netstat", "/proc/self/net/snmp"];
    let mut text = String::new();
    for file in FILES {
        text += &fs::read_to_string(file).with_context(|| format!("read {file}"))?;
    }
    let mut lines = text.lines().filter(|line| line.starts_with(group));
    let (names, values) = (
        lines.next().unwrap_or_default(),
        lines.next().unwrap_or_default(),
    );
    let mut columns = names.split_whitespace().zip(values.split_whitespace());
    columns
        .find_map(|(column, value)| (column == name).then(|| value.parse().ok())?)
        .with_context(|| format!("neither of {FILES:?} has {name}"))
}

/// The number that is the whole content of a file of /proc or of a cgroup.
pub fn number_in(file: impl AsRef<std::path::Path>) -> Result<f64> {
    let file = file.as_ref();
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let text = text.trim();
    text.parse()
        .with_context(|| format!("{} holds {text:?}", file.display()))
}
