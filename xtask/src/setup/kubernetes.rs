//! A Kubernetes cluster of one node, for `cargo xtask test --cluster`: its components, built by the wrapper module in
//! `tests/parts/kubernetes`, the program of a pod's sandbox, and the definitions of kinds that other projects add.

use std::path::{Path, PathBuf};

use super::{Action, Method, State};
use crate::{command::Cmd, tools};

/// As in the wrapper's go.mod.
const VERSION: &str = "v1.34.4";
const MINOR: &str = "34";
pub const HINT: &str = "install Go 1.24 or newer (https://go.dev/dl)";
/// Packages that contain the version.
const VERSION_PACKAGES: [&str; 2] = [
    "k8s.io/component-base/version",
    "k8s.io/client-go/pkg/version",
];
/// The module that has the source of the sandbox's program.
const PAUSE_SOURCE: &str = "k8s.io/kubernetes@v1.34.4/build/pause/linux/pause.c";
/// Where Debian installs network plugins, and those of them that the cluster uses.
const PLUGINS: &str = "/usr/lib/cni";
const USED_PLUGINS: [&str; 3] = ["bridge", "host-local", "loopback"];

/// A program of Kubernetes.
pub struct Component {
    pub name: &'static str,
    /// On 2 cores, measured. The first has most of the code of the others.
    takes: &'static str,
}

pub const COMPONENTS: &[Component] = &[
    Component {
        name: "kube-apiserver",
        takes: "about 3 minutes",
    },
    Component {
        name: "kubelet",
        takes: "about a minute",
    },
    Component {
        name: "kube-controller-manager",
        takes: "about a minute",
    },
    Component {
        name: "kube-scheduler",
        takes: "about 10 seconds",
    },
    Component {
        name: "kubectl",
        takes: "about 20 seconds",
    },
];

/// A definition of a kind of objects, in a module of the project that adds it.
pub struct Definition {
    pub name: &'static str,
    module: &'static str,
    file: &'static str,
}

pub const DEFINITIONS: &[Definition] = &[
    Definition {
        name: "ScaledObject",
        module: "github.com/kedacore/keda/v2@v2.17.2",
        file: "config/crd/bases/keda.sh_scaledobjects.yaml",
    },
    Definition {
        name: "PodMonitor",
        module: "github.com/prometheus-operator/prometheus-operator@v0.83.0",
        file: "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
    },
    Definition {
        name: "PrometheusRule",
        module: "github.com/prometheus-operator/prometheus-operator@v0.83.0",
        file: "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
    },
    Definition {
        name: "OpenShift's SCC",
        module: "github.com/openshift/api@v0.0.0-20251015095338-264e80a2b6e7",
        file: "security/v1/zz_generated.crd-manifests/0000_03_config-operator_01_securitycontextconstraints.crd.yaml",
    },
];

/// Directory of the programs.
pub fn directory() -> PathBuf {
    tools::cache().join("kubernetes").join(VERSION)
}

impl Component {
    fn path(&self) -> PathBuf {
        directory().join(self.name)
    }

    pub fn find(&self) -> State {
        let path = self.path();
        let arguments: &[&str] = if self.name == "kubectl" {
            &["version", "--client"]
        } else {
            &["--version"]
        };
        match Cmd::new(&path).args(arguments).output() {
            Ok(output) if output.contains(VERSION) => {
                State::Found(format!("{VERSION}, {}", path.display()))
            }
            _ => State::Missing(format!("{VERSION} is not at {}", path.display())),
        }
    }

    pub fn methods(&self) -> Vec<Method> {
        let mut flags = "-s -w".to_owned();
        for package in VERSION_PACKAGES {
            for (name, value) in [
                ("gitVersion", VERSION),
                ("gitMajor", "1"),
                ("gitMinor", MINOR),
            ] {
                flags += &format!(" -X {package}.{name}={value}");
            }
        }
        let build = Cmd::new("go")
            .env("GOTOOLCHAIN", "local")
            .env("CGO_ENABLED", "0")
            .current_dir(tools::root().join("tests/parts/kubernetes"))
            .args(["build", "-trimpath", "-ldflags", &flags, "-o"])
            .arg(self.path())
            .arg(format!("k8s.io/kubernetes/cmd/{}", self.name));
        let title = format!("built from its Go module, {} on 2 cores", self.takes);
        vec![Method {
            title,
            actions: vec![Action::Run(build)],
        }]
    }
}

pub fn network_plugins() -> State {
    let missing = USED_PLUGINS
        .iter()
        .find(|plugin| !Path::new(PLUGINS).join(plugin).is_file());
    match missing {
        Some(plugin) => State::Missing(format!("{PLUGINS}/{plugin} does not exist")),
        None => State::Found(PLUGINS.to_owned()),
    }
}

/// Path of the program of a pod's sandbox.
pub fn pause_program() -> PathBuf {
    directory().join("pause")
}

pub fn pause() -> State {
    let path = pause_program();
    if path.is_file() {
        State::Found(path.display().to_string())
    } else {
        State::Missing(format!("not at {}", path.display()))
    }
}

pub fn pause_methods() -> Vec<Method> {
    let compile = Cmd::new("gcc")
        .args(["-static", "-Os", "-o"])
        .arg(pause_program())
        .arg(modules().join(PAUSE_SOURCE));
    vec![Method {
        title: "compiled from Kubernetes's source".to_owned(),
        actions: vec![Action::Run(compile)],
    }]
}

impl Definition {
    /// The file, in Go's module cache.
    pub fn path(&self) -> PathBuf {
        modules().join(self.module).join(self.file)
    }

    pub fn find(&self) -> State {
        let path = self.path();
        if path.is_file() {
            State::Found(self.module.to_owned())
        } else {
            State::Missing(format!("not at {}", path.display()))
        }
    }

    pub fn methods(&self) -> Vec<Method> {
        let download = Cmd::new("go").args(["mod", "download", self.module]);
        vec![Method {
            title: format!("from the Go module {}", self.module),
            actions: vec![Action::Run(download.current_dir("/"))],
        }]
    }
}

/// Go's module cache.
fn modules() -> PathBuf {
    let found = Cmd::new("go").args(["env", "GOMODCACHE"]).output();
    PathBuf::from(found.unwrap_or_default().trim())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_wrapper_module_has_the_same_version() {
        let file = tools::root().join("tests/parts/kubernetes/go.mod");
        let text = fs::read_to_string(file).unwrap();
        assert!(text.contains(&format!("k8s.io/kubernetes {VERSION}")));
        assert!(PAUSE_SOURCE.contains(&format!("@{VERSION}/")));
        for component in COMPONENTS {
            let tool = format!("k8s.io/kubernetes/cmd/{}", component.name);
            assert!(text.contains(&tool), "{tool}");
        }
    }
}
