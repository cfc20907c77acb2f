//! A link that delays and loses: the loopback interface of a network namespace of our own, with netem (rtnetlink(7),
//! tc-netem(8)). No other program is needed for it.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with},
};

use crate::sys;

/// A loopback interface is the first of its namespace.
const LOOPBACK: i32 = 1;
/// As on Ethernet: a message is sent in parts, each of which can be lost.
const MTU_BYTES: u32 = 1_500;

/// Moves to a network namespace in which each packet takes `delay`, and one in `one_in` is lost. Answers why not, where
/// it cannot be.
pub fn lossy(delay: Duration, one_in: u32) -> Result<Option<String>> {
    if let Some(why) = sys::own_network()? {
        return Ok(Some(why));
    }
    set_mtu().context("set the MTU of the loopback interface")?;
    match set_netem(delay, one_in) {
        Ok(()) => Ok(None),
        // No such qdisc; no qdiscs at all.
        Err(error @ (Errno::NOENT | Errno::OPNOTSUPP)) => {
            Ok(Some(format!("this kernel has no netem: {error}")))
        }
        Err(error) => Err(error).context("make the loopback interface lose packets"),
    }
}

fn set_mtu() -> Result<(), Errno> {
    const RTM_SETLINK: u16 = 19;
    const IFLA_MTU: u16 = 4;
    // struct ifinfomsg: family, padding and type; index; flags, and which of them change.
    let mut body = words(&[0, LOOPBACK as u32, 0, 0]);
    attribute(&mut body, IFLA_MTU, &MTU_BYTES.to_ne_bytes());
    ask(RTM_SETLINK, 0, &body)
}

fn set_netem(delay: Duration, one_in: u32) -> Result<(), Errno> {
    const RTM_NEWQDISC: u16 = 36;
    const NLM_F_REPLACE_CREATE: u16 = 0x100 | 0x400;
    const TC_H_ROOT: u32 = u32::MAX;
    const TCA_KIND: u16 = 1;
    const TCA_OPTIONS: u16 = 2;
    const PACKETS: u32 = 10_000;
    // PSCHED_SHIFT (include/net/pkt_sched.h): a tick has 64 ns.
    let ticks = (delay.as_nanos() >> 6) as u32;
    // struct tcmsg: family and padding; index; handle; parent; info.
    let mut body = words(&[0, LOOPBACK as u32, 0, TC_H_ROOT, 0]);
    attribute(&mut body, TCA_KIND, b"netem\0");
    // struct tc_netem_qopt: latency, limit, loss, gap, duplicate, jitter.
    let options = words(&[ticks, PACKETS, u32::MAX / one_in, 0, 0, 0]);
    attribute(&mut body, TCA_OPTIONS, &options);
    ask(RTM_NEWQDISC, NLM_F_REPLACE_CREATE, &body)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Length with its own four bytes, type, value, padding.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = (value.len() + 4) as u16;
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Sends one request of NETLINK_ROUTE, and answers the kernel's verdict.
fn ask(kind: u16, flags: u16, body: &[u8]) -> Result<(), Errno> {
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
    // struct nlmsgerr begins with the error, negative, or zero.
    let answer = &answer[..length];
    let told = answer.get(4..6).zip(answer.get(16..20));
    match told {
        Some((kind, error)) if kind == NLMSG_ERROR.to_ne_bytes() => {
            match i32::from_ne_bytes([error[0], error[1], error[2], error[3]]) {
                0 => Ok(()),
                error => Err(Errno::from_raw_os_error(-error)),
            }
        }
        _ => Err(Errno::BADMSG),
    }
}

/// Segments that were sent again in this namespace.
pub fn sent_again() -> Result<f64> {
    sys::network_counter("Tcp:", "RetransSegs")
}
