//! Free TCP ports.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr as UnixAddress, UnixListener},
    },
    process,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, bail};

/// Ports that this process has handed out.
static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
/// Blocks of ports that no other test process hands out, each with the socket that claims it.
static CLAIMS: Mutex<BTreeMap<u16, UnixListener>> = Mutex::new(BTreeMap::new());
/// Number of ports in a block.
const BLOCK: u16 = 16;
/// Lower ports belong to well-known services.
const FIRST: u16 = 10_000;
/// Distance between the start ports of processes with adjacent pids, so that concurrent processes find different ports.
const PID_STRIDE: usize = 101;

/// Returns a TCP port that is free on the loopback address and that this process has not handed out before. It lies below
/// the ephemeral port range, so the kernel does not assign it to anyone before it is used.
pub fn free() -> Result<u16> {
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let count = usize::from(first_ephemeral()?.saturating_sub(FIRST));
    let start = process::id() as usize * PID_STRIDE;
    for number in 0..count {
        let port = FIRST + ((start + number) % count) as u16;
        if given.contains(&port) || !is_ours(port) {
            continue;
        }
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(_) => {
                given.insert(port);
                return Ok(port);
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).with_context(|| format!("try port {port}")),
        }
    }
    bail!("none of the {count} ports from {FIRST} up to the ephemeral range is free")
}

/// Whether this process has the block of this port, or can claim it: by a socket with the name of the block, which is free again
/// when this process ends. A port may be bound seconds after it was handed out, and many tests run at the same time.
fn is_ours(port: u16) -> bool {
    let mut claims = CLAIMS.lock().unwrap_or_else(PoisonError::into_inner);
    let block = port / BLOCK;
    if let Entry::Vacant(vacant) = claims.entry(block) {
        let name = UnixAddress::from_abstract_name(format!("tailback-test-ports-{block}"));
        let Ok(claim) = name.and_then(|name| UnixListener::bind_addr(&name)) else {
            return false;
        };
        vacant.insert(claim);
    }
    true
}

/// First port of the ephemeral range.
fn first_ephemeral() -> Result<u16> {
    let file = "/proc/sys/net/ipv4/ip_local_port_range";
    let range = fs::read_to_string(file).with_context(|| format!("read {file}"))?;
    let first = range.split_whitespace().next().unwrap_or_default();
    first
        .parse()
        .with_context(|| format!("{file} holds {range:?}"))
}

/// `127.0.0.1:port`.
pub fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_port_is_handed_out_once_and_is_not_ephemeral() {
        let ports: Vec<u16> = (0..200).map(|_| free().unwrap()).collect();
        assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), ports.len());
        let ephemeral = first_ephemeral().unwrap();
        assert!(ports.iter().all(|port| *port < ephemeral), "{ports:?}");
    }
}
