//! Where the agent itself runs in Kubernetes, from its environment variables. The pod's specification sets them from the downward
//! API.
#![forbid(unsafe_code)]

use super::{
    facts::resource_attributes,
    namespaces::{self, is_initial},
};

/// Longest name in Kubernetes, bytes.
const MAX_NAME_BYTES: usize = 253;

/// Where the agent runs in Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Downward {
    pub node: Option<String>,
    /// Namespace of the pod, if the agent is a sidecar and so shares its pod with the services.
    pub namespace: Option<String>,
    pub pod: Option<String>,
}

impl Downward {
    /// Reads the agent's environment.
    pub fn read() -> Self {
        let own = Self::of(|name| std::env::var(name).ok());
        // The agent of a node is in a pod of its own.
        match is_initial(namespaces::PID) {
            Ok(false) => own,
            _ => Self {
                node: own.node,
                ..Self::default()
            },
        }
    }

    fn of(variable: impl Fn(&str) -> Option<String>) -> Self {
        let attributes = variable("OTEL_RESOURCE_ATTRIBUTES");
        let attributes = attributes.as_deref().map(resource_attributes);
        let attributes = attributes.unwrap_or_default();
        let value = |name: &str, attribute: &str| {
            let of_attribute = || {
                let found = attributes.iter().find(|(key, _)| key == attribute);
                found.map(|(_, value)| value.clone())
            };
            let value = variable(name).or_else(of_attribute);
            value.filter(|value| is_name(value))
        };
        Self {
            node: value("K8S_NODE_NAME", "k8s.node.name"),
            namespace: value("K8S_NAMESPACE_NAME", "k8s.namespace.name"),
            pod: value("K8S_POD_NAME", "k8s.pod.name"),
        }
    }
}

/// A name of a node, a namespace or a pod: a DNS name.
fn is_name(name: &str) -> bool {
    let is_plain = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.')
    };
    !name.is_empty() && name.len() <= MAX_NAME_BYTES && name.bytes().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_names_node_and_pod() {
        let environment = |name: &str| match name {
            "K8S_NODE_NAME" => Some("node-1".to_owned()),
            "OTEL_RESOURCE_ATTRIBUTES" => {
                Some("k8s.node.name=other,k8s.pod.name=shop-1,k8s.namespace.name=$(NS)".to_owned())
            }
            _ => None,
        };
        let expected = Downward {
            node: Some("node-1".to_owned()),
            namespace: None,
            pod: Some("shop-1".to_owned()),
        };
        assert_eq!(Downward::of(environment), expected);
        assert_eq!(Downward::of(|_| None), Downward::default());
    }
}
