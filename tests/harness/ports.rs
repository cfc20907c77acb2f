//! Ports that nobody uses.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, bail};

static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
/// Below are those of well-known services.
const FIRST: u16 = 10_000;
/// Processes begin so far apart: those that look at the same time are not given the same.
const APART: usize = 101;

/// A TCP port on which nobody listens on the loopback address, and which this process has not been given before. The kernel
/// gives it to nobody who asks for any port, or connects from any, so that it is still free when it is used.
pub fn free() -> Result<u16> {
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let count = usize::from(first_of_the_kernel()?.saturating_sub(FIRST));
    let start = process::id() as usize * APART;
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
    bail!("none of the {count} ports from {FIRST} that the kernel does not give by itself is free")
}

/// From here on the kernel gives ports by itself.
fn first_of_the_kernel() -> Result<u16> {
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
    fn a_free_port_is_given_once_and_is_none_that_the_kernel_gives() {
        let ports: Vec<u16> = (0..200).map(|_| free().unwrap()).collect();
        assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), ports.len());
        let kernels = first_of_the_kernel().unwrap();
        assert!(ports.iter().all(|port| *port < kernels), "{ports:?}");
    }
}
