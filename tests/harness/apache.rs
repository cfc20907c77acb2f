//! Apache with one process per connection (prefork), serving static files.

use std::{
    fs, net::SocketAddr, os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{ports, process::Process, program, temp::TempDir};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// Where distributions put its modules.
const MODULES: &[&str] = &["/usr/lib/apache2/modules", "/usr/lib64/httpd/modules"];

/// A running Apache that responds.
pub struct Apache {
    process: Process,
    port: u16,
    temp: TempDir,
}

impl Apache {
    /// Starts it with this many workers. Each keeps an idle connection for this time.
    pub fn start(workers: u32, keep_alive: Duration) -> Result<Self> {
        let temp = TempDir::new("apache")?;
        // Its workers are another user's.
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(temp.path(), open).context("open the directory to its workers")?;
        let port = ports::free()?;
        temp.write("index.html", "<p>All is well.</p>\n")?;
        let (modules, directory) = (modules()?, temp.path().display());
        let config = temp.write(
            "apache.conf",
            &format!(
                "LoadModule mpm_prefork_module {modules}/mod_mpm_prefork.so\n\
                 LoadModule authz_core_module {modules}/mod_authz_core.so\n\
                 LoadModule dir_module {modules}/mod_dir.so\n\
                 ServerName localhost\nListen 127.0.0.1:{port}\n\
                 User nobody\nGroup nogroup\n\
                 PidFile {directory}/pid\nErrorLog /dev/stderr\n\
                 DocumentRoot {directory}\nDirectoryIndex index.html\n\
                 ServerLimit {workers}\nMaxRequestWorkers {workers}\nStartServers {workers}\n\
                 MinSpareServers {workers}\nMaxSpareServers {workers}\n\
                 KeepAlive On\nKeepAliveTimeout {}\n",
                keep_alive.as_secs(),
                modules = modules.display()
            ),
        )?;
        let mut command = Command::new(program::need(&["apache2", "httpd"])?);
        command.arg("-DFOREGROUND").arg("-d").arg(temp.path());
        let process = Process::start("Apache", command.arg("-f").arg(config))?;
        process.wait_response(ports::local(port), START_DEADLINE)?;
        Ok(Self {
            process,
            port,
            temp,
        })
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn address(&self) -> SocketAddr {
        ports::local(self.port)
    }

    /// Adds a file of this size.
    pub fn file(&self, name: &str, bytes: usize) -> Result<()> {
        self.temp.write(name, &"x".repeat(bytes)).map(drop)
    }
}

fn modules() -> Result<PathBuf> {
    let found = MODULES.iter().map(PathBuf::from);
    match found.into_iter().find(|path| path.is_dir()) {
        Some(path) => Ok(path),
        None => bail!("no modules of Apache in {}", MODULES.join(" or ")),
    }
}
