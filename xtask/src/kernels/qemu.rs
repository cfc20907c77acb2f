//! Boots a kernel in QEMU with one emulated CPU, and collects its console.
//!
//! KVM is not used, because it is missing on some machines where the tests must run. One CPU, because emulating two crashes
//! now and then in early boot. A boot that dies before the first process says hello is the emulator's fault and is
//! restarted; one that dies later is a failure.

use std::{
    fs,
    io::Read as _,
    path::PathBuf,
    process::{Child, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    Kernel,
    protocol::{BYE, HELLO},
};
use crate::{architecture::Architecture, command::Cmd};

const ATTEMPTS: u32 = 3;
const MEMORY_MIB: &str = "1024";
/// No CMPXCHG16B, which the memory allocator of newer kernels uses if available. QEMU 7.2 has been seen to return from it
/// with an address in the flags register, which crashes the kernel: 3 of 28 boots of 6.12 with it, 0 of 28 without.
const CPU: &str = "qemu64,-cx16";
/// Only emergencies, such as a panic, reach the console: any other message of the kernel could break a line of a check.
const QUIET: &str = "loglevel=1";
/// A processor of aarch64 without the features that are slow to emulate (pointer authentication).
const AARCH64_CPU: &str = "cortex-a72";

/// The console output from start to power-off.
pub struct Console {
    pub text: String,
    pub took: Duration,
    /// Boots that died before the hello line.
    pub restarts: u32,
    /// The fault, if the first process did not reach power-off.
    pub fault: Option<String>,
}

/// Boots a kernel, and returns when it has powered off or died.
pub fn boot(kernel: &Kernel, initramfs: &[u8], limit: Duration) -> Result<Console> {
    let initrd = Scratch::new(kernel, initramfs)?;
    let qemu = qemu(kernel, &initrd);
    let start = Instant::now();
    let mut restarts = 0;
    loop {
        let (text, end) = attempt(&qemu, limit)?;
        let up = text.contains(HELLO);
        if !up && restarts + 1 < ATTEMPTS {
            restarts += 1;
            continue;
        }
        let fault = match (up, text.contains(BYE)) {
            (true, true) => None,
            (true, false) => Some(format!(
                "after the first process had begun, {}",
                end.words(limit)
            )),
            (false, _) => Some(format!(
                "before the first process began, {}",
                end.words(limit)
            )),
        };
        return Ok(Console {
            text,
            took: start.elapsed(),
            restarts,
            fault,
        });
    }
}

fn qemu(kernel: &Kernel, initrd: &Scratch) -> Cmd {
    let (machine, cpu, console) = match kernel.architecture {
        Architecture::X86_64 => ("pc", CPU, "ttyS0"),
        Architecture::Aarch64 => ("virt", AARCH64_CPU, "ttyAMA0"),
    };
    Cmd::new(kernel.architecture.machine_emulator())
        .args(["-machine", machine, "-accel", "tcg", "-smp", "1"])
        .args(["-m", MEMORY_MIB, "-cpu", cpu])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(kernel.image())
        .arg("-initrd")
        .arg(&initrd.0)
        .arg("-append")
        .arg(format!("console={console} {QUIET} panic=-1"))
}

enum End {
    PoweredOff,
    Died(String),
    TimedOut,
}

impl End {
    fn words(&self, limit: Duration) -> String {
        match self {
            Self::PoweredOff => "the kernel went down".to_owned(),
            Self::Died(how) => format!("the emulator ended ({how})"),
            Self::TimedOut => format!("{} s ran out", limit.as_secs()),
        }
    }
}

fn attempt(qemu: &Cmd, limit: Duration) -> Result<(String, End)> {
    let mut child = qemu
        .command()
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start `{qemu}`; `cargo xtask setup --for test` installs it"))?;
    let console = read(&mut child)?;
    let end = Instant::now() + limit;
    let mut text = Vec::new();
    let timed_out = loop {
        match console.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(bytes) => text.extend(bytes),
            Err(RecvTimeoutError::Disconnected) => break false,
            Err(RecvTimeoutError::Timeout) => break true,
        }
    };
    if timed_out {
        child.kill().context("stop the emulator")?;
    }
    let output = child.wait_with_output().context("wait for the emulator")?;
    let text = String::from_utf8_lossy(&text).replace('\r', "");
    let end = match (timed_out, output.status.success()) {
        (true, _) => End::TimedOut,
        (false, true) => End::PoweredOff,
        (false, false) => {
            let said = String::from_utf8_lossy(&output.stderr);
            End::Died(format!("{}: {}", output.status, said.trim()))
        }
    };
    Ok((text, end))
}

/// Streams the console, so that a hanging boot shows how far it got.
fn read(child: &mut Child) -> Result<Receiver<Vec<u8>>> {
    let mut stdout = child.stdout.take().context("take the emulator's console")?;
    let (send, receive) = channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(len @ 1..) = stdout.read(&mut buffer) {
            if send.send(buffer[..len].to_vec()).is_err() {
                break;
            }
        }
    });
    Ok(receive)
}

/// A file that is removed on drop.
struct Scratch(PathBuf);

impl Scratch {
    fn new(kernel: &Kernel, content: &[u8]) -> Result<Self> {
        let directory = kernel.directory();
        let file = directory.join(format!("initramfs.{}", std::process::id()));
        fs::write(&file, content).with_context(|| format!("write {}", file.display()))?;
        Ok(Self(file))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
