//! Finds the names of containers by their ids. They are read from files that only the administrator can write, so a workload
//! cannot take another's name. The container runtime is not queried.
//!
//! - Kubernetes: for log collectors the kubelet keeps a link per container,
//!   `/var/log/containers/POD_NAMESPACE_CONTAINER-ID.log`. The names in it are those of the API.
//! - Docker: `/var/lib/docker/containers/ID/config.v2.json`.
//! - Podman: `/var/lib/containers/storage/*-containers/containers.json`.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read as _,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::namespaces::{self, is_initial};
use crate::sample::Pod;

/// Where the kubelet keeps the links.
const LINKS: &str = "var/log/containers";
/// Where Docker and podman keep their state.
const DOCKER: &str = "var/lib/docker/containers";
const PODMAN: &str = "var/lib/containers/storage";
/// The root directory of the node: of its first process, which a security module may protect, and of the kernel's first thread.
const NODE_ROOTS: [&str; 2] = ["/proc/1/root", "/proc/2/root"];
/// Time between two searches, ns. A new container is searched for at once.
const SEARCH_INTERVAL_NS: u64 = 2_000_000_000;
/// Time after which a container that was not found is searched for again, ns. The kubelet makes the link when it has started the
/// container.
const RETRY_NS: u64 = 10_000_000_000;
/// Maximum number of links that are read; a node runs 110 pods by default.
const MAX_LINKS: usize = 8_192;
/// Maximum number of containers that are remembered.
const MAX_NAMES: usize = 8_192;
/// Maximum size of a file of a runtime, bytes. Docker's is a few kB, podman's a kB per container.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// Longest name of a container of Docker or podman, bytes; longer ones are not used.
const MAX_NAME_BYTES: usize = 128;

/// The name of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ContainerName {
    Pod(Pod),
    /// Its name in Docker or podman.
    Plain(String),
}

/// A container that was not found.
#[derive(Clone, Copy, Debug)]
struct Missing {
    /// When it is searched for again.
    retry_ns: u64,
    /// The links of the kubelet were read since it was first seen.
    is_searched: bool,
}

/// Finds the names of containers.
pub(super) struct Containers {
    /// The agent's own root directory, and that of the node if it is in sight.
    roots: Vec<PathBuf>,
    /// By container id.
    names: HashMap<String, Result<ContainerName, Missing>>,
    due_ns: u64,
    /// The last search has found a link of the kubelet.
    sees_links: bool,
}

impl Containers {
    pub(super) fn new() -> Self {
        let mut roots = vec![PathBuf::from("/")];
        // Elsewhere process 1 may be the watched service, whose files may block.
        if is_initial(namespaces::PID) == Ok(true) {
            let of_node = NODE_ROOTS.iter().find(|root| fs::read_dir(root).is_ok());
            roots.extend(of_node.map(PathBuf::from));
        }
        Self::with(roots)
    }

    fn with(roots: Vec<PathBuf>) -> Self {
        Self {
            roots,
            names: HashMap::new(),
            due_ns: 0,
            sees_links: false,
        }
    }

    /// The name of the container with this id.
    pub(super) fn name(&mut self, id: &str, now_ns: u64) -> Option<&ContainerName> {
        let is_due = match self.names.get(id) {
            Some(Ok(_)) => false,
            Some(Err(missing)) => now_ns >= missing.retry_ns,
            None => true,
        };
        if is_due {
            self.search(id, now_ns);
        }
        self.names.get(id)?.as_ref().ok()
    }

    /// Whether the kubelet has no link for this container although it keeps links: the sandbox of a pod.
    pub(super) fn is_sandbox(&mut self, id: &str, now_ns: u64) -> bool {
        self.name(id, now_ns).is_none()
            && self.sees_links
            && matches!(self.names.get(id), Some(Err(missing)) if missing.is_searched)
    }

    fn search(&mut self, id: &str, now_ns: u64) {
        if self.names.len() >= MAX_NAMES {
            self.names.clear();
        }
        let is_searched = now_ns >= self.due_ns;
        if is_searched {
            self.due_ns = now_ns + SEARCH_INTERVAL_NS;
            self.read_links();
            for (id, name) in self.roots.iter().flat_map(|root| podman_names(root)) {
                let name = ContainerName::Plain(name);
                let known = self.names.entry(id).or_insert_with(|| Ok(name.clone()));
                if known.is_err() {
                    *known = Ok(name);
                }
            }
        }
        if self.names.get(id).is_some_and(Result::is_ok) {
            return;
        }
        let name = self.roots.iter().find_map(|root| docker_name(root, id));
        let missing = Missing {
            retry_ns: if is_searched {
                now_ns + RETRY_NS
            } else {
                self.due_ns
            },
            is_searched,
        };
        let name = name.map(ContainerName::Plain).ok_or(missing);
        self.names.insert(id.to_owned(), name);
    }

    fn read_links(&mut self) {
        let links = self.roots.iter().map(|root| fs::read_dir(root.join(LINKS)));
        let links = links.flatten().flatten().flatten().take(MAX_LINKS);
        self.sees_links = false;
        for link in links {
            let link = link.file_name();
            if let Some((id, pod)) = link.to_str().and_then(parse_link) {
                self.sees_links = true;
                let name = Ok(ContainerName::Pod(pod));
                self.names.insert(id.to_owned(), name);
            }
        }
    }
}

/// The id of a container and its names, from the name of its link.
fn parse_link(link: &str) -> Option<(&str, Pod)> {
    let (names, id) = link.strip_suffix(".log")?.rsplit_once('-')?;
    let is_id = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let mut parts = names.split('_');
    let (name, namespace, container) = (parts.next()?, parts.next()?, parts.next()?);
    let is_name = |name: &str| {
        let is_plain = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.')
        };
        !name.is_empty() && !name.starts_with('.') && name.bytes().all(is_plain)
    };
    let are_names = [name, namespace, container].into_iter().all(is_name);
    (is_id && are_names && parts.next().is_none()).then(|| {
        let pod = Pod {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            container: container.to_owned(),
        };
        (id, pod)
    })
}

/// The name of a Docker container.
fn docker_name(root: &Path, id: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct State {
        #[serde(rename = "Name")]
        name: String,
    }
    let file = root.join(DOCKER).join(id).join("config.v2.json");
    let state: State = serde_json::from_slice(&read(&file)?).ok()?;
    let name = state.name.strip_prefix('/').unwrap_or(&state.name);
    is_plain_name(name).then(|| name.to_owned())
}

/// The ids and names of podman's containers.
fn podman_names(root: &Path) -> Vec<(String, String)> {
    #[derive(Deserialize)]
    struct State {
        id: String,
        #[serde(default)]
        names: Vec<String>,
    }
    // A directory per storage driver: `overlay-containers`.
    let drivers = fs::read_dir(root.join(PODMAN));
    let drivers = drivers.into_iter().flatten().flatten().filter(|driver| {
        let name = driver.file_name();
        name.to_str()
            .is_some_and(|name| name.ends_with("-containers"))
    });
    drivers
        .flat_map(|driver| {
            // Containers that do not outlive a reboot have a file of their own.
            ["containers.json", "volatile-containers.json"].map(|file| driver.path().join(file))
        })
        .filter_map(|file| serde_json::from_slice::<Vec<State>>(&read(&file)?).ok())
        .flatten()
        .filter_map(|state| Some((state.id, state.names.into_iter().next()?)))
        .filter(|(_, name)| is_plain_name(name))
        .take(MAX_NAMES)
        .collect()
}

/// The content of a regular file of the administrator.
fn read(path: &Path) -> Option<Vec<u8>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .ok()?;
    let metadata = file.metadata().ok()?;
    let is_trusted = metadata.is_file() && metadata.uid() == 0 && metadata.mode() & 0o022 == 0;
    if !is_trusted || metadata.len() > MAX_FILE_BYTES {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// As Docker and podman allow.
fn is_plain_name(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    name.len() <= MAX_NAME_BYTES
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.bytes().all(is_plain)
}

#[cfg(test)]
mod tests {
    use tailback_tests::temp::TempDir;

    use super::*;

    fn pod() -> Pod {
        Pod {
            namespace: "default".to_owned(),
            name: "shop-7d9f8b6c5-x2x4z".to_owned(),
            container: "web".to_owned(),
        }
    }

    #[test]
    fn a_link_names_the_container() {
        let id = "0123456789abcdef".repeat(4);
        let link = format!("shop-7d9f8b6c5-x2x4z_default_web-{id}.log");
        assert_eq!(parse_link(&link), Some((id.as_str(), pod())));
        assert_eq!(pod().service_name(), "default/shop-7d9f8b6c5-x2x4z/web");
        assert_eq!(pod().file_name(), "default_shop-7d9f8b6c5-x2x4z_web");
        for wrong in [
            format!("shop_default-{id}.log"),
            format!("shop_default_web_x-{id}.log"),
            format!("shop_.._web-{id}.log"),
            format!("SHOP_default_web-{id}.log"),
            format!("shop__web-{id}.log"),
            format!("shop_default_web-{id}"),
            "shop_default_web-12.log".to_owned(),
            String::new(),
        ] {
            assert_eq!(parse_link(&wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_container_without_a_link_is_searched_for_again_and_is_a_sandbox_until_then() {
        let temp = TempDir::new("containers").unwrap();
        let none = temp.path().join("none");
        let mut containers = Containers::with(vec![none, temp.path().to_owned()]);
        let (web, sandbox) = ("a".repeat(64), "b".repeat(64));
        assert_eq!(containers.name(&web, 1), None);
        assert!(!containers.is_sandbox(&web, 1), "there are no links at all");
        fs::create_dir_all(temp.path().join(LINKS)).unwrap();
        let link = format!("{LINKS}/shop-7d9f8b6c5-x2x4z_default_web-{web}.log");
        temp.write(&link, "").unwrap();
        assert_eq!(containers.name(&web, 2), None, "not yet");
        let later = 1 + RETRY_NS;
        let name = ContainerName::Pod(pod());
        assert_eq!(containers.name(&web, later), Some(&name));
        assert!(!containers.is_sandbox(&web, later));
        assert!(!containers.is_sandbox(&sandbox, later), "it may be new");
        assert!(containers.is_sandbox(&sandbox, later + SEARCH_INTERVAL_NS));
    }

    #[test]
    fn names_of_docker_and_podman_are_read_from_their_files() {
        let temp = TempDir::new("runtimes").unwrap();
        let (docker, podman, evil) = ("a".repeat(64), "b".repeat(64), "c".repeat(64));
        for (id, name) in [(&docker, "/shop-web-1"), (&evil, "/../etc")] {
            fs::create_dir_all(temp.path().join(DOCKER).join(id)).unwrap();
            let file = format!("{DOCKER}/{id}/config.v2.json");
            let state = format!(r#"{{"ID":"{id}","Config":{{"Image":"x"}},"Name":"{name}"}}"#);
            temp.write(&file, &state).unwrap();
        }
        let driver = format!("{PODMAN}/overlay-containers");
        fs::create_dir_all(temp.path().join(&driver)).unwrap();
        let state = format!(
            r#"[{{"id":"{evil}","image":"y"}},{{"id":"{podman}","names":["cart","x"],"layer":"z"}}]"#
        );
        temp.write(&format!("{driver}/containers.json"), &state)
            .unwrap();
        let mut containers = Containers::with(vec![temp.path().to_owned()]);
        let mut name = |id: &str| match containers.name(id, 1) {
            Some(ContainerName::Plain(name)) => Some(name.clone()),
            _ => None,
        };
        // Only files of the administrator count.
        let is_root = rustix::process::geteuid().is_root();
        let expect = |name: &str| is_root.then(|| name.to_owned());
        assert_eq!(name(&docker), expect("shop-web-1"));
        assert_eq!(name(&podman), expect("cart"));
        assert_eq!(name(&evil), None);
    }
}
