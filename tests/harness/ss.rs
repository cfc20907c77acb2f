//! Accept queues as `ss` reports them: a truth independent of the agent.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result};

use crate::{network::Network, program, wait};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);

/// A listening TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    pub port: u16,
    /// Recv-Q: connections waiting to be accepted.
    pub waiting: u64,
    /// Send-Q: the backlog.
    pub backlog: u64,
}

/// All listeners of a network namespace, else of ours.
pub fn listeners(network: Option<&Network>) -> Result<Vec<Listener>> {
    let mut command = match network {
        Some(network) => network.command("ss")?,
        None => Command::new(program::need(&["ss"])?),
    };
    let output = command
        .args(["--listening", "--tcp", "--numeric", "--no-header"])
        .output()
        .context("run ss")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .map(|line| parse(line).with_context(|| format!("parse the line of ss {line:?}")))
        .collect()
}

/// `LISTEN 3 100 127.0.0.1:8080 0.0.0.0:*`
fn parse(line: &str) -> Option<Listener> {
    let mut words = line.split_whitespace().skip(1);
    Some(Listener {
        waiting: words.next()?.parse().ok()?,
        backlog: words.next()?.parse().ok()?,
        port: words.next()?.rsplit(':').next()?.parse().ok()?,
    })
}

/// Waiting connections and backlog of a port, summed over its sockets.
pub fn sums(network: Option<&Network>, port: u16) -> Result<(u64, u64)> {
    let of_port = listeners(network)?
        .into_iter()
        .filter(|listener| listener.port == port);
    let sums = of_port.map(|listener| (listener.waiting, listener.backlog));
    sums.reduce(|a, b| (a.0 + b.0, a.1 + b.1))
        .with_context(|| format!("no listener on port {port}"))
}

/// Waits until `wanted` holds for the number of waiting connections of a port, and returns that number.
pub fn wait_for(
    network: Option<&Network>,
    port: u16,
    what: &str,
    wanted: impl Fn(u64) -> bool,
) -> Result<u64> {
    wait::until(
        &format!("{what} on port {port}, according to ss"),
        DEADLINE,
        || {
            let (waiting, _) = sums(network, port)?;
            Ok(wanted(waiting).then_some(waiting))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::{Listener, parse};

    #[test]
    fn rows_with_any_address_family_are_parsed() {
        for address in ["127.0.0.1:8080", "[::1]:8080", "*:8080"] {
            assert_eq!(
                parse(&format!("LISTEN 3   100      {address}   0.0.0.0:*  ")),
                Some(Listener {
                    port: 8080,
                    waiting: 3,
                    backlog: 100
                })
            );
        }
        assert_eq!(parse("Netid State"), None);
    }
}
