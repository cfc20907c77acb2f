//! A link with delay and packet loss: netem on the loopback interface of a new network namespace (rtnetlink(7),
//! tc-netem(8)). Needs no external program.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with},
};

use crate::sys;

/// The loopback interface has index 1 in every namespace.
const LOOPBACK: i32 = 1;
/// As on Ethernet, so that messages are split into segments that can each be lost.
const MTU_BYTES: u32 = 1_500;

/// Enters a network namespace whose loopback delays each packet by `delay` and drops one in `one_in`. Returns the reason
/// where that is not possible.
pub fn lossy(delay: Duration, one_in: u32) -> Result<Option<String>> {
    if let Some(why) = sys::own_network()? {
        return Ok(Some(why));
    }
    set_mtu().context("set the MTU of the loopback interface")?;
    match set_netem(delay, one_in) {
        Ok(()) => Ok(None),
        // ENOENT: no netem; EOPNOTSUPP: no traffic control at all.
        Err(error @ (Errno::NOENT | Errno::OPNOTSUPP)) => {
            Ok(Some(format!("this kernel has no netem: {error}")))
        }
        Err(error) => Err(error).context("add netem to the loopback interface"),
    }
}

fn set_mtu() -> Result<(), Errno> {
    const RTM_SETLINK: u16 = 19;
    const IFLA_MTU: u16 = 4;
    // struct ifinfomsg: family, padding and type; index; flags; change mask.
    let mut body = words(&[0, LOOPBACK as u32, 0, 0]);
    attribute(&mut body, IFLA_MTU, &MTU_BYTES.to_ne_bytes());
    request(RTM_SETLINK, 0, &body)
}

fn set_netem(delay: Duration, one_in: u32) -> Result<(), Errno> {
    const RTM_NEWQDISC: u16 = 36;
    const NLM_F_REPLACE_CREATE: u16 = 0x100 | 0x400;
    const TC_H_ROOT: u32 = u32::MAX;
    const TCA_KIND: u16 = 1;
    const TCA_OPTIONS: u16 = 2;
    const PACKETS: u32 = 10_000;
    // PSCHED_SHIFT (include/net/pkt_sched.h): a tick is 64 ns.
    let ticks = (delay.as_nanos() >> 6) as u32;
    // struct tcmsg: family and padding; index; handle; parent; info.
    let mut body = words(&[0, LOOPBACK as u32, 0, TC_H_ROOT, 0]);
    attribute(&mut body, TCA_KIND, b"netem\0");
    // struct tc_netem_qopt: latency, limit, loss, gap, duplicate, jitter.
    let options = words(&[ticks, PACKETS, u32::MAX / one_in, 0, 0, 0]);
    attribute(&mut body, TCA_OPTIONS, &options);
    request(RTM_NEWQDISC, NLM_F_REPLACE_CREATE, &body)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Appends a netlink attribute: length including its four header bytes, type, value, padding.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = (value.len() + 4) as u16;
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Sends one NETLINK_ROUTE request and returns the kernel's result.
fn request(kind: u16, flags: u16, body: &[u8]) -> Result<(), Errno> {
    const NLM_F_REQUEST_ACK: u16 = 0x1 | 0x4;
    const NLMSG_ERROR: u16 = 2;
    // Protocol 0 is NETLINK_ROUTE.
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // struct nlmsghdr: length, type and flags, number, sender.
    let mut message = words(&[(body.len() + 16) as u32]);
    message.extend(kind.to_ne_bytes());
    message.extend((flags | NLM_F_REQUEST_ACK).to_ne_bytes());
    message.extend(words(&[1, 0]));
    message.extend(body);
    send(&socket, &message, SendFlags::empty())?;
    let mut answer = [0; 4096];
    let (length, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    // struct nlmsgerr begins with 0 or the negative errno.
    let answer = &answer[..length];
    match answer.get(4..6).zip(answer.get(16..20)) {
        Some((kind, error)) if kind == NLMSG_ERROR.to_ne_bytes() => {
            match i32::from_ne_bytes([error[0], error[1], error[2], error[3]]) {
                0 => Ok(()),
                error => Err(Errno::from_raw_os_error(-error)),
            }
        }
        _ => Err(Errno::BADMSG),
    }
}

/// Retransmitted segments in this namespace (Tcp RetransSegs).
pub fn retransmissions() -> Result<f64> {
    sys::network_counter("Tcp:", "RetransSegs")
}
