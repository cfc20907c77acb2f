//! The set-up that a normal system has done before its first service starts, and power-off.

use std::{
    ffi::c_short,
    fs::{self, File},
    net::{Ipv4Addr, UdpSocket},
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    ioctl::{Opcode, Setter, ioctl},
    mount::{MountFlags, mount},
    system::{RebootCommand, finit_module, reboot},
};

use crate::protocol::{MODULES, module_file};

/// Where control groups are mounted.
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// File systems and mount points. A kernel may lack one; whatever needs it then fails with a message.
const MOUNTS: &[(&str, &str)] = &[
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("cgroup2", CGROUPS),
    ("bpf", "/sys/fs/bpf"),
    ("securityfs", "/sys/kernel/security"),
    ("tracefs", "/sys/kernel/tracing"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
];

pub fn prepare() {
    for (kind, target) in MOUNTS {
        // sysfs has its directories already and allows no others.
        let _ = fs::create_dir_all(target);
        if let Err(error) = mount(*kind, *target, *kind, MountFlags::empty(), None) {
            println!("note: {kind} is not mounted on {target}: {error}");
        }
    }
    if let Err(error) = loopback() {
        println!("note: {error:#}");
    }
    for module in MODULES {
        if let Err(error) = load(module) {
            println!("note: {error:#}");
        }
    }
}

/// Loads a module from the initramfs.
fn load(module: &str) -> Result<()> {
    let path = format!("/{}", module_file(module));
    if !fs::exists(&path).unwrap_or(false) {
        return Ok(());
    }
    let file = File::open(&path).with_context(|| format!("open {path}"))?;
    finit_module(file, c"", 0).with_context(|| format!("load {path}"))
}

/// Checks that each module of the initramfs is loaded: otherwise the rows that need it would be skipped.
pub fn modules_are_loaded() -> Result<()> {
    let file = "/proc/modules";
    let loaded = fs::read_to_string(file).with_context(|| format!("read {file}"))?;
    for module in MODULES {
        let name = module.replace('-', "_");
        let mut lines = loaded.lines();
        let is_loaded = lines.any(|line| line.split(' ').next() == Some(&name));
        let lies_there = fs::exists(format!("/{}", module_file(module))).unwrap_or(false);
        ensure!(is_loaded || !lies_there, "{module} is not loaded");
    }
    Ok(())
}

/// The used part of `struct ifreq` of <net/if.h>; the kernel reads 40 bytes.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: c_short,
    rest: [u8; 22],
}

/// Brings up the loopback interface.
fn loopback() -> Result<()> {
    const SIOCSIFFLAGS: Opcode = 0x8914;
    const IFF_UP: c_short = 1;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("open a socket")?;
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: IFF_UP,
        rest: [0; 22],
    };
    request.name[..2].copy_from_slice(b"lo");
    // SAFETY: SIOCSIFFLAGS reads a struct ifreq and writes nothing to it (netdevice(7)); the one given has its
    // size and layout.
    unsafe {
        ioctl(
            &socket,
            Setter::<SIOCSIFFLAGS, InterfaceRequest>::new(request),
        )
    }
    .context("bring the loopback interface up")
}

pub fn power_off() -> ! {
    match reboot(RebootCommand::PowerOff) {
        // If the first process ended, the kernel would panic; the emulator exits then, too.
        Ok(()) => loop {
            std::thread::park();
        },
        Err(error) => panic!("the kernel does not power off: {error}"),
    }
}
