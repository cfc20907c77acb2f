//! Whose listener is at the other end. The agent sends nothing before it knows: between the scan that found a listener and the
//! connection, another process may have taken its place.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::{self, File},
    io::{BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, openat, readlinkat},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

/// Maximum number of open files of a process that are compared. Listeners are among the first.
const MAX_FILES: usize = 16_384;
/// Maximum number of listeners of the machine that are compared.
const MAX_LISTENERS: usize = 65_536;
/// Maximum number of symbolic links on the way to a socket; the kernel follows 40.
const MAX_LINKS: usize = 8;
/// The first process: its children are not necessarily its workers.
const INIT: u32 = 1;

/// The user of these listeners. Fails unless process `pid` holds one of them.
pub fn holder(pid: u32, listeners: &BTreeMap<u64, u32>) -> Result<u32> {
    let files = fs::read_dir(format!("/proc/{pid}/fd"))
        .with_context(|| format!("cannot read which sockets process {pid} holds"))?;
    let is_held = files.take(MAX_FILES).flatten().any(|file| {
        let link = fs::read_link(file.path()).unwrap_or_default();
        inode(&link.to_string_lossy()).is_some_and(|inode| listeners.contains_key(&inode))
    });
    ensure!(
        is_held,
        "the listener belongs to a process other than {pid}"
    );
    // Sockets of several users share a port only if they are bound to different devices.
    let mut users = listeners.values().copied();
    let user = users.next().unwrap_or(u32::MAX);
    ensure!(
        users.all(|other| other == user),
        "listeners of several users share the port"
    );
    Ok(user)
}

/// Inode and user of the listeners that take connections to `address`, of this network namespace.
pub fn listeners_at(address: SocketAddr) -> Result<BTreeMap<u64, u32>> {
    // A socket for IPv6 also takes connections to IPv4 addresses that no other socket takes.
    let mut users = BTreeMap::new();
    if address.is_ipv4() {
        users = listeners("/proc/self/net/tcp", address)?;
    }
    if users.is_empty() {
        users = listeners("/proc/self/net/tcp6", address)?;
    }
    Ok(users)
}

/// `socket:[4711]`
fn inode(link: &str) -> Option<u64> {
    let inode = link.strip_prefix("socket:[")?.strip_suffix(']')?;
    inode.parse().ok()
}

/// Those in one file of the kernel.
fn listeners(path: &str, address: SocketAddr) -> Result<BTreeMap<u64, u32>> {
    let Ok(file) = File::open(path) else {
        // A kernel without IPv6 has no such file.
        return Ok(BTreeMap::new());
    };
    let mut found = BTreeMap::new();
    for line in BufReader::new(file).lines().skip(1).take(MAX_LISTENERS) {
        let line = line.with_context(|| format!("cannot read {path}"))?;
        // The kernel lists listeners first (tcp_seq_start in net/ipv4/tcp_ipv4.c).
        let Some(listener) = Listed::parse(&line) else {
            break;
        };
        let (ip, port) = (
            listener.address.ip().to_canonical(),
            listener.address.port(),
        );
        if port == address.port() && (ip == address.ip() || ip.is_unspecified()) {
            found.insert(listener.inode, listener.user);
        }
    }
    Ok(found)
}

/// A listener in /proc/net/tcp or /proc/net/tcp6.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    address: SocketAddr,
    user: u32,
    inode: u64,
}

impl Listed {
    /// `None`: it is no listener.
    fn parse(line: &str) -> Option<Self> {
        const LISTEN: &str = "0A";
        let mut words = line.split_ascii_whitespace();
        let (ip, port) = words.nth(1)?.split_once(':')?;
        if words.nth(1)? != LISTEN {
            return None;
        }
        let user = words.nth(3)?.parse().ok()?;
        let inode = words.nth(1)?.parse().ok()?;
        let address = SocketAddr::new(parse_ip(ip)?, u16::from_str_radix(port, 16).ok()?);
        Some(Self {
            address,
            user,
            inode,
        })
    }
}

/// Words of 32 bits, each in the byte order of the machine.
fn parse_ip(text: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = u32::from_str_radix(text.get(at * 8..at * 8 + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    match text.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let mut bytes = [0; 16];
            bytes.copy_from_slice(words.as_flattened());
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

/// Connects to a unix socket of process `pid`, without waiting for room in the accept queue. The process chooses everything below its
/// root directory: no link leads out of it, and the end of the path must be a socket.
pub fn connect_unix(pid: u32, path: &str) -> Result<UnixStream> {
    let found = find_socket(&format!("/proc/{pid}/root"), path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // By its descriptor: nothing can take its place.
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// Opens the socket at `path` below `root`. By names and not by openat2(2), which the agent's filter of system calls forbids.
fn find_socket(root: &str, path: &str) -> Result<OwnedFd> {
    let by_path = OFlags::PATH | OFlags::CLOEXEC;
    let root = openat(CWD, root, by_path | OFlags::DIRECTORY, Mode::empty())?;
    let mut directories = vec![root];
    let mut names = names_of(path);
    let mut links = 0;
    while let Some(name) = names.pop_front() {
        if name == ".." {
            // That of the root is the root.
            if directories.len() > 1 {
                directories.pop();
            }
            continue;
        }
        let directory = directories.last().context("no root directory")?;
        let flags = by_path | OFlags::NOFOLLOW;
        let found = openat(directory, name.as_str(), flags, Mode::empty())?;
        match FileType::from_raw_mode(fstat(&found)?.st_mode) {
            FileType::Directory => directories.push(found),
            FileType::Symlink => {
                links += 1;
                ensure!(links <= MAX_LINKS, "too many symbolic links");
                let target = readlinkat(&found, "", Vec::new())?;
                let target = target.to_str().context("a link is not text")?;
                if target.starts_with('/') {
                    directories.truncate(1);
                }
                let mut all = names_of(target);
                all.append(&mut names);
                names = all;
            }
            FileType::Socket if names.is_empty() => return Ok(found),
            _ => break,
        }
    }
    bail!("it is no socket")
}

fn names_of(path: &str) -> VecDeque<String> {
    let names = path.split('/').filter(|name| !matches!(*name, "" | "."));
    names.map(str::to_owned).collect()
}

/// Fails unless a unix listener belongs to process `pid`, as far as can be known. `holder` is the process that called
/// listen(2) on it, running as `user`; `None`: that process is in another pid namespace.
pub fn check_unix(holder: Option<u32>, user: u32, pid: u32) -> Result<()> {
    let is_trusted = || user == 0 || users(pid).contains(&user);
    match holder {
        Some(holder) if holder == pid => Ok(()),
        // Workers inherit listeners.
        Some(holder) if holder != INIT && parent(pid) == Some(holder) => Ok(()),
        // A daemon listens before it forks: its first process has ended.
        Some(holder) if has_ended(holder) && is_trusted() => Ok(()),
        None if is_trusted() => Ok(()),
        Some(holder) => bail!("it belongs to process {holder}, not to {pid}"),
        None => bail!("it belongs to user {user}, who is not that of process {pid}"),
    }
}

fn has_ended(pid: u32) -> bool {
    !fs::exists(format!("/proc/{pid}")).unwrap_or(true)
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The real, effective and saved user ids of a process; empty if they are unknown.
pub fn users(pid: u32) -> Vec<u32> {
    // Not necessarily UTF-8: it holds the name that the process gave itself, with line ends escaped.
    let status = fs::read(format!("/proc/{pid}/status")).unwrap_or_default();
    let status = String::from_utf8_lossy(&status);
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let ids = ids.unwrap_or_default().split_ascii_whitespace().take(3);
    ids.filter_map(|id| id.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        net::TcpListener,
        os::unix::{fs::symlink, net::UnixListener, process::parent_id},
    };

    use super::*;

    #[test]
    fn a_listener_belongs_to_the_process_that_holds_it() {
        let own = std::process::id();
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                assert_eq!(address, "[::]:0", "only IPv6 may be turned off");
                continue;
            };
            let port = listener.local_addr().unwrap().port();
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let listeners = listeners_at(address).unwrap();
            let user = holder(own, &listeners).unwrap();
            assert!(users(own).contains(&user), "{user}");
            let error = holder(parent_id(), &listeners).unwrap_err();
            assert!(
                error.to_string().contains("a process other than"),
                "{error}"
            );
            // Bound to another device by a user with a lower number.
            let mut shared = listeners.clone();
            shared.insert(u64::MAX, user.wrapping_sub(1));
            let error = holder(own, &shared).unwrap_err();
            assert!(error.to_string().contains("several users"), "{error}");
        }
    }

    #[test]
    fn listeners_of_the_kernel_are_read() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0 100";
        let listed = Listed::parse(line).unwrap();
        assert_eq!((listed.user, listed.inode), (1000, 4711));
        assert_eq!(listed.address.port(), 8080);
        if cfg!(target_endian = "little") {
            assert_eq!(listed.address.ip().to_string(), "127.0.0.1");
        }
        assert_eq!(Listed::parse(&line.replace(" 0A ", " 01 ")), None);
        assert_eq!(Listed::parse(""), None);
        assert_eq!(
            parse_ip(&"0".repeat(32)),
            Some(Ipv6Addr::UNSPECIFIED.into())
        );
    }

    #[test]
    fn no_link_leads_out_of_the_root_directory() {
        let root = std::env::temp_dir().join(format!("tailback-owner-{}", std::process::id()));
        fs::create_dir_all(root.join("run/inner")).unwrap();
        let outside = root.with_extension("sock");
        let _inside = UnixListener::bind(root.join("run/inner/a.sock")).unwrap();
        let _outside = UnixListener::bind(&outside).unwrap();
        symlink("/run", root.join("var")).unwrap();
        symlink("../run/../../../run/inner", root.join("run/up")).unwrap();
        symlink(&outside, root.join("run/away.sock")).unwrap();
        symlink("loop", root.join("run/loop")).unwrap();
        fs::write(root.join("run/file"), "").unwrap();
        let text = root.to_str().unwrap();
        for path in ["/run/inner/a.sock", "/var/inner/a.sock", "/run/up/a.sock"] {
            assert!(find_socket(text, path).is_ok(), "{path}");
        }
        for path in [
            "/run/away.sock",
            "/run/loop",
            "/run/file",
            "/run/file/a",
            "/run",
            "",
        ] {
            assert!(find_socket(text, path).is_err(), "{path}");
        }
        fs::remove_dir_all(&root).unwrap();
        fs::remove_file(&outside).unwrap();
    }

    #[test]
    fn a_unix_socket_belongs_to_its_process_to_a_parent_or_to_a_process_that_has_ended() {
        let (own, parent) = (std::process::id(), parent_id());
        let user = users(own)[0];
        let ended = u32::MAX >> 1;
        assert!(check_unix(Some(own), user, own).is_ok());
        assert_eq!(check_unix(Some(parent), user, own).is_ok(), parent != INIT);
        assert!(check_unix(Some(own), user, parent).is_err());
        assert!(check_unix(Some(ended), user, own).is_ok());
        assert!(check_unix(Some(ended), 4_000_000_000, own).is_err());
        assert!(check_unix(None, 4_000_000_000, own).is_err());
        assert!(check_unix(Some(INIT), 0, own).is_err());
    }
}
