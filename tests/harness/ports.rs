//! Free TCP ports.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, bail};

/// Ports that this process has handed out.
static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
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
        if given.contains(&port) {
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
