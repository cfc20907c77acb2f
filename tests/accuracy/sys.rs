//! What neither the standard library nor rustix offers.

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

/// Bytes written to a socket and not gone from its queue: for TCP not acknowledged, for unix not read, as memory
/// (SIOCOUTQ, sockios.h).
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

/// A socket's own account (include/uapi/linux/sock_diag.h).
pub struct Memory {
    pub received: u32,
    pub drops: u32,
}

/// SO_MEMINFO (Linux 4.12).
pub fn memory(socket: &impl AsFd) -> Result<Memory> {
    const SO_MEMINFO: c_int = 55;
    let mut account = [0_u32; 9];
    let mut len = size_of_val(&account) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `account`, which has as many, and the length to `len`.
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

/// All that is sent to this socket is dropped, unseen: a caller that is silent for good, and no reset either.
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
    // SAFETY: the kernel reads a sock_fprog and the one instruction that it points to; both live until it returns.
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

/// setsockopt(2), for an option whose value holds no pointers.
pub fn set_option(
    socket: &impl AsFd,
    level: c_int,
    option: c_int,
    value: &[u8],
) -> std::io::Result<()> {
    // SAFETY: the kernel reads the bytes of `value`, which lives until it returns.
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

/// `struct ifreq` of <net/if.h>, as far as it is used here; the kernel reads 40 bytes of it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// Moves to a network namespace of our own, with a loopback interface: nobody else's connections are counted there,
/// and its settings are ours. To be called before there are threads. Answers why not, where it cannot be.
pub fn own_network() -> Result<Option<String>> {
    const SIOCSIFFLAGS: Opcode = 0x8914;
    // SAFETY: a new network namespace takes nothing from this process that it relies on.
    match unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
        Ok(()) => {}
        Err(error @ (Errno::PERM | Errno::INVAL | Errno::NOSYS)) => {
            return Ok(Some(format!("no network namespace can be made: {error}")));
        }
        Err(error) => return Err(error).context("make a network namespace"),
    }
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("open a socket")?;
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: libc::IFF_UP as libc::c_short,
        rest: [0; 22],
    };
    request.name[..2].copy_from_slice(b"lo");
    // SAFETY: SIOCSIFFLAGS reads a struct ifreq and writes nothing to it (netdevice(7)); the one given has its
    // size and layout.
    unsafe {
        ioctl(
            &socket,
            Setter::<SIOCSIFFLAGS, InterfaceRequest>::new(request),
        )
    }
    .context("bring the loopback interface up")?;
    Ok(None)
}

/// A counter of our network namespace: `TcpExt`, `ListenOverflows`.
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

/// A number that a file of /proc or of a control group holds alone.
pub fn number_in(file: impl AsRef<std::path::Path>) -> Result<f64> {
    let file = file.as_ref();
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let text = text.trim();
    text.parse()
        .with_context(|| format!("{} holds {text:?}", file.display()))
}
