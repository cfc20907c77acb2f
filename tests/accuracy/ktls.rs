//! TCP connections whose ends the kernel encrypts and decrypts for (Documentation/networking/tls.rst).
//!
//! The agent counts what TCP counts: the bytes on the wire. Each record of up to 16,384 plain bytes has 29 more, so that
//! a queue of full records looks 0.2% deeper than it is, and one of records of 1,000 bytes 3%.

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
    look::{self, SETTLED_NS, standing},
    report::Report,
    stream::Pair,
    sys,
};

const TLS_TX: c_int = 1;
const TLS_RX: c_int = 2;
/// The plain bytes of the largest record, and what it has besides: a header, an explicit nonce, a tag.
const RECORD: usize = 16_384;
const AROUND: usize = 5 + 8 + 16;

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

/// TLS 1.2 with AES-GCM-128. Both ends know them, as after a handshake.
static KEYS: Keys = Keys {
    version: 0x0303,
    cipher: 51,
    iv: [1; 8],
    key: [2; 16],
    salt: [3; 4],
    record: [0; 8],
};

/// Hands an end over to the kernel's TLS. Answers why not, where the kernel has none.
fn hand_over(stream: &TcpStream, direction: c_int) -> Result<Option<String>> {
    const SOL_TLS: c_int = 282;
    match sys::set_option(stream, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls") {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Ok(Some(format!("this kernel has no TLS: {error}")));
        }
        Err(error) => return Err(error).context("set TCP_ULP"),
    }
    // SAFETY: `Keys` is plain bytes without padding, as the assertion says, and lives as long as the slice.
    let keys = unsafe {
        const { assert!(size_of::<Keys>() == 2 + 2 + 8 + 16 + 4 + 8) };
        std::slice::from_raw_parts((&raw const KEYS).cast::<u8>(), size_of::<Keys>())
    };
    let done = sys::set_option(stream, SOL_TLS, direction, keys);
    done.context("give the kernel the keys of a connection")?;
    Ok(None)
}

/// What the peer sent, unread: in the largest records, and in small ones.
pub fn measure_recv(report: &mut Report) -> Result<()> {
    for (records, bytes) in [(3, RECORD), (40, 1_000)] {
        let mut pair = Pair::new()?;
        for (end, direction) in [(&pair.client, TLS_TX), (&pair.server, TLS_RX)] {
            if let Some(why) = hand_over(end, direction)? {
                report.skip(&why, |quantity| quantity == "ktls depth");
                return Ok(());
            }
        }
        let since_ns = unix_ns();
        for _ in 0..records {
            pair.client.write_all(&vec![0; bytes]).context("write")?;
        }
        let looks = look::at(Duration::from_millis(1500))?;
        let queue = looks.queue("recv", |name| name == pair.name);
        let keys = [("ktls depth", "depth", (records * bytes) as f64)];
        standing(report, &queue, since_ns + SETTLED_NS, &keys);
    }
    Ok(())
}

/// A peer that does not read: all that fits is written. What has arrived at it is no more in the send queue; it counts
/// bytes on the wire, for it is not told that they are records.
pub fn measure_send(report: &mut Report) -> Result<()> {
    let mut pair = Pair::new()?;
    if let Some(why) = hand_over(&pair.server, TLS_TX)? {
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
    ensure!(written > 0, "nothing can be written");
    let since_ns = unix_ns();
    let looks = look::at(Duration::from_millis(1500))?;
    let queue = looks.queue("send", |name| name == pair.name);
    let plain = arrived * RECORD as f64 / (RECORD + AROUND) as f64;
    let keys = [("ktls depth", "depth", written as f64 - plain)];
    standing(report, &queue, since_ns, &keys);
    Ok(())
}
