//! The table of everything that is neither in the repository nor on crates.io.

use std::path::Path;

use super::{
    Action, Purpose,
    Purpose::{Boot, Build, Ci, Demo, Test},
    State, Way,
    cargo_tools::{self, CargoTool},
    ebpf, jaeger, vmlinuz,
};
use crate::{
    command::Cmd,
    kernels::{KERNELS, Kernel},
    tools,
};

/// In the order in which they are got: bpf-linker is built to fit the toolchain.
pub fn table() -> Vec<Part> {
    let mut table = vec![
        part("eBPF toolchain", &[Build], Kind::Toolchain),
        part("bpf-linker", &[Build], Kind::BpfLinker),
        program("ss", &[Test], &["iproute2"]),
        program("nstat", &[Test], &["iproute2"]),
        program("python3", &[Test, Demo], &["python3"]),
        part("uWSGI", &[Test, Demo], Kind::Uwsgi),
        program("redis-server", &[Test], &["redis-server"]),
        program("redis-benchmark", &[Test], &["redis-tools"]),
        program("nginx", &[Test], &["nginx-light"]),
        program("wrk", &[Test], &["wrk"]),
        program("memcached", &[Test], &["memcached"]),
        part("PostgreSQL", &[Test, Demo], Kind::Postgres),
        program("haproxy", &[Test], &["haproxy"]),
        program("pgbouncer", &[Test], &["pgbouncer"]),
        program("mosquitto", &[Test, Demo], &["mosquitto"]),
        program("stress-ng", &[Test], &["stress-ng"]),
        program("gcc", &[Test], &["gcc", "libc6-dev"]),
        part("Go", &[Test], Kind::Go),
        program("node", &[Test], &["nodejs"]),
        program("prometheus", &[Test], &["prometheus"]),
        program("promtool", &[Test], &["prometheus"]),
        program("tc", &[Test], &["iproute2"]),
        module("psycopg2", &["python3", "python3-psycopg2"]),
        module("uvicorn", &["python3", "python3-uvicorn"]),
        module("gunicorn", &["python3", "python3-gunicorn"]),
        module("paho.mqtt.client", &["python3", "python3-paho-mqtt"]),
        program("xz", &[Test], &["xz-utils"]),
        program("podman", &[Test], &["podman", "runc"]),
        program("qemu-system-x86_64", &[Test, Boot], &["qemu-system-x86"]),
        part("Jaeger", &[Test, Demo], Kind::Jaeger),
        part("rustfmt", &[Ci], Kind::Component("rustfmt")),
        part("clippy", &[Ci], Kind::Component("cargo-clippy")),
        part(
            "cargo-nextest",
            &[Test],
            Kind::CargoTool(&cargo_tools::NEXTEST),
        ),
        part("cargo-deny", &[Ci], Kind::CargoTool(&cargo_tools::DENY)),
    ];
    table.extend(KERNELS.iter().map(|kernel| {
        part(
            &format!("kernel {}", kernel.name),
            &[Test],
            Kind::Kernel(kernel),
        )
    }));
    table
}

/// One thing that setup can find or get.
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
    /// The Debian packages of the module of Python that the part is named after.
    Module(&'static [&'static str]),
    /// Its server, which lies outside of `PATH`, and its client.
    Postgres,
    /// With its plugin for Python.
    Uwsgi,
    Jaeger,
    /// New enough to get the toolchain that a module asks for by itself.
    Go,
    /// A component of the toolchain that builds the agent, by a program of it.
    Component(&'static str),
    CargoTool(&'static CargoTool),
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
    part(name, &[Test, Demo], Kind::Module(packages))
}

impl Part {
    pub fn is_for(&self, purpose: Purpose) -> bool {
        let all = purpose == Purpose::All && !self.purposes.is_empty();
        all || self.purposes.contains(&purpose) || self.purposes.contains(&Build)
    }

    pub fn kernel(&self) -> Option<&'static Kernel> {
        match self.kind {
            Kind::Kernel(kernel) => Some(kernel),
            _ => None,
        }
    }

    /// Whether it is here.
    pub fn look(&self) -> State {
        match &self.kind {
            Kind::Toolchain => ebpf::toolchain(),
            Kind::BpfLinker => ebpf::linker(),
            Kind::Program(_) => match tools::program(&self.name) {
                Some(file) => State::Found(file.display().to_string()),
                None => State::Missing("it is not on PATH".to_owned()),
            },
            Kind::Module(_) => match tailback_tests::python::with(&[&self.name]) {
                Ok(file) => State::Found(format!("for {}", file.display())),
                Err(error) => State::Missing(error.to_string()),
            },
            Kind::Postgres => postgres(),
            Kind::Uwsgi => uwsgi(),
            Kind::Jaeger => jaeger::look(),
            Kind::Go => go(),
            Kind::Component(program) => component(program),
            Kind::CargoTool(tool) => tool.look(),
            Kind::Kernel(kernel) => vmlinuz::look(kernel),
        }
    }

    /// How it can be got, the best way first.
    pub fn ways(&self) -> Vec<Way> {
        match &self.kind {
            Kind::Toolchain => ebpf::toolchain_ways(),
            Kind::BpfLinker => ebpf::linker_ways(),
            Kind::Program(packages) | Kind::Module(packages) => debian(packages),
            Kind::Postgres => debian(&["postgresql", "postgresql-client"]),
            Kind::Uwsgi => debian(&["uwsgi-core", "uwsgi-plugin-python3"]),
            Kind::Jaeger => jaeger::ways(),
            Kind::Go => debian(&["golang-go"]),
            Kind::Component(_) => {
                let add = Cmd::new("rustup").args(["component", "add", &self.name]);
                one("from rustup".to_owned(), Action::Run(add))
            }
            Kind::CargoTool(tool) => tool.ways(),
            Kind::Kernel(kernel) => vmlinuz::ways(kernel),
        }
    }

    /// What a person can do where there is no way that setup could go.
    pub fn hint(&self) -> &'static str {
        match self.kind {
            Kind::Toolchain => "install rustup (https://rustup.rs), then run setup again",
            Kind::Jaeger => jaeger::HINT,
            Kind::Go => "install Go 1.21 or newer (https://go.dev/dl), then run setup again",
            _ => "it cannot be had on this machine",
        }
    }
}

fn one(title: String, action: Action) -> Vec<Way> {
    let actions = vec![action];
    vec![Way { title, actions }]
}

fn debian(packages: &'static [&'static str]) -> Vec<Way> {
    let title = format!("Debian's {}, a few seconds", packages.join(" and "));
    one(title, Action::Apt(packages))
}

/// Debian's program has its languages as plugins; others carry them within.
fn uwsgi() -> State {
    const PLUGIN: &str = "/usr/lib/uwsgi/plugins/python3_plugin.so";
    match (tools::program("uwsgi-core"), tools::program("uwsgi")) {
        (Some(_), _) if !Path::new(PLUGIN).exists() => {
            State::Missing(format!("there is no {PLUGIN}"))
        }
        (Some(file), _) | (None, Some(file)) => State::Found(file.display().to_string()),
        (None, None) => State::Missing("it is not on PATH".to_owned()),
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
    const LEAST: u32 = 21;
    // go version go1.26.8 linux/amd64
    let Ok(said) = Cmd::new("go").arg("version").output() else {
        return State::Missing("`go version` does not run".to_owned());
    };
    let minor = said
        .split("go1.")
        .nth(1)
        .and_then(|rest| rest.split(|letter: char| !letter.is_ascii_digit()).next())
        .and_then(|minor| minor.parse::<u32>().ok());
    match minor {
        Some(minor) if minor < LEAST => {
            State::Missing(format!("1.{minor} is older than 1.{LEAST}"))
        }
        _ => State::Found(said.trim().to_owned()),
    }
}

/// rustup puts a stand-in for every component on `PATH`; only a run tells whether it is there.
fn component(program: &str) -> State {
    match Cmd::new(program).arg("--version").output() {
        Ok(version) => State::Found(version.trim().to_owned()),
        Err(_) => State::Missing(format!("`{program} --version` does not run")),
    }
}
