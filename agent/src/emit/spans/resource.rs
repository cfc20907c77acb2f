//! The resource of a span: the watched service, not the agent.

use opentelemetry::{KeyValue, Value};
use opentelemetry_sdk::Resource;
use uuid::Uuid;

use super::attributes::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
use crate::{sample::Target, text::bounded};

/// The host that the agent runs on. Empty strings mean unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// `/etc/machine-id`.
    pub id: String,
    pub name: String,
    /// An address of the host. Not in the semantic conventions, but Jaeger uses it to distinguish hosts: without it, Jaeger
    /// warns of clock skew for each span that outlasts its parent, as ours do.
    pub ip: String,
    /// Name of the Kubernetes node, and of the pod and its namespace if the agent shares the pod with the services.
    pub node: String,
    pub namespace: String,
    pub pod: String,
}

/// Maximum number of attributes taken from a target's OTEL_RESOURCE_ATTRIBUTES; the rest is ignored.
const MAX_ATTRIBUTES: usize = 64;
/// The attributes that the agent sets itself.
const OWN_ATTRIBUTES: usize = 12;

/// The namespace UUID that the semantic conventions define for deriving `service.instance.id`.
const INSTANCE_NAMESPACE: Uuid = Uuid::from_u128(0x4d63009a_8d0f_11ee_aad7_4c796ed8e320);

/// The resource of a watched service. Its own OTEL_RESOURCE_ATTRIBUTES win, except for what the node knows better: the process, and
/// where it runs.
pub fn resource(target: &Target, host: &Host) -> Resource {
    let mut attributes: Vec<KeyValue> = Vec::new();
    let mut set = |key: &str, value: Value| {
        if attributes.len() < MAX_ATTRIBUTES + OWN_ATTRIBUTES
            && !attributes.iter().any(|kv| kv.key.as_str() == key)
        {
            attributes.push(KeyValue::new(key.to_owned(), value));
        }
    };
    let text = |value: &str| Value::from(bounded(value, MAX_VALUE_BYTES));

    set("service.name", text(&service_name(target)));
    set("process.pid", i64::from(target.pid).into());
    set("process.executable.name", text(&target.exe));
    if let Some(pod) = &target.workload.pod {
        set("k8s.namespace.name", text(&pod.namespace));
        set("k8s.pod.name", text(&pod.name));
        set("k8s.container.name", text(&pod.container));
    }
    for (key, value) in [
        ("k8s.namespace.name", host.namespace.as_str()),
        ("k8s.pod.name", host.pod.as_str()),
        ("k8s.node.name", host.node.as_str()),
        (
            "container.id",
            target.container.as_deref().unwrap_or_default(),
        ),
    ] {
        if !value.is_empty() {
            set(key, text(value));
        }
    }
    for (key, value) in target.attributes.iter().take(MAX_ATTRIBUTES) {
        let key = bounded(key, MAX_KEY_BYTES);
        if !key.is_empty() {
            set(&key, text(value));
        }
    }
    set("service.instance.id", instance_id(target, host).into());
    for (key, value) in [
        ("host.id", host.id.as_str()),
        ("host.name", host.name.as_str()),
        ("ip", host.ip.as_str()),
    ] {
        if !value.is_empty() {
            set(key, text(value));
        }
    }
    Resource::builder_empty()
        .with_attributes(attributes)
        .build()
}

/// The service name; without one, the default of the OpenTelemetry SDKs. A name from the configuration wins, then the one by which the
/// service's own spans are found: whoever can send spans to the collector can use any name there.
fn service_name(target: &Target) -> String {
    let name = target.workload.declared_name.as_ref();
    let name = name.unwrap_or(&target.name);
    match (name.as_str(), target.exe.as_str()) {
        ("", "") => "unknown_service".to_owned(),
        ("", exe) => format!("unknown_service:{exe}"),
        (name, _) => name.to_owned(),
    }
}

/// An id that is constant for the life of a process and unique across processes and hosts.
fn instance_id(target: &Target, host: &Host) -> String {
    let seed = format!(
        "tailback1\n{}\n{}\n{}",
        host.id, target.pid, target.start_ns
    );
    Uuid::new_v5(&INSTANCE_NAMESPACE, seed.as_bytes()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{Pod, Workload};

    fn target() -> Target {
        Target {
            id: 1,
            name: "shop".into(),
            pid: 4242,
            start_ns: 77,
            exe: "uwsgi-core".into(),
            comm: "uwsgi".into(),
            ..Target::default()
        }
    }

    fn host() -> Host {
        Host {
            id: "0123456789abcdef".into(),
            name: "node-1".into(),
            ip: "192.0.2.7".into(),
            ..Host::default()
        }
    }

    fn get(resource: &Resource, key: &'static str) -> Option<String> {
        resource.get(&key.into()).map(|value| value.to_string())
    }

    #[test]
    fn the_resource_names_service_process_and_host() {
        let resource = resource(
            &Target {
                container: Some("c0ffee".into()),
                ..target()
            },
            &host(),
        );
        for (key, value) in [
            ("service.name", "shop"),
            ("process.pid", "4242"),
            ("process.executable.name", "uwsgi-core"),
            ("host.id", "0123456789abcdef"),
            ("host.name", "node-1"),
            ("ip", "192.0.2.7"),
            ("container.id", "c0ffee"),
        ] {
            assert_eq!(get(&resource, key).as_deref(), Some(value), "{key}");
        }
        assert_eq!(
            resource.len(),
            8,
            "with service.instance.id, and nothing of the agent or its SDK"
        );
    }

    #[test]
    fn unknown_values_are_absent() {
        let resource = resource(&target(), &Host::default());
        assert_eq!(get(&resource, "host.id"), None);
        assert_eq!(get(&resource, "container.id"), None);
    }

    #[test]
    fn the_instance_id_identifies_one_process() {
        let id = |target: &Target, host: &Host| {
            get(&resource(target, host), "service.instance.id").unwrap()
        };
        let one = id(&target(), &host());
        assert_eq!(
            one,
            id(
                &Target {
                    name: "renamed".into(),
                    ..target()
                },
                &host()
            )
        );
        assert_ne!(
            one,
            id(
                &Target {
                    start_ns: 78,
                    ..target()
                },
                &host()
            ),
            "a reused pid"
        );
        assert_ne!(
            one,
            id(
                &target(),
                &Host {
                    id: "other".into(),
                    ..host()
                }
            )
        );
        assert_eq!(Uuid::parse_str(&one).unwrap().get_version_num(), 5);
    }

    #[test]
    fn the_services_own_attributes_win_except_for_its_process() {
        let attributes = [
            ("deployment.environment.name", "prod"),
            ("service.instance.id", "shop-0"),
            ("host.name", "pod-shop-0"),
            ("service.name", "other"),
            ("process.pid", "1"),
        ];
        let attributes = attributes
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .to_vec();
        let resource = resource(
            &Target {
                attributes,
                ..target()
            },
            &host(),
        );
        assert_eq!(
            get(&resource, "deployment.environment.name").as_deref(),
            Some("prod")
        );
        assert_eq!(
            get(&resource, "service.instance.id").as_deref(),
            Some("shop-0")
        );
        assert_eq!(get(&resource, "host.name").as_deref(), Some("pod-shop-0"));
        assert_eq!(get(&resource, "service.name").as_deref(), Some("shop"));
        assert_eq!(get(&resource, "process.pid").as_deref(), Some("4242"));
    }

    #[test]
    fn the_node_knows_better_where_a_service_runs() {
        let pod = Pod {
            namespace: "default".into(),
            name: "shop-1".into(),
            container: "web".into(),
        };
        let claimed = [
            ("k8s.pod.name", "payment-1"),
            ("k8s.node.name", "elsewhere"),
            ("container.id", "f00"),
            ("k8s.deployment.name", "shop"),
        ];
        let target = Target {
            name: pod.service_name(),
            container: Some("c0ffee".into()),
            attributes: claimed.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec(),
            workload: Workload {
                pod: Some(pod),
                declared_name: Some("shop".into()),
                ..Workload::default()
            },
            ..target()
        };
        let host = Host {
            node: "node-1".into(),
            ..host()
        };
        let resource = resource(&target, &host);
        for (key, value) in [
            ("service.name", "shop"),
            ("k8s.namespace.name", "default"),
            ("k8s.pod.name", "shop-1"),
            ("k8s.container.name", "web"),
            ("k8s.node.name", "node-1"),
            ("container.id", "c0ffee"),
            ("k8s.deployment.name", "shop"),
        ] {
            assert_eq!(get(&resource, key).as_deref(), Some(value), "{key}");
        }
    }

    #[test]
    fn a_service_without_a_name_gets_the_sdk_default() {
        let nameless = Target {
            name: String::new(),
            ..target()
        };
        assert_eq!(service_name(&nameless), "unknown_service:uwsgi-core");
        assert_eq!(service_name(&Target::default()), "unknown_service");
    }

    #[test]
    fn hostile_names_are_bounded_and_escaped() {
        let hostile = Target {
            name: "evil\n\x1b[2J".repeat(1000),
            exe: "a\0b".into(),
            attributes: (0..1000)
                .map(|i| (format!("k{i}\n"), "v\r".repeat(5000)))
                .collect(),
            ..target()
        };
        let resource = resource(&hostile, &host());
        assert!(resource.len() <= MAX_ATTRIBUTES + OWN_ATTRIBUTES);
        for (key, value) in &resource {
            let value = value.to_string();
            assert!(key.as_str().len() <= MAX_KEY_BYTES && value.len() <= MAX_VALUE_BYTES);
            assert!(!value.contains(char::is_control) && !key.as_str().contains(char::is_control));
        }
    }
}
