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
}

/// Maximum number of attributes taken from a target's OTEL_RESOURCE_ATTRIBUTES; the rest is ignored.
const MAX_ATTRIBUTES: usize = 64;
/// The attributes that the agent sets itself.
const OWN_ATTRIBUTES: usize = 8;

/// The namespace UUID that the semantic conventions define for deriving `service.instance.id`.
const INSTANCE_NAMESPACE: Uuid = Uuid::from_u128(0x4d63009a_8d0f_11ee_aad7_4c796ed8e320);

/// The resource of a watched service. Its own OTEL_RESOURCE_ATTRIBUTES win, except for the name, which `Target` has
/// resolved already, and the process, which the agent knows better.
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
        (
            "container.id",
            target.container.as_deref().unwrap_or_default(),
        ),
    ] {
        if !value.is_empty() {
            set(key, text(value));
        }
    }
    Resource::builder_empty()
        .with_attributes(attributes)
        .build()
}

/// The service name; without one, the default of the OpenTelemetry SDKs.
fn service_name(target: &Target) -> String {
    match (target.name.as_str(), target.exe.as_str()) {
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
