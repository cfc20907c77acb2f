//! The configuration of the cluster's components.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::cluster::Directories;

/// Address of the node and of the API server.
pub const NODE_ADDRESS: &str = "10.99.0.1";
pub const API_PORT: u16 = 6443;
pub const NODE: &str = "node-1";
pub const SERVICE_RANGE: &str = "10.98.0.0/24";
const POD_RANGE: &str = "10.97.0.0/24";
/// Reference of the image of sandboxes.
const SANDBOX_IMAGE: &str = "localhost/pause:1";
/// The users of the API, by the names of their kubeconfig files: user and group.
const USERS: [(&str, &str, &str); 4] = [
    ("admin", "admin", "system:masters"),
    ("controller-manager", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
    ("node", "system:node:node-1", "system:nodes"),
];

/// Writes all files.
pub fn write(directories: &Directories) -> Result<()> {
    let base = directories.base();
    let write = |name: &str, text: &str| {
        fs::write(base.join(name), text).with_context(|| format!("write {name}"))
    };
    let mut tokens = String::new();
    for (file, user, group) in USERS {
        let token = fs::read_to_string("/proc/sys/kernel/random/uuid").context("a token")?;
        let token = token.trim();
        let group = if group.is_empty() {
            String::new()
        } else {
            format!(",{group}")
        };
        tokens += &format!("{token},{user},{user}{group}\n");
        write(&format!("{file}.kubeconfig"), &kubeconfig(token))?;
    }
    write("tokens.csv", &tokens)?;
    write("containerd.toml", &containerd(base))?;
    write("kubelet.yaml", &kubelet(base))?;
    fs::create_dir(base.join("cni"))?;
    write("cni/10-bridge.conflist", &network(base))
}

/// The connection to the API server. Its certificate is its own; nobody else is in the network namespace.
fn kubeconfig(token: &str) -> String {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {
            "server": format!("https://{NODE_ADDRESS}:{API_PORT}"), "insecure-skip-tls-verify": true,
        }}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    })
    .to_string()
}

/// Everything below the given directory. `restrict_oom_score_adj`: for machines that do not allow to lower it.
fn containerd(base: &Path) -> String {
    let base = base.display();
    format!(
        "version = 2
root = \"{base}/containerd\"
state = \"/run/containerd\"
[grpc]
  address = \"/run/containerd/containerd.sock\"
[plugins.\"io.containerd.internal.v1.opt\"]
  path = \"{base}/opt\"
[plugins.\"io.containerd.grpc.v1.cri\"]
  sandbox_image = \"{SANDBOX_IMAGE}\"
  restrict_oom_score_adj = true
  [plugins.\"io.containerd.grpc.v1.cri\".containerd]
    snapshotter = \"overlayfs\"
    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]
      runtime_type = \"io.containerd.runc.v2\"
  [plugins.\"io.containerd.grpc.v1.cri\".cni]
    bin_dir = \"{}\"
    conf_dir = \"{base}/cni\"
",
        crate::cluster::CNI_PLUGINS
    )
}

/// A bridge, with addresses from a file.
fn network(base: &Path) -> String {
    json!({
        "cniVersion": "0.4.0",
        "name": "bridge",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "ipMasq": false,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": POD_RANGE}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": base.join("addresses"),
            },
        }],
    })
    .to_string()
}

/// `syncFrequency`: a changed ConfigMap reaches a pod within seconds; the default is a minute. The only other difference to a real node
/// is that the API server's requests are not authenticated, and that no limit on disk space evicts pods.
fn kubelet(base: &Path) -> String {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": NODE_ADDRESS,
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "enforceNodeAllocatable": ["pods"],
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "0%", "imagefs.available": "0%"},
        "failCgroupV1": false,
        "failSwapOn": false,
        "imageGCHighThresholdPercent": 100,
        "makeIPTablesUtilChains": false,
        "podCIDR": POD_RANGE,
        "podLogsDir": base.join("pod-logs"),
        "protectKernelDefaults": false,
        "readOnlyPort": 0,
        "resolvConf": "",
        "syncFrequency": "5s",
        "volumePluginDir": base.join("volume-plugins"),
    })
    .to_string()
}
