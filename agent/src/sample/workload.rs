//! Where a service runs, and who gave it its name.

use serde::{Deserialize, Serialize};

/// Where a service runs, and who gave it its name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    pub owner: Owner,
    pub named_by: NamedBy,
    /// Its Kubernetes container.
    pub pod: Option<Pod>,
    /// The name that the service gave itself by OTEL_SERVICE_NAME, if that is not its name.
    pub declared_name: Option<String>,
    /// It listens on a TCP port.
    pub listens: bool,
    /// One of several programs of a container or unit. Its name ends in that of the program.
    pub is_part: bool,
}

/// Identifies who owns a service. It stays the same when the service is replaced, and no other user can choose it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Owner {
    /// Name of a container, or its id if it has none.
    Container(String),
    /// A unit of the system's systemd.
    Unit(String),
    /// The process's user: of its real, effective and saved user ids, the highest.
    User(u32),
}

impl Default for Owner {
    fn default() -> Self {
        Self::User(0)
    }
}

/// Who gave a service its name, most trusted last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum NamedBy {
    /// The service: by OTEL_SERVICE_NAME, or the name of its program.
    #[default]
    Itself,
    /// systemd.
    Unit,
    /// A container runtime.
    Container,
    /// Kubernetes.
    Pod,
    /// The configuration file.
    Configuration,
}

/// The names of a container in Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub container: String,
}

impl Pod {
    /// As one service name. None of the parts contains a slash.
    pub fn service_name(&self) -> String {
        [&*self.namespace, &self.name, &self.container].join("/")
    }

    /// As one file name. None of the parts contains an underscore.
    pub fn file_name(&self) -> String {
        [&*self.namespace, &self.name, &self.container].join("_")
    }
}
