//! Helm, built from its Go module: it renders the chart in the tests.

use super::{Action, Method, State};
use crate::{command::Cmd, tools};

const VERSION: &str = "v3.22.0";
pub const HINT: &str = "install Go (https://go.dev/dl), or put `helm` of version 3 on PATH; without it the chart is not tested";

pub fn find() -> State {
    match tools::helm() {
        Some(file) => State::Found(file.display().to_string()),
        None => State::Missing("neither on PATH nor in the cache".to_owned()),
    }
}

pub fn methods() -> Vec<Method> {
    let install = Cmd::new("go")
        .env("CGO_ENABLED", "0")
        .env("GOBIN", tools::cache().join("bin"))
        .args(["install", "-trimpath", "-ldflags=-s -w"])
        .arg(format!("helm.sh/helm/v3/cmd/helm@{VERSION}"));
    vec![Method {
        title: "built from its Go module, about 3 minutes on 2 cores".to_owned(),
        actions: vec![Action::Run(install)],
    }]
}
