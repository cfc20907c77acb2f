//! TCP connections with kernel TLS (Documentation/networking/tls.rst).
//!
//! The agent counts bytes on the wire, as TCP does. Each record of up to 16,384 plain bytes adds 29 bytes, so a queue of
//! full records appears 0.2% deeper than its plain bytes, and one of 1,000-byte records 3%.

use std::{
    ffi::c_int,
    io::{ErrorKind, Write as _},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::lines::unix_ns;

use crate::{
    report::Report,
    sampling::{self, SETTLED_NS, compare_steady},
    stream::Pair,
    sys,
};

const TLS_TX: c_int = 1;
const TLS_RX: c_int = 2;
/// Plain bytes of the largest TLS record (RFC 5246).
const RECORD: usize = 16_384;
/// Bytes that each record adds: header, explicit nonce, tag.
const RECORD_OVERHEAD: usize = 5 + 8 + 16;

/// struct tls12_crypto_info_aes_gcm_128 (include/uapi/linux/tls.h).
#[repr(C)]
struct Keys {
    version: u16,
    cipher: u16,
    iv: [u8; 8],
    key: [u8; 16],
    salt: [u8; 4],
    record: [u8; 8],
}

/// TLS 1.2 with AES-GCM-128. Both ends use the same keys, as after a handshake.
static KEYS: Keys = Keys {
    version: 0x0303,
    cipher: 51,
    iv: [1; 8],
    key: [2; 16],
    salt: [3; 4],
    record: [0; 8],
};

/// Enables kernel TLS on one end. Returns the reason where the kernel does not support it.
fn enable_ktls(stream: &TcpStream, direction: c_int) -> Result<Option<String>> {
    const SOL_TLS: c_int = 282;
    match sys::set_option(stream, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls") {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Ok(Some(format!("this kernel has no TLS: {error}")));
        }
        Err(error) => return Err(error).context("set TCP_ULP"),
    }
    // SAFETY: `Keys` is plain bytes without padding, as the assertion checks, and lives as long as the slice.
    let keys = unsafe {
        const { assert!(size_of::<Keys>() == 2 + 2 + 8 + 16 + 4 + 8) };
        std::slice::from_raw_parts((&raw const KEYS).cast::<u8>(), size_of::<Keys>())
    };
    let done = sys::set_option(stream, SOL_TLS, direction, keys);
    done.context("set the TLS keys of a connection")?;
    Ok(None)
}

/// Unread bytes, in records of the largest size and in small ones.
pub fn measure_recv(report: &mut Report) -> Result<()> {
    for (records, bytes) in [(3, RECORD), (40, 1_000)] {
        let mut pair = Pair::new()?;
        for (end, direction) in [(&pair.client, TLS_TX), (&pair.server, TLS_RX)] {
            if let Some(why) = enable_ktls(end, direction)? {
                report.skip(&why, |quantity| quantity == "ktls depth");
                return Ok(());
            }
        }
        let since_ns = unix_ns();
        for _ in 0..records {
            pair.client.write_all(&vec![0; bytes]).context("write")?;
        }
        let samples = sampling::steady(Duration::from_millis(1500))?;
        let queue = samples.queue("recv", |name| name == pair.name);
        let keys = [("ktls depth", "depth", (records * bytes) as f64)];
        compare_steady(report, &queue, since_ns + SETTLED_NS, &keys);
    }
    Ok(())
}

/// Fills the send queue of a peer that does not read. Bytes that arrived there have left the send queue; the peer, without
/// kernel TLS, counts them as bytes on the wire.
pub fn measure_send(report: &mut Report) -> Result<()> {
    let mut pair = Pair::new()?;
    if let Some(why) = enable_ktls(&pair.server, TLS_TX)? {
        report.skip(&why, |quantity| quantity == "ktls depth");
        return Ok(());
    }
    pair.server
        .set_nonblocking(true)
        .context("set O_NONBLOCK")?;
    let (mut written, mut arrived) = (0, 0.0);
    let mut quiet = Instant::now();
    while quiet.elapsed() < Duration::from_millis(500) {
        match pair.server.write(&[0; RECORD]) {
            Ok(bytes) => written += bytes,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error).context("write"),
        }
        let before = std::mem::replace(&mut arrived, sys::readable(&pair.client)?);
        if arrived != before {
            quiet = Instant::now();
        }
    }
    ensure!(written > 0, "no byte could be written");
    let since_ns = unix_ns();
    let samples = sampling::steady(Duration::from_millis(1500))?;
    let queue = samples.queue("send", |name| name == pair.name);
    let plain = arrived * RECORD as f64 / (RECORD + RECORD_OVERHEAD) as f64;
    let keys = [("ktls depth", "depth", written as f64 - plain)];
    compare_steady(report, &queue, since_ns, &keys);
    Ok(())
}
