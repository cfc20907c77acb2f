//! Checks of the agent's capabilities, and of the user namespace in which it holds them.

use std::{fs, net::SocketAddr};

use rustix::thread::CapabilitySet;

use super::Check;
use crate::{
    cli::capabilities::{Held, REQUIRED, listed, to_add},
    config::signal::{Listen, Signal},
    target::namespaces::{self, is_initial},
};

/// The lowest port that needs no capability. In a container it is often 0.
const FIRST_UNPRIVILEGED_PORT: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";

/// `signal`: the adapters that are configured.
pub(super) fn checks(held: &Held, signal: &Signal) -> Vec<Check> {
    let missing = held.missing(&REQUIRED);
    let wanted: Vec<&str> = if missing.is_empty() {
        REQUIRED.map(|(name, _)| name).to_vec()
    } else {
        missing
    };
    let mut checks = vec![
        Check {
            name: "capabilities".into(),
            state: required(held),
            cost: "without BPF or PERFMON no eBPF program loads; without SYS_PTRACE the files and names of other users' processes are hidden",
            remedy: format!(
                "root, or `setcap cap_bpf,cap_perfmon,cap_sys_ptrace,cap_dac_read_search+p` on the binary; {}",
                to_add(&wanted)
            )
            .into(),
            required: true,
        },
        Check {
            name: "user namespace".into(),
            state: user_namespace(),
            cost: "no eBPF program loads: capabilities count in the agent's own user namespace only",
            remedy: "`hostUsers: true` (the default) in the pod's spec; podman: rootful, without --userns; systemd: without `PrivateUsers=`"
                .into(),
            required: true,
        },
        Check {
            name: "files of other users".into(),
            state: reads_others(held),
            cost: "environment and logs of other users' services are not read: no names from OTEL_SERVICE_NAME, no evidence from logs",
            remedy: to_add(&["DAC_READ_SEARCH"]).into(),
            required: false,
        },
        Check {
            name: "user of the adapter process".into(),
            state: drops_to_nobody(held),
            cost: "the adapter process does not start: consumers get no signal",
            remedy: format!("{}; or run the agent as another user", to_add(&["SETUID"])).into(),
            required: false,
        },
        Check {
            name: "killing a hung adapter process".into(),
            state: kills(held),
            cost: "an adapter process that hangs is not replaced; the signals that it serves fail open",
            remedy: format!("{}; or run the agent as another user", to_add(&["KILL"])).into(),
            required: false,
        },
    ];
    checks.extend(ports(held, signal));
    checks.extend(envoy(held, signal));
    checks
}

fn required(held: &Held) -> Result<String, String> {
    let missing = held.missing(&REQUIRED);
    if !missing.is_empty() {
        Err(format!("missing {}", listed(&missing)))
    } else if held.in_host_namespace {
        Ok(listed(&REQUIRED.map(|(name, _)| name)))
    } else {
        Err(format!(
            "{} do not count outside the host's user namespace",
            listed(&REQUIRED.map(|(name, _)| name))
        ))
    }
}

fn user_namespace() -> Result<String, String> {
    if is_initial(namespaces::USER)? {
        Ok("the initial one".to_owned())
    } else {
        Err("the agent is not in the host's user namespace".to_owned())
    }
}

fn reads_others(held: &Held) -> Result<String, String> {
    for (name, bit) in [
        ("CAP_DAC_READ_SEARCH", CapabilitySet::DAC_READ_SEARCH),
        ("CAP_DAC_OVERRIDE", CapabilitySet::DAC_OVERRIDE),
    ] {
        if held.has(bit) {
            return Ok(name.to_owned());
        }
    }
    Err("missing CAP_DAC_READ_SEARCH".to_owned())
}

/// Whether the adapter process can become nobody (`adapters/privileges.rs`).
fn drops_to_nobody(held: &Held) -> Result<String, String> {
    if !held.is_root {
        Ok("the agent's own".to_owned())
    } else if held.has(CapabilitySet::SETUID) {
        Ok("nobody, by CAP_SETUID".to_owned())
    } else {
        Err("missing CAP_SETUID: root cannot become nobody".to_owned())
    }
}

/// Whether the agent can kill the adapter process, which runs as nobody if the agent runs as root.
fn kills(held: &Held) -> Result<String, String> {
    if !held.is_root {
        Ok("killed by the agent, as a process of the same user".to_owned())
    } else if held.has(CapabilitySet::KILL) {
        Ok("killed by the agent, by CAP_KILL".to_owned())
    } else {
        Err("missing CAP_KILL: root cannot kill a process of nobody".to_owned())
    }
}

/// The line about adapters that listen on a privileged port.
fn ports(held: &Held, signal: &Signal) -> Option<Check> {
    let first = fs::read_to_string(FIRST_UNPRIVILEGED_PORT).ok();
    let first = first.and_then(|text| text.trim().parse().ok());
    let privileged = privileged(signal, first.unwrap_or(1_024));
    if privileged.is_empty() {
        return None;
    }
    let ports = privileged.join(", ");
    Some(Check {
        name: "ports of adapters".into(),
        state: if held.has(CapabilitySet::NET_BIND_SERVICE) {
            Ok(format!("{ports}, by CAP_NET_BIND_SERVICE"))
        } else {
            Err(format!("missing CAP_NET_BIND_SERVICE for {ports}"))
        },
        cost: "the adapter does not listen: its consumers get no signal",
        remedy: format!(
            "a port from 1024 on in [signal]; {}",
            to_add(&["NET_BIND_SERVICE"])
        )
        .into(),
        required: false,
    })
}

/// The addresses of adapters with a port below `first`.
fn privileged(signal: &Signal, first: u16) -> Vec<String> {
    let http = signal.http.iter().map(|it| &it.listen);
    let keda = signal.keda.iter().map(|it| &it.listen);
    let haproxy = signal.haproxy.iter().map(|it| &it.listen);
    let orca = signal.orca.iter().map(|it| &it.listen);
    let all = http.chain(keda).chain(haproxy).chain(orca);
    let privileged = all.filter(|listen| {
        let Listen::Tcp(address) = listen else {
            return false;
        };
        let port = SocketAddr::port(address);
        port != 0 && port < first
    });
    privileged.map(ToString::to_string).collect()
}

/// The line about Envoy's runtime layer: the adapter process is nobody, and writes in a directory of another user.
fn envoy(held: &Held, signal: &Signal) -> Option<Check> {
    if signal.envoy.is_empty() || !held.is_root {
        return None;
    }
    Some(Check {
        name: "Envoy's runtime layer".into(),
        state: if held.has(CapabilitySet::DAC_OVERRIDE) {
            Ok("written by CAP_DAC_OVERRIDE".to_owned())
        } else {
            Err("missing CAP_DAC_OVERRIDE".to_owned())
        },
        cost: "the layer is not written, unless nobody (65534) may write to the directory of symlink_root",
        remedy: format!(
            "`chown 65534` that directory, or {}",
            to_add(&["DAC_OVERRIDE"])
        )
        .into(),
        required: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const LOADS: CapabilitySet = CapabilitySet::BPF
        .union(CapabilitySet::PERFMON)
        .union(CapabilitySet::SYS_PTRACE);

    fn signal(text: &str) -> Signal {
        Config::parse(text).unwrap().signal
    }

    #[test]
    fn capabilities_of_another_user_namespace_are_not_called_missing() {
        let mut inside = Held::of_root(LOADS);
        assert!(required(&inside).is_ok());
        inside.in_host_namespace = false;
        let why = required(&inside).unwrap_err();
        assert!(
            why.contains("do not count") && !why.contains("missing"),
            "{why}"
        );
    }

    #[test]
    fn what_root_needs_for_the_adapter_process_another_user_does_not() {
        let mut agent = Held::of_root(LOADS);
        assert!(drops_to_nobody(&agent).is_err() && kills(&agent).is_err());
        agent.set |= CapabilitySet::SETUID | CapabilitySet::KILL;
        assert!(drops_to_nobody(&agent).is_ok() && kills(&agent).is_ok());
        agent.set = LOADS;
        agent.is_root = false;
        assert!(drops_to_nobody(&agent).is_ok() && kills(&agent).is_ok());
    }

    #[test]
    fn either_capability_reads_files_of_other_users() {
        assert!(reads_others(&Held::of_root(LOADS)).is_err());
        assert!(reads_others(&Held::of_root(CapabilitySet::DAC_OVERRIDE)).is_ok());
        assert!(reads_others(&Held::of_root(CapabilitySet::DAC_READ_SEARCH)).is_ok());
    }

    #[test]
    fn lines_of_adapters_appear_only_if_they_are_configured() {
        assert!(envoy(&Held::of_root(LOADS), &signal("")).is_none());
        let layer = signal(
            "[[signal.envoy]]\ntarget = \"shop\"\ncluster = \"shop\"\nsymlink_root = \"/run/envoy/shop\"\n",
        );
        let line = envoy(&Held::of_root(LOADS), &layer).unwrap();
        assert_eq!(line.state.unwrap_err(), "missing CAP_DAC_OVERRIDE");
        let http = signal("[signal.http]\nlisten = \"127.0.0.1:80\"\n");
        assert_eq!(privileged(&http, 1_024), ["127.0.0.1:80"]);
        assert!(privileged(&http, 0).is_empty());
    }
}
