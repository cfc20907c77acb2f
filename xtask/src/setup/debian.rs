//! Installs Debian packages without starting the servers that some of them contain.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{command::Cmd, tools};

/// Packages that would start a server now and at every boot, with the systemd unit.
const SERVERS: &[(&str, &str)] = &[
    ("redis-server", "redis-server.service"),
    ("nginx-light", "nginx.service"),
    ("haproxy", "haproxy.service"),
    ("postgresql", "postgresql.service"),
    ("pgbouncer", "pgbouncer.service"),
    ("mosquitto", "mosquitto.service"),
    ("memcached", "memcached.service"),
];

/// Packages run this before starting a server; exit status 101 forbids it.
const POLICY: &str = "/usr/sbin/policy-rc.d";

pub fn update(log: &Path) -> Result<()> {
    apt()
        .arg("update")
        .run_logged(log)
        .context("update Debian's package lists")
}

pub fn install(packages: &[&str], log: &Path) -> Result<()> {
    let _no_servers = NoServers::forbid()?;
    apt()
        .args(["install", "--yes", "--no-install-recommends"])
        .args(packages)
        .run_logged(log)?;
    for (_, unit) in SERVERS
        .iter()
        .filter(|(package, _)| packages.contains(package))
    {
        if tools::program("systemctl").is_some() {
            // Not at the next boot either: the tests start their own servers. Fails where systemd does not run, which is
            // fine.
            let _ = Cmd::new("systemctl")
                .args(["disable", "--now", unit])
                .output();
        }
    }
    Ok(())
}

fn apt() -> Cmd {
    Cmd::new("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=2"])
        .limit(Duration::from_secs(900))
}

/// While this exists, packages do not start servers.
struct NoServers {
    /// The machine's own policy file, moved away.
    moved: Option<PathBuf>,
}

impl NoServers {
    fn forbid() -> Result<Self> {
        let moved = PathBuf::from(format!("{POLICY}.tailback-setup"));
        let moved = match fs::rename(POLICY, &moved) {
            Ok(()) => Some(moved),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error).context(format!("set {POLICY} moved")),
        };
        let this = Self { moved };
        fs::write(POLICY, "#!/bin/sh\nexit 101\n")
            .and_then(|()| fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755)))
            .with_context(|| {
                format!("write {POLICY}, which prevents packages from starting servers")
            })?;
        Ok(this)
    }
}

impl Drop for NoServers {
    fn drop(&mut self) {
        let restored = match &self.moved {
            Some(moved) => fs::rename(moved, POLICY),
            None => fs::remove_file(POLICY),
        };
        if let Err(error) = restored {
            eprintln!("warning: could not restore {POLICY}: {error}");
        }
    }
}
