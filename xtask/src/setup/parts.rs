//! The table of everything that is neither in the repository nor on crates.io.

use std::path::Path;

use super::{
    Action, Method, Purpose,
    Purpose::{Boot, Build, Ci, Cluster, Test},
    State,
    cargo_tools::{self, CargoTool},
    ebpf, envoy, helm, jaeger,
    kubernetes::{self, Component, Definition},
    vmlinuz,
};
use crate::{
    command::Cmd,
    kernels::{KERNELS, Kernel},
    tools,
};

/// In installation order: bpf-linker is built to match the toolchain.
pub fn table() -> Vec<Part> {
    let mut table = vec![
        program("gcc", &[Build], &["gcc", "libc6-dev"]),
        part("eBPF toolchain", &[Test], Kind::Toolchain),
        part("bpf-linker", &[Test], Kind::BpfLinker),
        program("ss", &[Test], &["iproute2"]),
        program("nstat", &[Test], &["iproute2"]),
        program("python3", &[Test], &["python3"]),
        part("uWSGI", &[Test], Kind::Uwsgi),
        program("redis-server", &[Test], &["redis-server"]),
        program("redis-benchmark", &[Test], &["redis-tools"]),
        program("nginx", &[Test], &["nginx-light"]),
        program("apache2", &[Test], &["apache2-bin"]),
        program("wrk", &[Test], &["wrk"]),
        program("memcached", &[Test], &["memcached"]),
        part("PostgreSQL", &[Test], Kind::Postgres),
        program("haproxy", &[Test], &["haproxy"]),
        part("Envoy", &[Test], Kind::Envoy),
        program("pgbouncer", &[Test], &["pgbouncer"]),
        program("mosquitto", &[Test], &["mosquitto"]),
        program("stress-ng", &[Test], &["stress-ng"]),
        program("flock", &[Test], &["util-linux"]),
        program(
            "mariadbd",
            &[Test],
            &["mariadb-server-core", "mariadb-client-core"],
        ),
        program("puma", &[Test], &["puma"]),
        program("php", &[Test], &["php-cli"]),
        program("openssl", &[Test, Cluster], &["openssl"]),
        part("Go", &[Test, Cluster], Kind::Go),
        program("node", &[Test], &["nodejs"]),
        // The browser of the live page, without its window: 100 MB.
        program(
            "chromium-headless-shell",
            &[Test],
            &["chromium-headless-shell"],
        ),
        program("javac", &[Test], &["default-jdk-headless"]),
        part("HikariCP", &[Test], Kind::Hikari),
        program("prometheus", &[Test], &["prometheus"]),
        program("promtool", &[Test], &["prometheus"]),
        program("tc", &[Test], &["iproute2"]),
        program("iptables", &[Test], &["iptables"]),
        module("psycopg2", &["python3", "python3-psycopg2"]),
        module("uvicorn", &["python3", "python3-uvicorn"]),
        module(
            "psycopg_pool",
            &["python3", "python3-psycopg", "python3-psycopg-pool"],
        ),
        module("gunicorn", &["python3", "python3-gunicorn"]),
        module("pymysql", &["python3", "python3-pymysql"]),
        module("websockets", &["python3", "python3-websockets"]),
        module("paho.mqtt.client", &["python3", "python3-paho-mqtt"]),
        program("xz", &[Test], &["xz-utils"]),
        program("podman", &[Test], &["podman", "runc"]),
        program("qemu-system-x86_64", &[Test, Boot], &["qemu-system-x86"]),
        part("Jaeger", &[Test, Cluster], Kind::Jaeger),
        part("Helm", &[Test, Cluster], Kind::Helm),
        program("systemd-analyze", &[Test], &["systemd"]),
        program("setpriv", &[Test], &["util-linux"]),
        part("rustfmt", &[Ci], Kind::Component("rustfmt")),
        part("clippy", &[Ci], Kind::Component("cargo-clippy")),
        part(
            "cargo-nextest",
            &[Test],
            Kind::CargoTool(&cargo_tools::NEXTEST),
        ),
        program("dpkg-deb", &[Test], &["dpkg"]),
        program("man", &[Test], &["man-db"]),
        program("zsh", &[Test], &["zsh"]),
        program("fish", &[Test], &["fish"]),
        part("cargo-deny", &[Ci], Kind::CargoTool(&cargo_tools::DENY)),
    ];
    table.extend([
        program("etcd", &[Cluster], &["etcd-server"]),
        program("containerd", &[Cluster], &["containerd"]),
        program("runc", &[Cluster], &["runc"]),
        program("ip", &[Cluster], &["iproute2"]),
        program("unshare", &[Cluster], &["util-linux"]),
        program("bpftool", &[Cluster], &["bpftool"]),
        part("network plugins", &[Cluster], Kind::NetworkPlugins),
    ]);
    table.extend(
        kubernetes::COMPONENTS
            .iter()
            .map(|component| part(component.name, &[Cluster], Kind::Kubernetes(component))),
    );
    // Its source is in a module that the components have downloaded.
    table.push(part("pause", &[Cluster], Kind::Pause));
    table.extend(
        kubernetes::DEFINITIONS
            .iter()
            .map(|one| part(one.name, &[Cluster], Kind::Definition(one))),
    );
    table.extend(KERNELS.iter().map(|kernel| {
        part(
            &format!("kernel {}", kernel.name),
            &[Test],
            Kind::Kernel(kernel),
        )
    }));
    table
}

/// One part that setup can find or install.
pub struct Part {
    pub name: String,
    purposes: &'static [Purpose],
    kind: Kind,
}

enum Kind {
    /// The toolchain that builds the eBPF object.
    Toolchain,
    BpfLinker,
    /// The Debian packages of the program that the part is named after.
    Program(&'static [&'static str]),
    /// The Debian packages of the Python module that the part is named after.
    Module(&'static [&'static str]),
    /// Its server, which is outside of `PATH`, and its client.
    Postgres,
    /// Including its Python plugin.
    Uwsgi,
    /// A pool of connections for Java, with the driver for PostgreSQL.
    Hikari,
    Jaeger,
    Helm,
    Envoy,
    /// New enough to download the toolchain version that a module requires.
    Go,
    /// A component of the Rust toolchain, detected by one of its programs.
    Component(&'static str),
    CargoTool(&'static CargoTool),
    /// Plugins that connect pods, which are outside of `PATH`.
    NetworkPlugins,
    Kubernetes(&'static Component),
    /// The program of a pod's sandbox.
    Pause,
    /// Definitions of kinds of objects that Kubernetes itself does not have.
    Definition(&'static Definition),
    Kernel(&'static Kernel),
}

fn part(name: &str, purposes: &'static [Purpose], kind: Kind) -> Part {
    Part {
        name: name.to_owned(),
        purposes,
        kind,
    }
}

fn program(name: &str, purposes: &'static [Purpose], packages: &'static [&'static str]) -> Part {
    part(name, purposes, Kind::Program(packages))
}

fn module(name: &str, packages: &'static [&'static str]) -> Part {
    part(name, &[Test], Kind::Module(packages))
}

impl Part {
    pub fn is_for(&self, purpose: Purpose) -> bool {
        let is_for_cluster_only = self.purposes.iter().all(|one| *one == Cluster);
        let all = purpose == Purpose::All && !is_for_cluster_only;
        all || self.purposes.contains(&purpose) || self.purposes.contains(&Build)
    }

    pub fn kernel(&self) -> Option<&'static Kernel> {
        match self.kind {
            Kind::Kernel(kernel) => Some(kernel),
            _ => None,
        }
    }

    /// Whether the part is present.
    pub fn find(&self) -> State {
        match &self.kind {
            Kind::Toolchain => ebpf::toolchain(),
            Kind::BpfLinker => ebpf::linker(),
            Kind::Program(_) => match tools::program(&self.name) {
                Some(file) => State::Found(file.display().to_string()),
                None => State::Missing("not on PATH".to_owned()),
            },
            Kind::Module(_) => match tailback_tests::python::with(&[&self.name]) {
                Ok(file) => State::Found(format!("for {}", file.display())),
                Err(error) => State::Missing(error.to_string()),
            },
            Kind::Postgres => postgres(),
            Kind::Uwsgi => uwsgi(),
            Kind::Hikari => hikari(),
            Kind::Jaeger => jaeger::find(),
            Kind::Helm => helm::find(),
            Kind::Envoy => envoy::find(),
            Kind::Go => go(),
            Kind::Component(program) => component(program),
            Kind::CargoTool(tool) => tool.find(),
            Kind::NetworkPlugins => kubernetes::network_plugins(),
            Kind::Kubernetes(component) => component.find(),
            Kind::Pause => kubernetes::pause(),
            Kind::Definition(one) => one.find(),
            Kind::Kernel(kernel) => vmlinuz::locate(kernel),
        }
    }

    /// Methods to install it, best first.
    pub fn methods(&self) -> Vec<Method> {
        match &self.kind {
            Kind::Toolchain => ebpf::toolchain_methods(),
            Kind::BpfLinker => ebpf::linker_methods(),
            Kind::Program(packages) | Kind::Module(packages) => debian(packages),
            Kind::Postgres => debian(&["postgresql", "postgresql-client"]),
            Kind::Uwsgi => debian(&["uwsgi-core", "uwsgi-plugin-python3"]),
            Kind::Hikari => debian(&[
                "libhikaricp-java",
                "libpostgresql-jdbc-java",
                "libslf4j-java",
            ]),
            Kind::Jaeger => jaeger::methods(),
            Kind::Helm => helm::methods(),
            Kind::Envoy => envoy::methods(),
            Kind::Go => debian(&["golang-go"]),
            Kind::Component(_) => {
                let add = Cmd::new("rustup").args(["component", "add", &self.name]);
                one("from rustup".to_owned(), Action::Run(add))
            }
            Kind::CargoTool(tool) => tool.methods(),
            Kind::NetworkPlugins => debian(&["containernetworking-plugins"]),
            Kind::Kubernetes(component) => component.methods(),
            Kind::Pause => kubernetes::pause_methods(),
            Kind::Definition(one) => one.methods(),
            Kind::Kernel(kernel) => vmlinuz::methods(kernel),
        }
    }

    /// Manual instruction where no method exists.
    pub fn hint(&self) -> &'static str {
        match self.kind {
            Kind::Toolchain => "install rustup (https://rustup.rs), then run setup again",
            Kind::Jaeger => jaeger::HINT,
            Kind::Helm => helm::HINT,
            Kind::Envoy => envoy::HINT,
            Kind::Kubernetes(_) => kubernetes::HINT,
            Kind::Go => "install Go 1.21 or newer (https://go.dev/dl), then run setup again",
            _ => "not available on this machine",
        }
    }
}

fn one(title: String, action: Action) -> Vec<Method> {
    let actions = vec![action];
    vec![Method { title, actions }]
}

fn debian(packages: &'static [&'static str]) -> Vec<Method> {
    let title = format!("Debian's {}, a few seconds", packages.join(" and "));
    one(title, Action::Apt(packages))
}

/// Debian packages uWSGI's languages as plugins; other builds include them.
fn uwsgi() -> State {
    const PLUGIN: &str = "/usr/lib/uwsgi/plugins/python3_plugin.so";
    match (tools::program("uwsgi-core"), tools::program("uwsgi")) {
        (Some(_), _) if !Path::new(PLUGIN).exists() => {
            State::Missing(format!("{PLUGIN} does not exist"))
        }
        (Some(file), _) | (None, Some(file)) => State::Found(file.display().to_string()),
        (None, None) => State::Missing("not on PATH".to_owned()),
    }
}

fn hikari() -> State {
    match tailback_tests::hikari::class_path() {
        Ok(path) => State::Found(path),
        Err(error) => State::Missing(error.to_string()),
    }
}

fn postgres() -> State {
    match (
        tailback_tests::postgres::tool("initdb"),
        tools::program("psql"),
    ) {
        (Ok(file), Some(_)) => State::Found(file.display().to_string()),
        (Err(error), _) => State::Missing(error.to_string()),
        (_, None) => State::Missing("psql is not on PATH".to_owned()),
    }
}

fn go() -> State {
    /// Minimum minor version: the first that downloads toolchains itself.
    const MIN_MINOR: u32 = 21;
    // go version go1.26.8 linux/amd64
    let Ok(output) = Cmd::new("go").arg("version").output() else {
        return State::Missing("`go version` does not run".to_owned());
    };
    let minor = output
        .split("go1.")
        .nth(1)
        .and_then(|rest| rest.split(|letter: char| !letter.is_ascii_digit()).next())
        .and_then(|minor| minor.parse::<u32>().ok());
    match minor {
        Some(minor) if minor < MIN_MINOR => {
            State::Missing(format!("1.{minor} is older than 1.{MIN_MINOR}"))
        }
        _ => State::Found(output.trim().to_owned()),
    }
}

/// rustup puts a proxy for every component on `PATH`; only running it shows whether it is installed.
fn component(program: &str) -> State {
    match Cmd::new(program).arg("--version").output() {
        Ok(version) => State::Found(version.trim().to_owned()),
        Err(_) => State::Missing(format!("`{program} --version` does not run")),
    }
}
