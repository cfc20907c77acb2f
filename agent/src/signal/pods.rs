//! Names of Kubernetes containers, by container id.
//!
//! For log collectors the kubelet keeps a link per container, `/var/log/containers/POD_NAMESPACE_CONTAINER-ID.log`. The names in
//! it are those of the API, and only the kubelet's user can make one: a workload cannot take the name of another.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use crate::target::namespaces::{self, is_initial};

/// Where the kubelet keeps the links.
const LINKS: &str = "var/log/containers";
/// Time after which an unknown container is searched for again, ns.
const SEARCH_INTERVAL_NS: u64 = 2_000_000_000;
/// Maximum number of links that are read; a node runs 110 pods by default.
const MAX_LINKS: usize = 8_192;

/// Finds the names of containers.
pub struct Pods {
    directories: Vec<PathBuf>,
    /// By container id, as of the last search.
    names: HashMap<String, String>,
    due_ns: u64,
}

impl Pods {
    /// Searches in the agent's own file system, and in that of the node if it is in sight.
    pub fn new() -> Self {
        let mut roots = vec!["/"];
        // Elsewhere process 1 may be the watched service, whose files may block.
        if is_initial(namespaces::PID) == Ok(true) {
            roots.push("/proc/1/root");
        }
        Self::with(roots.iter().map(|root| PathBuf::from(root).join(LINKS)))
    }

    fn with(directories: impl Iterator<Item = PathBuf>) -> Self {
        Self {
            directories: directories.collect(),
            names: HashMap::new(),
            due_ns: 0,
        }
    }

    /// `NAMESPACE_POD_CONTAINER` of the container with this id in this cgroup, if it is one of Kubernetes.
    pub fn name(&mut self, container: &str, cgroup: &str, now_ns: u64) -> Option<&str> {
        if is_delegated(cgroup, container) {
            return None;
        }
        if !self.names.contains_key(container) && now_ns >= self.due_ns {
            self.due_ns = now_ns + SEARCH_INTERVAL_NS;
            self.search();
        }
        self.names.get(container).map(String::as_str)
    }

    fn search(&mut self) {
        let links = self.directories.iter().map(fs::read_dir);
        let links = links.flatten().flatten().flatten().take(MAX_LINKS);
        let names = links.filter_map(|link| {
            let link = link.file_name();
            let (id, name) = parse(link.to_str()?)?;
            Some((id.to_owned(), name))
        });
        self.names = names.collect();
    }
}

/// Whether a user may have created this cgroup, and chosen the id in its name: systemd and LXC let users manage cgroups below those
/// of their sessions, services and containers.
fn is_delegated(cgroup: &str, id: &str) -> bool {
    let mut above = cgroup.split('/').take_while(|part| !part.contains(id));
    above.any(|part| {
        part == "user.slice"
            || part.starts_with("lxc")
            || Path::new(part)
                .extension()
                .is_some_and(|unit| unit == "service" || unit == "scope")
    })
}

/// The id of a container and its name, from the name of its link.
fn parse(link: &str) -> Option<(&str, String)> {
    let (names, id) = link.strip_suffix(".log")?.rsplit_once('-')?;
    let is_id = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let mut parts = names.split('_');
    let (pod, namespace, container) = (parts.next()?, parts.next()?, parts.next()?);
    let is_name = |name: &str| {
        let is_plain = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.')
        };
        !name.is_empty() && !name.starts_with('.') && name.bytes().all(is_plain)
    };
    let are_names = [pod, namespace, container].into_iter().all(is_name);
    (is_id && are_names && parts.next().is_none())
        .then(|| (id, format!("{namespace}_{pod}_{container}")))
}

#[cfg(test)]
mod tests {
    use tailback_tests::temp::TempDir;

    use super::*;

    #[test]
    fn a_link_names_the_container() {
        let id = "0123456789abcdef".repeat(4);
        let link = format!("shop-7d9f8b6c5-x2x4z_default_web-{id}.log");
        let name = "default_shop-7d9f8b6c5-x2x4z_web";
        assert_eq!(parse(&link), Some((id.as_str(), name.to_owned())));
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
            assert_eq!(parse(&wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_unknown_container_is_searched_for_at_most_every_interval() {
        let temp = TempDir::new("pods").unwrap();
        let mut pods = Pods::with([temp.path().join("none"), temp.path().to_owned()].into_iter());
        let id = "a".repeat(64);
        let path = format!("/kubepods/pod1/{id}");
        assert_eq!(pods.name(&id, &path, 1), None);
        temp.write(&format!("p_n_c-{id}.log"), "").unwrap();
        assert_eq!(pods.name(&id, &path, 2), None);
        let later = 1 + SEARCH_INTERVAL_NS;
        assert_eq!(pods.name(&id, &path, later), Some("n_p_c"));
        for path in [
            format!("/../../kubepods-pod1.slice/cri-containerd-{id}.scope"),
            format!("/machine.slice/libpod-{id}.scope/container"),
        ] {
            assert_eq!(pods.name(&id, &path, later), Some("n_p_c"), "{path}");
        }
        // A user can name these.
        for path in [
            format!("/user.slice/user-1000.slice/user@1000.service/cri-containerd-{id}.scope"),
            format!("/system.slice/ci.service/kubepods/pod1/{id}"),
            format!("/lxc.payload.a/cri-containerd-{id}.scope"),
        ] {
            assert_eq!(pods.name(&id, &path, later), None, "{path}");
        }
    }
}
