//! Starts the components of a cluster of one node, in this process's network namespace and mount namespace.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{MountFlags, mount};
use tailback_tests::{process::Process, program, temp::TempDir, wait};

use crate::{
    config::{self, API_PORT, NODE, NODE_ADDRESS, SERVICE_RANGE},
    kubectl::Kubectl,
    remains,
};

/// Directory of Debian's network plugins.
pub const CNI_PLUGINS: &str = "/usr/lib/cni";
/// Directories of which the components do not let a part be moved elsewhere.
const PRIVATE: [&str; 3] = ["/run", "/var/lib/kubelet", "/var/lib/cni"];
/// Address of the other end of the node's network device: the default route, which the components need to find their own address.
const GATEWAY: &str = "10.99.0.254";
/// Deadline for the API server and for the node. They take 4 s and 8 s on an idle machine.
const START_DEADLINE: Duration = Duration::from_secs(120);

/// The files of a cluster.
pub struct Directories {
    temp: TempDir,
}

impl Directories {
    pub fn base(&self) -> &Path {
        self.temp.path()
    }
}

/// A running cluster.
pub struct Cluster {
    /// In the order in which they are ended.
    components: Vec<Process>,
    kubectl: Kubectl,
    /// Dropped after the processes.
    directories: Directories,
}

/// A file from `cargo xtask test --cluster`, by the environment variable that names it.
pub fn given(variable: &str) -> Result<PathBuf> {
    let path = env::var_os(variable).map(PathBuf::from);
    path.with_context(|| format!("{variable} is not set: run `cargo xtask test --cluster`"))
}

/// A program of Kubernetes.
pub fn kubernetes(name: &str) -> Result<PathBuf> {
    Ok(given("TAILBACK_KUBERNETES")?.join(name))
}

impl Cluster {
    pub fn start() -> Result<Self> {
        let directories = Directories {
            temp: TempDir::new("cluster")?,
        };
        remains::register(directories.base())?;
        private_directories()?;
        network()?;
        config::write(&directories)?;
        let base = directories.base();
        let kubectl = Kubectl::new(&kubernetes("kubectl")?, base)?;
        let mut cluster = Self {
            components: Vec::new(),
            kubectl,
            directories,
        };
        cluster.start_api_server()?;
        cluster.start_controllers()?;
        cluster.start_node()?;
        Ok(cluster)
    }

    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// Ends all processes, and removes all files.
    pub fn end(self) -> Result<()> {
        let base = self.directories.base().to_owned();
        drop(self);
        remains::check_removed(&base)
    }

    /// The output of each component.
    pub fn logs(&self) -> impl Iterator<Item = (&str, String)> {
        self.components.iter().map(|component| {
            let lines = component.lines().all().into_iter().map(|line| line.text);
            (component.name(), lines.collect::<Vec<_>>().join("\n"))
        })
    }

    fn path(&self, name: &str) -> String {
        self.directories.base().join(name).display().to_string()
    }

    fn start_component(&mut self, name: &str, program: &Path, arguments: &[String]) -> Result<()> {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.directories.base());
        self.components
            .insert(0, Process::start(name, &mut command)?);
        Ok(())
    }

    fn start_api_server(&mut self) -> Result<()> {
        let storage = "http://127.0.0.1:2379";
        let arguments = [
            format!("--data-dir={}", self.path("etcd")),
            format!("--listen-client-urls={storage}"),
            format!("--advertise-client-urls={storage}"),
            "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
            // Nothing is kept: no need to wait for the disk.
            "--unsafe-no-fsync".to_owned(),
        ];
        self.start_component("etcd", &program::need(&["etcd"])?, &arguments)?;

        let key = self.path("service-accounts.key");
        let mut openssl = Command::new(program::need(&["openssl"])?);
        let made = openssl
            .args(["genpkey", "-algorithm", "RSA", "-out", &key])
            .output()?;
        let error = String::from_utf8_lossy(&made.stderr);
        ensure!(made.status.success(), "openssl genpkey: {error}");
        let arguments = [
            format!("--etcd-servers={storage}"),
            format!("--bind-address={NODE_ADDRESS}"),
            format!("--advertise-address={NODE_ADDRESS}"),
            format!("--secure-port={API_PORT}"),
            format!("--cert-dir={}", self.path("certificates")),
            format!("--token-auth-file={}", self.path("tokens.csv")),
            "--authorization-mode=Node,RBAC".to_owned(),
            format!("--service-cluster-ip-range={SERVICE_RANGE}"),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={key}"),
            format!("--service-account-signing-key-file={key}"),
            "--allow-privileged=true".to_owned(),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
        ];
        self.start_component("kube-apiserver", &kubernetes("kube-apiserver")?, &arguments)?;
        wait::until("the API server to be ready", START_DEADLINE, || {
            self.check_running()?;
            let ready = self.kubectl.run(&["get", "--raw", "/readyz"]);
            Ok(ready.is_ok().then_some(()))
        })
    }

    fn start_controllers(&mut self) -> Result<()> {
        let arguments = [
            format!(
                "--kubeconfig={}",
                self.path("controller-manager.kubeconfig")
            ),
            format!(
                "--service-account-private-key-file={}",
                self.path("service-accounts.key")
            ),
            format!("--root-ca-file={}", self.path("certificates/apiserver.crt")),
            "--use-service-account-credentials=true".to_owned(),
            "--leader-elect=false".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
        ];
        let program = kubernetes("kube-controller-manager")?;
        self.start_component("kube-controller-manager", &program, &arguments)?;
        let arguments = [
            format!("--kubeconfig={}", self.path("scheduler.kubeconfig")),
            "--leader-elect=false".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
        ];
        let program = kubernetes("kube-scheduler")?;
        self.start_component("kube-scheduler", &program, &arguments)
    }

    fn start_node(&mut self) -> Result<()> {
        let arguments = [format!("--config={}", self.path("containerd.toml"))];
        self.start_component("containerd", &program::need(&["containerd"])?, &arguments)?;
        wait::until("containerd", START_DEADLINE, || {
            self.check_running()?;
            Ok(ctr(&["version"]).is_ok().then_some(()))
        })?;
        for image in ["TAILBACK_PAUSE_IMAGE", "TAILBACK_POD_IMAGE"] {
            ctr(&["images", "import", &given(image)?.display().to_string()])?;
        }
        let arguments = [
            format!("--config={}", self.path("kubelet.yaml")),
            format!("--kubeconfig={}", self.path("node.kubeconfig")),
            format!("--hostname-override={NODE}"),
            format!("--node-ip={NODE_ADDRESS}"),
            format!("--root-dir={}", self.path("kubelet")),
            format!("--cert-dir={}", self.path("kubelet-certificates")),
        ];
        self.start_component("kubelet", &kubernetes("kubelet")?, &arguments)?;
        let ready = r#"{.status.conditions[?(@.type=="Ready")].status}"#;
        wait::until("the node to be ready", START_DEADLINE, || {
            self.check_running()?;
            let status = self.kubectl.field(&["node", NODE], ready);
            Ok(status.is_ok_and(|status| status == "True").then_some(()))
        })
    }

    fn check_running(&self) -> Result<()> {
        self.components.iter().try_for_each(Process::check_running)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.components.clear();
        // Nothing may be mounted below the directory when it is removed.
        remains::remove();
    }
}

/// Runs containerd's client in the namespace of Kubernetes.
pub fn ctr(arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program::need(&["ctr"])?);
    command.args(["--namespace", "k8s.io"]).args(arguments);
    output(&mut command)
}

/// Runs a command to completion; an error has what it printed on standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("start {name}"))?;
    let arguments: Vec<_> = command
        .get_args()
        .map(|word| word.to_string_lossy())
        .collect();
    ensure!(
        output.status.success(),
        "{name} {}: {}: {}{}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Mounts an empty file system where the components leave files that would outlive them.
fn private_directories() -> Result<()> {
    for directory in PRIVATE {
        if !Path::new(directory).exists() {
            fs::create_dir_all(directory).with_context(|| format!("create {directory}"))?;
            remains::register_directory(directory);
        }
        mount("tmpfs", directory, "tmpfs", MountFlags::NOSUID, None)
            .with_context(|| format!("mount a tmpfs on {directory}"))?;
    }
    fs::create_dir_all("/run/containerd").context("create /run/containerd")
}

/// The devices of the node.
fn network() -> Result<()> {
    let node = format!("{NODE_ADDRESS}/24");
    let steps: [&[&str]; 6] = [
        &["link", "set", "lo", "up"],
        &[
            "link", "add", "node", "type", "veth", "peer", "name", "gateway",
        ],
        &["link", "set", "gateway", "up"],
        &["address", "add", &node, "dev", "node"],
        &["link", "set", "node", "up"],
        &["route", "add", "default", "via", GATEWAY, "dev", "node"],
    ];
    for step in steps {
        output(Command::new(program::need(&["ip"])?).args(step))?;
    }
    // Of this network namespace.
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("forward between pods")
}
