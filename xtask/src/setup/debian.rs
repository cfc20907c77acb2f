//! Debian's packages, installed without starting the servers that some of them hold.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{command::Cmd, tools};

/// Packages that would start a server, now and at every boot, and the unit that does.
const SERVERS: &[(&str, &str)] = &[
    ("redis-server", "redis-server.service"),
    ("nginx-light", "nginx.service"),
    ("haproxy", "haproxy.service"),
    ("postgresql", "postgresql.service"),
    ("pgbouncer", "pgbouncer.service"),
    ("mosquitto", "mosquitto.service"),
    ("memcached", "memcached.service"),
];

/// Asked by every package before it starts its server; exit status 101 forbids it.
const POLICY: &str = "/usr/sbin/policy-rc.d";

pub fn update(log: &Path) -> Result<()> {
    apt()
        .arg("update")
        .run_logged(log)
        .context("bring Debian's package lists up to date")
}

pub fn install(packages: &[&str], log: &Path) -> Result<()> {
    let _guard = NoServers::forbid()?;
    apt()
        .args(["install", "--yes", "--no-install-recommends"])
        .args(packages)
        .run_logged(log)?;
    for (_, unit) in SERVERS
        .iter()
        .filter(|(package, _)| packages.contains(package))
    {
        if tools::program("systemctl").is_some() {
            // Not at the next boot either: the tests start their own. Where systemd does not run
            // there is nothing to forbid, and its refusal does not matter.
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

/// While it lives, packages do not start what they install.
struct NoServers {
    /// A policy of the machine's own, set aside.
    aside: Option<PathBuf>,
}

impl NoServers {
    fn forbid() -> Result<Self> {
        let aside = PathBuf::from(format!("{POLICY}.tailback-setup"));
        let aside = match fs::rename(POLICY, &aside) {
            Ok(()) => Some(aside),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error).context(format!("set {POLICY} aside")),
        };
        let guard = Self { aside };
        fs::write(POLICY, "#!/bin/sh\nexit 101\n")
            .and_then(|()| fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755)))
            .with_context(|| {
                format!("write {POLICY}, which keeps packages from starting servers")
            })?;
        Ok(guard)
    }
}

impl Drop for NoServers {
    fn drop(&mut self) {
        let restored = match &self.aside {
            Some(aside) => fs::rename(aside, POLICY),
            None => fs::remove_file(POLICY),
        };
        if let Err(error) = restored {
            eprintln!("warning: {POLICY} was not put back as it was: {error}");
        }
    }
}
