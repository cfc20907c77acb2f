//! Where a process runs, from its control groups. Pure.
//!
//! A path is read from the root down. The administrator created the groups above a container or unit. The groups below it can be
//! created by the processes that run in it, with any name.
#![forbid(unsafe_code)]

/// Digits of a container id.
const ID_DIGITS: usize = 64;
/// Units of container runtimes. If runtime and kubelet use different cgroup drivers, the groups of containers are below these.
pub(super) const RUNTIME_UNITS: &[&str] = &[
    "containerd",
    "cri-docker",
    "crio",
    "docker",
    "k3s",
    "k3s-agent",
    "podman",
    "rke2-agent",
    "rke2-server",
];

/// Where a process runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Place {
    /// A login session, the root group, or any other group.
    #[default]
    Elsewhere,
    /// A helper process of a container runtime, such as conmon, which has its own group for each container.
    Runtime,
    /// A system inside the system (LXC, systemd-nspawn), by the name of its group. It has an administrator of its own.
    Guest(String),
    /// A unit of a user's systemd, by the path of its group.
    UserUnit(String),
    /// A unit of the system's systemd: `nginx.service`.
    Unit(String),
    /// A container that a user created, by the path of its group.
    UserContainer(String),
    /// A container that the administrator created, by its id.
    Container {
        id: String,
        /// Kubernetes has created it.
        in_kubernetes: bool,
    },
}

/// The place of a process, from its `/proc/PID/cgroup`. With cgroup v1 each hierarchy has a path. A path with a container is
/// preferred, then that of systemd (`0::` or `name=systemd`), then any other.
pub(super) fn place(text: &str) -> Place {
    let mut best = (0, Place::Elsewhere);
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let place = place_of_path(path);
        let rank = match (&place, controllers) {
            (Place::Elsewhere, _) => continue,
            (Place::Container { .. }, _) => 3,
            (_, "" | "name=systemd") => 2,
            _ => 1,
        };
        if rank > best.0 {
            best = (rank, place);
        }
    }
    best.1
}

fn place_of_path(path: &str) -> Place {
    let mut is_users = false;
    let mut in_kubernetes = false;
    // What it is if no container is found below.
    let mut otherwise = Place::Elsewhere;
    // In a private cgroup namespace, paths above the agent's own group begin with `..`.
    let parts = || path.split('/').filter(|part| !matches!(*part, "" | ".."));
    for (index, part) in parts().enumerate() {
        let up_to = |count: usize| parts().take(count).collect::<Vec<_>>().join("/");
        let up_to_here = || up_to(index + 1);
        in_kubernetes |= part.contains("kubepods") || is_pod(part);
        if let Some(id) = container_id_in(part) {
            return if part.contains("conmon") {
                Place::Runtime
            } else if is_users {
                Place::UserContainer(up_to_here())
            } else {
                Place::Container { id, in_kubernetes }
            };
        }
        // Podman without systemd: every container's conmon. Talos, which has no systemd: the kubelet and containerd.
        if part == "conmon" || index == 0 && part == "podruntime" {
            return Place::Runtime;
        }
        if part == "user.slice" {
            is_users = true;
        } else if !is_users && is_guest(part) {
            // Older versions of LXC have a group above those of all guests.
            let is_of_all = matches!(part, "lxc" | "lxc.payload");
            return Place::Guest(up_to(index + 1 + usize::from(is_of_all)));
        } else if part.ends_with(".scope") {
            // A login session, or what a program started in a group of its own.
            return otherwise;
        } else if part.ends_with(".service") {
            if is_users {
                // `user@UID.service` is the user's systemd, with all that it runs.
                if !part.starts_with("user@") {
                    return Place::UserUnit(up_to_here());
                }
            } else if otherwise != Place::Elsewhere {
                return otherwise;
            } else if RUNTIME_UNITS.contains(&unit_name(part)) {
                otherwise = Place::Unit(part.to_owned());
            } else {
                return Place::Unit(part.to_owned());
            }
        }
    }
    otherwise
}

/// The 64 hexadecimal digits by which container runtimes name control groups.
pub(super) fn container_id_in(part: &str) -> Option<String> {
    part.split(|letter: char| !letter.is_ascii_hexdigit())
        .find(|run| run.len() == ID_DIGITS)
        .map(str::to_owned)
}

/// LXC, and machines of systemd-nspawn.
fn is_guest(part: &str) -> bool {
    part == "lxc"
        || part.starts_with("lxc.payload")
        || part.starts_with("systemd-nspawn@")
        || part.starts_with("machine-") && part.ends_with(".scope")
}

/// `pod` and a UID: the group of a pod, of the cgroupfs driver.
fn is_pod(part: &str) -> bool {
    const UID_CHARS: usize = 36;
    part.strip_prefix("pod").is_some_and(|uid| {
        uid.len() == UID_CHARS && uid.bytes().all(|it| it.is_ascii_hexdigit() || it == b'-')
    })
}

/// The name of a unit without `.service`.
pub(super) fn unit_name(unit: &str) -> &str {
    let unit = unit.rsplit('/').next().unwrap_or(unit);
    unit.strip_suffix(".service").unwrap_or(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> String {
        "0123456789abcdef".repeat(4)
    }

    fn container(in_kubernetes: bool) -> Place {
        Place::Container {
            id: id(),
            in_kubernetes,
        }
    }

    fn unit(name: &str) -> Place {
        Place::Unit(name.to_owned())
    }

    #[test]
    fn containers_of_all_runtimes_are_recognized() {
        const POD: &str = "0dc1c3ad_1234_4f6e_8c5e_2f9a3b1c0d4e";
        let pod = POD.replace('_', "-");
        let id = id();
        for (text, in_kubernetes) in [
            // Docker: v2 with systemd, v1 with cgroupfs.
            (format!("0::/system.slice/docker-{id}.scope\n"), false),
            (
                format!(
                    "12:pids:/docker/{id}\n1:name=systemd:/docker/{id}\n0::/system.slice/containerd.service\n"
                ),
                false,
            ),
            // Podman: v2, v2 with its split groups, v1 with cgroupfs.
            (format!("0::/machine.slice/libpod-{id}.scope\n"), false),
            (
                format!("0::/machine.slice/libpod-{id}.scope/container\n"),
                false,
            ),
            (
                format!("5:memory:/libpod_parent/libpod-{id}\n1:name=systemd:/\n0::/\n"),
                false,
            ),
            // containerd in Kubernetes: v2 with systemd, v1 with cgroupfs.
            (
                format!(
                    "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD}.slice/cri-containerd-{id}.scope\n"
                ),
                true,
            ),
            (
                format!("3:cpu,cpuacct:/kubepods/besteffort/pod{pod}/{id}\n2:devices:/\n"),
                true,
            ),
            // CRI-O.
            (
                format!("0::/kubepods.slice/kubepods-pod{POD}.slice/crio-{id}.scope/container\n"),
                true,
            ),
            // From a node agent and from another pod, with a private cgroup namespace.
            (
                format!("0::/../../kubepods-besteffort-pod{POD}.slice/cri-containerd-{id}.scope\n"),
                true,
            ),
            (format!("0::/../../pod{pod}/{id}\n"), true),
            (format!("0::/../cri-containerd-{id}.scope\n"), false),
            // containerd and the kubelet do not agree on the driver.
            (
                format!(
                    "0::/system.slice/containerd.service/kubepods-besteffort-pod{POD}.slice:cri-containerd:{id}\n"
                ),
                true,
            ),
            // A cluster in containers (kind): the outer container counts.
            (
                format!(
                    "0::/system.slice/docker-{id}.scope/kubelet.slice/kubelet-kubepods.slice/cri-containerd-{}.scope\n",
                    "f".repeat(64)
                ),
                false,
            ),
            // The same cluster from inside.
            (
                format!(
                    "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{POD}.slice/cri-containerd-{id}.scope\n"
                ),
                true,
            ),
        ] {
            assert_eq!(place(&text), container(in_kubernetes), "{text}");
        }
    }

    #[test]
    fn units_are_recognized_in_each_version_of_control_groups() {
        for text in [
            "0::/system.slice/nginx.service\n",
            "0::/../../system.slice/nginx.service/workers\n",
            // v1: only systemd's own hierarchy has a path.
            "4:memory:/\n1:name=systemd:/system.slice/nginx.service\n",
            // Hybrid.
            "4:memory:/system.slice/nginx.service\n1:name=systemd:/system.slice/nginx.service\n0::/system.slice/nginx.service\n",
            // A hierarchy of its own choice does not outrank that of systemd.
            "9:cpuset:/other.service\n0::/system.slice/nginx.service\n",
        ] {
            assert_eq!(place(text), unit("nginx.service"), "{text}");
        }
        assert_eq!(
            place("0::/system.slice/system-postgresql.slice/postgresql@15-main.service\n"),
            unit("postgresql@15-main.service")
        );
        assert_eq!(
            place("0::/user.slice/user-1000.slice/user@1000.service/app.slice/shop.service\n"),
            Place::UserUnit(
                "user.slice/user-1000.slice/user@1000.service/app.slice/shop.service".to_owned()
            )
        );
    }

    #[test]
    fn a_user_cannot_take_the_place_of_a_unit_or_a_container() {
        let id = id();
        for (path, expected) in [
            // Below a unit, its user may create groups.
            (
                format!("/system.slice/ci.service/docker/{id}"),
                unit("ci.service"),
            ),
            (
                "/system.slice/ci.service/system.slice/nginx.service".to_owned(),
                unit("ci.service"),
            ),
            // A container of a unit, as podman's Quadlet runs it.
            (
                format!("/system.slice/shop.service/libpod-payload-{id}"),
                unit("shop.service"),
            ),
            (
                format!(
                    "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{id}.scope"
                ),
                Place::UserContainer(format!(
                    "user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{id}.scope"
                )),
            ),
            (
                format!("/lxc.payload.a/kubepods/{id}"),
                Place::Guest("lxc.payload.a".to_owned()),
            ),
            (
                format!("/lxc/a/kubepods/{id}"),
                Place::Guest("lxc/a".to_owned()),
            ),
            // Nor pose as another system.
            (
                "/user.slice/user-1000.slice/user@1000.service/lxc.payload.a".to_owned(),
                Place::Elsewhere,
            ),
            (
                "/user.slice/user-1000.slice/user@1000.service/machine-a.scope".to_owned(),
                Place::Elsewhere,
            ),
            // A runtime's own processes, and one of its helpers.
            (
                "/system.slice/containerd.service".to_owned(),
                unit("containerd.service"),
            ),
            (
                "/system.slice/docker.service/a.service/b.scope".to_owned(),
                unit("docker.service"),
            ),
            (
                "/lxc.payload.a/system.slice/nginx.service".to_owned(),
                Place::Guest("lxc.payload.a".to_owned()),
            ),
        ] {
            assert_eq!(place(&format!("0::{path}\n")), expected, "{path}");
        }
    }

    #[test]
    fn sessions_and_runtimes_are_no_services() {
        let id = id();
        for text in [
            "",
            "0::/\n",
            "garbage\n0:\n",
            "0::/init.scope\n",
            "0::/user.slice/user-1000.slice/session-3.scope\n",
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-terminal-7.scope\n",
            "0::/kubepods.slice\n",
        ] {
            assert_eq!(place(text), Place::Elsewhere, "{text}");
        }
        for text in [
            format!("0::/machine.slice/libpod-conmon-{id}.scope\n"),
            format!("0::/system.slice/crio-conmon-{id}.scope\n"),
            "0::/../../podruntime/kubelet\n".to_owned(),
            "4:memory:/libpod_parent/conmon\n1:name=systemd:/\n".to_owned(),
        ] {
            assert_eq!(place(&text), Place::Runtime, "{text}");
        }
    }

    #[test]
    fn a_unit_is_named_without_its_type() {
        assert_eq!(unit_name("nginx.service"), "nginx");
        assert_eq!(
            unit_name("a/b/postgresql@15-main.service"),
            "postgresql@15-main"
        );
    }
}
