//! Fields that all sockets share.

use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_sock_from_file};

use tailback_ebpf::ABSENT;

use crate::kernel::{has_helper, load, load_sk, offset, probe, probe_at, read_sk, read_sk_or};

/// include/linux/socket.h
pub const AF_UNIX: u16 = 1;
pub const AF_INET: u16 = 2;
pub const AF_INET6: u16 = 10;
/// include/uapi/linux/in.h
pub const IPPROTO_TCP: u16 = 6;
pub const IPPROTO_UDP: u16 = 17;
pub const IPPROTO_MPTCP: u16 = 262;
/// include/linux/net.h
pub const SOCK_STREAM: u16 = 1;
pub const SOCK_DGRAM: u16 = 2;
/// include/uapi/linux/stat.h
const S_IFMT: u16 = 0o170_000;
const S_IFSOCK: u16 = 0o140_000;

/// `struct sock *`, typed if the kernel has typed sockets.
#[derive(Clone, Copy)]
pub struct Sock {
    pub sk: *const u8,
    /// The socket whose cookie identifies this one.
    cookie_of: *const u8,
    /// Whether the verifier knows the type of `sk`. Constant wherever it is tested, so one branch remains.
    pub is_typed: bool,
    /// Whether helpers accept `cookie_of` (a trusted pointer). Constant likewise.
    is_trusted: bool,
}

impl Sock {
    /// A socket that the kernel passed to the program.
    #[inline(always)]
    pub fn new(sk: *const u8) -> Self {
        Self {
            sk,
            cookie_of: sk,
            is_typed: true,
            is_trusted: true,
        }
    }

    /// A plain address, cast. Helpers reject it, so no cookie can be assigned: it must have one already.
    #[inline(always)]
    pub fn cast(sk: *const u8) -> Self {
        Self {
            is_trusted: false,
            ..Self::new(sk)
        }
    }

    /// A socket reached through another one. The verifier does not know its type; it is identified by the cookie of the
    /// outer one.
    #[inline(always)]
    pub fn inner(sk: *const u8, outer: Self) -> Self {
        Self {
            sk,
            cookie_of: outer.sk,
            is_typed: false,
            is_trusted: outer.is_trusted,
        }
    }

    /// The socket behind a file.
    #[inline(always)]
    pub fn of(file: *const u8) -> Option<Self> {
        let sk = if has_helper!(typed_sockets) {
            // SAFETY: `file` is a typed kernel pointer; the helper returns null if it is not a socket.
            let socket = unsafe { bpf_sock_from_file(file.cast_mut().cast()) }.cast::<u8>();
            if socket.is_null() {
                return None;
            }
            load!(socket, socket_sk, *const u8)
        } else {
            // The private data of a socket's file points to the `struct socket`.
            let inode = load!(file, file_inode, *const u8);
            if load!(inode, inode_mode, u16) & S_IFMT != S_IFSOCK {
                return None;
            }
            let socket = load!(file, file_private_data, u64);
            probe!(socket as *const u8, socket_sk, *const u8)
        };
        if sk.is_null() {
            None
        } else {
            Some(Self::new(sk))
        }
    }

    #[inline(always)]
    pub fn family(&self) -> u16 {
        read_sk!(self, self.sk, sk_family, u16)
    }

    #[inline(always)]
    pub fn state(&self) -> u8 {
        read_sk!(self, self.sk, sk_state, u8)
    }

    /// Whether it is an Internet socket of this type and protocol (MPTCP is not TCP).
    #[inline(always)]
    pub fn is(&self, family: u16, style: u16, protocol: u16) -> bool {
        (family == AF_INET || family == AF_INET6)
            && read_sk!(self, self.sk, sk_protocol, u16) == protocol
            && read_sk!(self, self.sk, sk_type, u16) == style
    }

    /// Identifies the socket until reboot. On kernels that cannot assign a cookie this may be its address, which is unique
    /// only during the lifetime of the socket.
    #[inline(always)]
    pub fn cookie(&self) -> u64 {
        match load_sk!(self.cookie_of, sk_cookie, u64) {
            0 if has_helper!(cookies) && self.is_trusted => {
                // No cookie yet: have the kernel assign one.
                // SAFETY: a typed, non-null kernel pointer.
                unsafe { bpf_get_socket_cookie(self.cookie_of.cast_mut().cast()) }
            }
            0 => self.cookie_of as u64,
            cookie => cookie,
        }
    }

    #[inline(always)]
    pub fn netns(&self) -> u32 {
        let net = read_sk!(self, self.sk, sk_net, *const u8);
        read_sk!(self, net, net_inum, u32)
    }

    #[inline(always)]
    pub fn local(&self, family: u16) -> [u8; 16] {
        if family == AF_INET {
            ipv4(read_sk!(self, self.sk, sk_rcv_saddr, u32))
        } else {
            ipv6(read_sk_or!(
                self,
                self.sk,
                sk_v6_rcv_saddr,
                [u64; 2],
                [0; 2]
            ))
        }
    }

    #[inline(always)]
    pub fn remote(&self, family: u16) -> [u8; 16] {
        if family == AF_INET {
            ipv4(read_sk!(self, self.sk, sk_daddr, u32))
        } else {
            ipv6(read_sk_or!(self, self.sk, sk_v6_daddr, [u64; 2], [0; 2]))
        }
    }
}

#[inline(always)]
fn ipv4(address: u32) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&address.to_ne_bytes());
    out
}

#[inline(always)]
fn ipv6(words: [u64; 2]) -> [u8; 16] {
    let mut out = [0; 16];
    out[..8].copy_from_slice(&words[0].to_ne_bytes());
    out[8..].copy_from_slice(&words[1].to_ne_bytes());
    out
}

/// Fingerprints a packet by its address, length, timestamp and first 16 bytes. The address alone is not enough: it is
/// reused as soon as the packet is read. The bytes are mixed into one number and leave the kernel in no other form.
#[inline(always)]
pub fn packet_fingerprint(skb: u64) -> u64 {
    /// 2^64 divided by the golden ratio: the multiplier of Fibonacci hashing.
    const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
    if skb == 0 || offset!(skb_data) == ABSENT {
        return skb;
    }
    let skb_at = skb as *const u8;
    let [first, second] = probe_at::<[u64; 2]>(probe!(skb_at, skb_data, *const u8), 0);
    let len = u64::from(probe!(skb_at, skb_len, u32));
    let timestamp = probe!(skb_at, skb_tstamp, u64);
    let begins = (first ^ timestamp).wrapping_mul(MIX) ^ second.rotate_left(32).wrapping_mul(MIX);
    skb ^ begins ^ len << 40
}
