//! A disk layer of Envoy's runtime: the thresholds of one cluster's circuit breakers.
//!
//! Each file in a layer is a runtime key, and its text the value. Envoy reads the layer when the symbolic link `symlink_root` is
//! moved into place. So each state is written to a new directory beside the link, and then the link is replaced. Of the two
//! directories, `.NAME.0` and `.NAME.1`, one is in use.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use rustix::{
    fs::{AtFlags, Dir, Mode, OFlags, inotify},
    io::Errno,
};

use crate::config::signal::Envoy;

/// Maximum number of files of an earlier layer that are removed; more than that are not ours.
const MAX_FILES: usize = 64;
/// Envoy runs as another user.
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o755);
const FILE_MODE: Mode = Mode::from_raw_mode(0o644);

/// What the layer says, for people.
pub fn words(limit: Option<u32>) -> String {
    limit.map_or_else(|| "no limit".to_owned(), |limit| format!("limit {limit}"))
}

/// Name of the file that is in every layer, so that a read is noticed even if there is no limit.
pub fn marker(config: &Envoy) -> String {
    format!("tailback.{}", config.cluster)
}

/// The runtime keys and their values. Without a limit there are no thresholds, so Envoy uses those of the cluster's configuration.
///
/// Envoy lets a request wait only for a connection, in order of arrival and without a deadline. So the number of waiting requests is
/// bounded: with half as many as are in service, none waits longer than half the time in service.
fn keys(config: &Envoy, limit: Option<u32>) -> Vec<(String, String)> {
    let mut keys = vec![(marker(config), words(limit))];
    let Some(limit) = limit else {
        return keys;
    };
    let waiting = (limit / 2).max(1);
    // `max_requests` matters if there are more connections than the limit, kept alive since before the overload, or if one
    // connection carries several requests (HTTP/2). It is higher, because each worker thread of Envoy may open one connection in
    // any case. If this threshold rejected the request for it, the unused connection would still occupy a worker of the service.
    for (threshold, value) in [
        ("max_connections", limit),
        ("max_pending_requests", waiting),
        ("max_requests", limit.saturating_mul(2)),
    ] {
        let key = format!("circuit_breakers.{}.default.{threshold}", config.cluster);
        keys.push((key, value.to_string()));
    }
    keys
}

/// Replaces the layer. Reads of it are reported to `inotify`.
pub fn write(config: &Envoy, limit: Option<u32>, inotify: Option<&OwnedFd>) -> Result<()> {
    let root = &config.symlink_root;
    replace(root, &keys(config, limit), inotify)
        .with_context(|| format!("cannot write {}", root.display()))
}

/// The directory may belong to another user, so symbolic links are not followed and leftover files are not reused.
fn replace(root: &Path, keys: &[(String, String)], inotify: Option<&OwnedFd>) -> io::Result<()> {
    let link = root.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let path = root.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = rustix::fs::open(path, flags, Mode::empty())?;
    let [first, second, temporary] = [".0", ".1", ".new"].map(|suffix| hidden(link, suffix));
    let current = rustix::fs::readlinkat(&parent, link, Vec::new());
    let is_first = current.is_ok_and(|current| current.as_bytes() == first.as_bytes());
    let next = if is_first { second } else { first };
    remove_directory(&parent, &next)?;
    rustix::fs::mkdirat(&parent, &next, DIRECTORY_MODE)?;
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(&parent, &next, flags, Mode::empty())?;
    // The umask may be stricter.
    rustix::fs::fchmod(&directory, DIRECTORY_MODE)?;
    for (key, value) in keys {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&directory, key, flags, FILE_MODE)?;
        rustix::fs::fchmod(&file, FILE_MODE)?;
        File::from(file).write_all(format!("{value}\n").as_bytes())?;
    }
    if let Some(inotify) = inotify {
        // Without it the reads are not noticed. The kernel removes the watch with the directory.
        let flags = inotify::WatchFlags::CLOSE_NOWRITE;
        let _ = inotify::add_watch(inotify, path.join(&next), flags);
    }
    remove_file(&parent, &temporary)?;
    rustix::fs::symlinkat(&next, &parent, &temporary)?;
    Ok(rustix::fs::renameat(&parent, &temporary, &parent, link)?)
}

fn hidden(name: &OsStr, suffix: &str) -> OsString {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(suffix);
    hidden
}

/// Removes a directory with the files in it, if it exists.
fn remove_directory(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match rustix::fs::openat(parent, name, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // "." and ".." too.
    for entry in Dir::read_from(&directory)?.take(MAX_FILES + 2) {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            rustix::fs::unlinkat(&directory, entry.file_name(), AtFlags::empty())?;
        }
    }
    Ok(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

fn remove_file(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use tailback_tests::temp::TempDir;

    use super::*;

    fn config(temp: &TempDir) -> Envoy {
        Envoy {
            target: "shop".to_owned(),
            cluster: "shop.v2".to_owned(),
            symlink_root: temp.path().join("layer"),
        }
    }

    /// The keys of the layer, as Envoy reads them.
    fn read(config: &Envoy) -> BTreeMap<String, String> {
        let entries = fs::read_dir(&config.symlink_root).unwrap();
        entries
            .map(|entry| {
                let entry = entry.unwrap();
                let text = fs::read_to_string(entry.path()).unwrap();
                let name = entry.file_name().into_string().unwrap();
                (name, text.trim_end().to_owned())
            })
            .collect()
    }

    fn layer(limits: &[(&str, &str)]) -> BTreeMap<String, String> {
        let pairs = limits.iter();
        pairs
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn the_thresholds_follow_the_limit_and_are_absent_without_one() {
        let temp = TempDir::new("envoy").unwrap();
        let config = config(&temp);
        for (limit, connections, waiting, requests) in [
            (4, "4", "2", "8"),
            (1, "1", "1", "2"),
            (5, "5", "2", "10"),
            (u32::MAX, "4294967295", "2147483647", "4294967295"),
        ] {
            write(&config, Some(limit), None).unwrap();
            let expected = layer(&[
                (
                    "circuit_breakers.shop.v2.default.max_connections",
                    connections,
                ),
                (
                    "circuit_breakers.shop.v2.default.max_pending_requests",
                    waiting,
                ),
                ("circuit_breakers.shop.v2.default.max_requests", requests),
                ("tailback.shop.v2", &words(Some(limit))),
            ]);
            assert_eq!(read(&config), expected);
        }
        write(&config, None, None).unwrap();
        assert_eq!(read(&config), layer(&[("tailback.shop.v2", "no limit")]));
        let entries = fs::read_dir(temp.path()).unwrap().count();
        assert_eq!(entries, 3, "the link and two directories");
    }

    #[test]
    fn everyone_can_read_the_layer() {
        let temp = TempDir::new("envoy").unwrap();
        let config = config(&temp);
        write(&config, Some(4), None).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&config.symlink_root), 0o755);
        let key = config.symlink_root.join(marker(&config));
        assert_eq!(mode(&key), 0o644);
    }

    #[test]
    fn what_lies_in_the_way_is_removed_and_never_followed() {
        let temp = TempDir::new("envoy").unwrap();
        let config = config(&temp);
        let at = |name: &str| temp.path().join(name);
        // The layer of another cluster, left by an earlier process.
        fs::create_dir(at(".layer.0")).unwrap();
        fs::write(
            at(".layer.0/circuit_breakers.old.default.max_requests"),
            "1",
        )
        .unwrap();
        symlink(at("elsewhere"), at(".layer.new")).unwrap();
        write(&config, None, None).unwrap();
        assert_eq!(read(&config), layer(&[("tailback.shop.v2", "no limit")]));
        assert!(!at("elsewhere").exists());

        fs::create_dir(at("elsewhere")).unwrap();
        fs::write(at("elsewhere/precious"), "").unwrap();
        symlink(at("elsewhere"), at(".layer.1")).unwrap();
        write(&config, Some(4), None).unwrap_err();
        assert!(at("elsewhere/precious").exists());
        fs::remove_file(at(".layer.1")).unwrap();
        write(&config, Some(4), None).unwrap();
    }

    #[test]
    fn a_path_that_cannot_be_replaced_is_named_with_the_reason() {
        let temp = TempDir::new("envoy").unwrap();
        let config = config(&temp);
        fs::create_dir(&config.symlink_root).unwrap();
        let error = format!("{:#}", write(&config, None, None).unwrap_err());
        assert!(
            error.contains("cannot write") && error.contains("layer: Is a directory"),
            "{error}"
        );
        let missing = Envoy {
            symlink_root: temp.path().join("missing/layer"),
            ..config
        };
        let error = format!("{:#}", write(&missing, None, None).unwrap_err());
        assert!(error.contains("No such file or directory"), "{error}");
    }
}
