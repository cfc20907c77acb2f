//! The configuration file itself: read within bounds, and checked for changes.
//!
//! A ConfigMap is updated by replacing a symbolic link above the file (`..data`), an editor replaces the file by a rename, and
//! others write into it. All three change the [`Identity`] that the path leads to.
#![forbid(unsafe_code)]

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::{
        fd::AsFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use rustix::{fs::OFlags, process::geteuid};

use super::{Config, line_at};

/// Largest configuration that is read, bytes: 64 adapters of each kind with long paths take 100 kB.
pub const MAX_BYTES: u64 = 1 << 20;
/// Name of the configuration on standard input.
pub const STDIN: &str = "-";

/// What a path leads to, and its content as far as the file system knows without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

/// The identity that the path leads to now, through all links.
///
/// # Errors
/// If there is no such file, or it cannot be reached.
pub fn identity(path: &Path) -> io::Result<Identity> {
    let file = fs::metadata(path)?;
    Ok(Identity {
        device: file.dev(),
        inode: file.ino(),
        bytes: file.size(),
        modified: (file.mtime(), file.mtime_nsec()),
        changed: (file.ctime(), file.ctime_nsec()),
    })
}

/// Reads a file once, as a command does. It may be a pipe.
pub fn read(path: &Path) -> Result<String> {
    let file = if path == Path::new(STDIN) {
        let stdin = io::stdin();
        stdin.as_fd().try_clone_to_owned().map(File::from)
    } else {
        File::open(path)
    };
    file.map_err(anyhow::Error::from)
        .and_then(bounded)
        .with_context(|| format!("cannot read the configuration {}", path.display()))
}

/// The user who owns the file, if it is one that can be read again.
pub fn owner(path: &Path) -> Option<u32> {
    let file = fs::metadata(path).ok()?;
    file.is_file().then(|| file.uid())
}

/// Reads a file again that a running agent has loaded before, when it belonged to the user `owner`. Never waits for a
/// writer, and accepts the file only from users who are trusted with it.
pub fn read_again(path: &Path, owner: u32) -> Result<String> {
    let open = || {
        // A FIFO in the file's place must not block.
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            bail!("not a regular file");
        }
        let uid = metadata.uid();
        if ![0, owner, geteuid().as_raw()].contains(&uid) {
            bail!(
                "the file belongs to user {uid} now, and belonged to user {owner}: restart the agent to accept it, or `chown {owner}` it"
            );
        }
        if metadata.mode() & 0o002 != 0 {
            bail!("every user may write to the file: run `chmod o-w` on it");
        }
        bounded(file)
    };
    open().with_context(|| format!("cannot read {}", path.display()))
}

/// The directory that the file sets in `[signal]`, even if the file is invalid otherwise: an agent that has rejected it is still
/// asked there.
pub fn directory(path: &Path) -> Option<PathBuf> {
    let text = read(path).ok()?;
    let table: toml::Table = toml::from_str(&text).ok()?;
    let directory = table.get("signal")?.get("directory")?.as_str()?;
    Some(directory.into())
}

fn bounded(file: File) -> Result<String> {
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        bail!("larger than {} KiB", MAX_BYTES >> 10);
    }
    Ok(text)
}

/// Parses the text like [`Config::parse`], with an error of one line that quotes no line of the file: it reaches people who
/// may not be allowed to read the file.
pub fn parse_quietly(text: &str) -> Result<Config> {
    Config::parse(text).map_err(|error| {
        let Some(error) = error.downcast_ref::<toml::de::Error>() else {
            return error;
        };
        let message = error.message().replace('\n', " ");
        match error.span() {
            Some(span) => anyhow::anyhow!("line {}: {message}", line_at(text, span.start)),
            None => anyhow::anyhow!(message),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tailback_tests::temp::TempDir;

    use super::*;

    #[test]
    fn an_update_of_a_config_map_changes_the_identity() {
        let temp = TempDir::new("config").unwrap();
        let at = |name: &str| temp.path().join(name);
        for version in ["..1", "..2"] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("tailback.toml"), "interval = \"1s\"\n").unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/tailback.toml", at("tailback.toml")).unwrap();
        let path = at("tailback.toml");
        let before = identity(&path).unwrap();
        assert_eq!(before, identity(&path).unwrap());
        symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        assert_ne!(before, identity(&path).unwrap());
        fs::remove_dir_all(at("..1")).unwrap();
        assert!(read_again(&path, 0).is_ok());
    }

    #[test]
    fn a_file_that_is_not_trusted_or_not_a_file_is_not_read_again() {
        let temp = TempDir::new("config").unwrap();
        let path = temp.write("tailback.toml", "").unwrap();
        let own = owner(&path).unwrap();
        let error = || format!("{:#}", read_again(&path, own).unwrap_err());
        let set_mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode));
        set_mode(0o666).unwrap();
        assert!(error().contains("chmod o-w"));
        set_mode(0o644).unwrap();
        fs::write(&path, "#".repeat(2 << 20)).unwrap();
        assert!(error().contains("larger than 1024 KiB"));
        if own == 0 {
            std::os::unix::fs::chown(&path, Some(12_345), None).unwrap();
            assert!(error().contains("belongs to user 12345 now"));
            assert!(read_again(&path, 12_345).is_err(), "too large");
        }
        fs::remove_file(&path).unwrap();
        assert!(error().contains("No such file"));
        fs::create_dir(&path).unwrap();
        assert!(error().contains("not a regular file") && owner(&path).is_none());
        fs::remove_dir(&path).unwrap();
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(error().contains("not a regular file"));
    }

    #[test]
    fn the_directory_is_found_in_an_invalid_file() {
        let temp = TempDir::new("config").unwrap();
        let path = temp.write("a", "intervall = 1\n[signal]\ndirectory = \"/run/x\"\n");
        assert_eq!(directory(&path.unwrap()), Some("/run/x".into()));
        for text in ["interval = \n", "[signal]\ndirectory = 3\n"] {
            assert_eq!(directory(&temp.write("a", text).unwrap()), None);
        }
    }

    #[test]
    fn an_error_names_the_line_and_quotes_nothing() {
        let error = |text: &str| format!("{:#}", parse_quietly(text).unwrap_err());
        let text = error("\n\nintervall = \"secret\"\n");
        assert!(
            text.starts_with("line 3: ") && text.contains("intervall"),
            "{text}"
        );
        assert!(!text.contains("secret") && !text.contains('\n'), "{text}");
        assert!(error("cpu_budget = 3\n").contains("cpu_budget"));
    }
}
