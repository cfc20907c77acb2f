//! The table of everything that is neither in the repository nor on crates.io.

use std::path::Path;

use super::{
    Action, Method, Purpose,
    Purpose::{Aarch64, Boot, Build, Ci, Cluster, Test},
    State,
    cargo_tools::{self, CargoTool},
    ebpf, envoy, helm, jaeger,
    kubernetes::{self, Component, Definition},
    vmlinuz,
};
use crate::{
    architecture::{AARCH64_COMPILER, AARCH64_EMULATOR, AARCH64_LIBRARY, Architecture},
    command::Cmd,
    kernels::{self, Kernel},
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
        program("rabbitmq-server", &[Test], &["rabbitmq-server"]),
        program("nats-server", &[Test], &["nats-server"]),
        program("stress-ng", &[Test], &["stress-ng"]),
        program("flock", &[Test], &["util-linux"]),
        program(
            "mariadbd",
            &[Test],
            &["mariadb-server-core", "mariadb-client-core"],
        ),
        program("puma", &[Test], &["puma"]),
        // A compiler: 110 MB to download.
        program("ocamlopt", &[Test], &["ocaml-nox"]),
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
        module("rq", &["python3", "python3-rq"]),
        module("celery", &["python3", "python3-celery", "python3-redis"]),
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
    table.extend([
        program(
            AARCH64_COMPILER,
            &[Aarch64],
            &["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"],
        ),
        part(
            AARCH64_LIBRARY,
            &[Aarch64],
            Kind::Library(Architecture::Aarch64),
        ),
        program(AARCH64_EMULATOR, &[Aarch64], &["qemu-user-static"]),
        program(
            Architecture::Aarch64.machine_emulator(),
            &[Aarch64],
            &["qemu-system-arm"],
        ),
    ]);
    table.extend(kernels::known().map(|kernel| {
        let purposes: &[Purpose] = match kernel.architecture {
            Architecture::X86_64 => &[Test],
            Architecture::Aarch64 => &[Aarch64],
        };
        let name = format!("kernel {}", kernel.name);
        part(&name, purposes, Kind::Kernel(kernel))
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
    /// Rust's standard library for another architecture.
    Library(Architecture),
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
        let mut purposes = self.purposes.iter();
        let is_extra = purposes.all(|one| matches!(one, Cluster | Aarch64));
        let all = purpose == Purpose::All && !is_extra;
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
            Kind::Library(architecture) => library(*architecture),
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
            Kind::Library(architecture) => {
                let add = Cmd::new("rustup").current_dir(tools::root());
                let add = add.args(["target", "add", architecture.triple()]);
                one("from rustup".to_owned(), Action::Run(add))
            }
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

/// Rust's standard library for another architecture, in the toolchain of the repository.
fn library(architecture: Architecture) -> State {
    let path = Cmd::new("rustc").current_dir(tools::root()).args([
        "--print",
        "target-libdir",
        "--target",
        architecture.triple(),
    ]);
    match path.output() {
        Ok(path) if Path::new(path.trim()).is_dir() => State::Found(path.trim().to_owned()),
        Ok(path) => State::Missing(format!("{} does not exist", path.trim())),
        Err(error) => State::Missing(format!("{error:#}")),
    }
}

/// rustup puts a proxy for every component on `PATH`; only running it shows whether it is installed.
fn component(program: &str) -> State {
    match Cmd::new(program).arg("--version").output() {
        Ok(version) => State::Found(version.trim().to_owned()),
        Err(_) => State::Missing(format!("`{program} --version` does not run")),
    }
}
