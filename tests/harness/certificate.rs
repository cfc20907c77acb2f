//! A self-signed certificate for `localhost`.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Result, ensure};

use crate::{
    process::{End, Process},
    program,
};

/// Deadline for making the key: one of 4,096 bits takes about a second.
const DEADLINE: Duration = Duration::from_secs(60);

/// Writes `key.pem`, an RSA key of this many bits, and `cert.pem` into the directory.
pub fn certify(directory: &Path, bits: u32) -> Result<()> {
    let mut command = Command::new(program::need(&["openssl"])?);
    command
        .current_dir(directory)
        .args(["req", "-x509", "-nodes", "-days", "2"])
        .args(["-newkey", &format!("rsa:{bits}"), "-subj", "/CN=localhost"])
        .args(["-keyout", "key.pem", "-out", "cert.pem"]);
    let end = Process::start("openssl", &mut command)?.wait_end(DEADLINE)?;
    ensure!(end == End::Code(0), "openssl ended with {end:?}");
    Ok(())
}
