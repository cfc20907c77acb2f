//! Runs programs. A command can be displayed as a shell command line, and its errors contain it.

use std::{
    ffi::OsStr,
    fmt,
    fs::{self, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// One command line. Standard input is empty, so that no command can prompt.
#[derive(Clone)]
pub struct Cmd {
    program: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    directory: Option<PathBuf>,
    limit: Option<Duration>,
}

impl Cmd {
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: text(program),
            args: Vec::new(),
            env: Vec::new(),
            directory: None,
            limit: None,
        }
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(text(arg));
        self
    }

    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(text));
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.to_owned(), text(value)));
        self
    }

    pub fn current_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Kills the command after this time.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    pub fn program(&self) -> &str {
        &self.program
    }

    /// As a [`Command`], for callers that need the streams.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        // `cargo xtask` sets these for this program. A cargo started by it would build again whatever depends on them.
        let of_package = std::env::vars_os().map(|(name, _)| name).filter(|name| {
            let name = name.to_string_lossy();
            name == "CARGO_MANIFEST_DIR" || name.starts_with("CARGO_PKG_")
        });
        of_package.for_each(|name| {
            command.env_remove(name);
        });
        command
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        command
    }

    /// Runs to completion and returns standard output.
    pub fn output(&self) -> Result<String> {
        let output = self
            .command()
            .output()
            .with_context(|| self.cannot_start())?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!(
                "`{self}` failed: {}: {}",
                output.status,
                last_lines(&stderr, 5)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs with its output appended to `log`; an error contains the last lines.
    pub fn run_logged(&self, log: &Path) -> Result<()> {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open the log {}", log.display()))?;
        writeln!(file, "$ {self}").with_context(|| format!("write to {}", log.display()))?;
        let before = file.metadata().map_or(0, |about| about.len());
        let mut child = self
            .command()
            .stdout(file.try_clone().context("share the log with a command")?)
            .stderr(file)
            .spawn()
            .with_context(|| self.cannot_start())?;
        let end = self.limit.map(|limit| Instant::now() + limit);
        let status = loop {
            if let Some(status) = child
                .try_wait()
                .with_context(|| format!("wait for `{self}`"))?
            {
                break status;
            }
            if end.is_some_and(|end| Instant::now() > end) {
                child.kill().with_context(|| format!("stop `{self}`"))?;
                child.wait().with_context(|| format!("wait for `{self}`"))?;
                bail!(
                    "`{self}` timed out after {:?}",
                    self.limit.unwrap_or_default()
                );
            }
            thread::sleep(Duration::from_millis(20));
        };
        if !status.success() {
            let logged = fs::read(log).unwrap_or_default();
            let logged = logged.get(usize::try_from(before)?..).unwrap_or_default();
            bail!(
                "`{self}` failed: {status}\n{}\n(full log: {})",
                last_lines(&String::from_utf8_lossy(logged), 12),
                log.display()
            );
        }
        Ok(())
    }

    fn cannot_start(&self) -> String {
        format!("start `{self}`")
    }
}

/// As a shell command line.
impl fmt::Display for Cmd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(directory) = &self.directory {
            write!(f, "cd {} && ", quoted(&text(directory)))?;
        }
        for (name, value) in &self.env {
            write!(f, "{name}={} ", quoted(value))?;
        }
        write!(f, "{}", quoted(&self.program))?;
        for arg in &self.args {
            write!(f, " {}", quoted(arg))?;
        }
        Ok(())
    }
}

fn text(value: impl AsRef<OsStr>) -> String {
    value.as_ref().to_string_lossy().into_owned()
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:@,+%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The last `count` non-empty lines, indented.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let last = &lines[lines.len().saturating_sub(count)..];
    last.iter()
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_displayed_as_a_shell_command_line() {
        let cmd = Cmd::new("make")
            .arg("it's")
            .arg("all")
            .env("V", "1 2")
            .current_dir("/tmp");
        assert_eq!(cmd.to_string(), r"cd /tmp && V='1 2' make 'it'\''s' all");
    }

    #[test]
    fn a_failed_command_reports_its_last_lines() -> Result<()> {
        let log = std::env::temp_dir().join(format!("tailback-command-{}", std::process::id()));
        let cmd = Cmd::new("sh").args(["-c", "echo a last line; exit 3"]);
        let error = cmd.run_logged(&log).expect_err("the command fails");
        fs::remove_file(&log)?;
        assert!(
            error
                .to_string()
                .contains("exit status: 3\n    a last line"),
            "{error}"
        );
        Ok(())
    }

    #[test]
    fn a_command_that_exceeds_its_limit_is_killed() -> Result<()> {
        let log = std::env::temp_dir().join(format!("tailback-limit-{}", std::process::id()));
        let cmd = Cmd::new("sleep").arg("60").limit(Duration::from_millis(50));
        let error = cmd.run_logged(&log).expect_err("the command is stopped");
        fs::remove_file(&log)?;
        assert_eq!(error.to_string(), "`sleep 60` timed out after 50ms");
        Ok(())
    }
}
