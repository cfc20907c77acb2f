//! HikariCP, a pool of database connections for Java, as Debian installs it.

use std::path::Path;

use anyhow::{Result, bail};

/// The pool, the PostgreSQL driver, and their logging library.
const JARS: &[&str] = &[
    "/usr/share/java/HikariCP.jar",
    "/usr/share/java/postgresql.jar",
    "/usr/share/java/slf4j-api.jar",
    "/usr/share/java/slf4j-nop.jar",
];

/// What `java -cp` needs for it.
pub fn class_path() -> Result<String> {
    match JARS.iter().find(|jar| !Path::new(jar).exists()) {
        Some(missing) => bail!("{missing} does not exist: run `cargo xtask setup`"),
        None => Ok(JARS.join(":")),
    }
}
