//! Jaeger, built from its Go module by the wrapper module in `tests/parts/jaeger`.

use std::fs;

use super::{Action, Method, State};
use crate::{command::Cmd, tools};

const VERSION: &str = "v1.76.0";
/// Minimum Go version, from the wrapper's go.mod.
const GO: (u32, u32) = (1, 25);
pub const HINT: &str = "install Go 1.25 or newer (https://go.dev/dl), or put a `jaeger` of version 2 on PATH; \
                        without it the tests that query it are skipped";

pub fn find() -> State {
    if let Some(file) = tools::program("jaeger") {
        return State::Found(file.display().to_string());
    }
    let directory = tools::cache().join("bin");
    let version = fs::read_to_string(directory.join("jaeger.version")).unwrap_or_default();
    if directory.join("jaeger").is_file() && version.trim() == VERSION {
        State::Found(format!("{VERSION}, {}", directory.join("jaeger").display()))
    } else {
        State::Missing(format!(
            "{VERSION} is neither on PATH nor in {}",
            directory.display()
        ))
    }
}

pub fn methods() -> Vec<Method> {
    if go_version().is_some_and(|version| version >= GO) {
        let title = "built from its Go module, about 4 minutes on 2 cores".to_owned();
        return vec![Method {
            title,
            actions: build(),
        }];
    }
    Vec::new()
}

fn build() -> Vec<Action> {
    let directory = tools::cache().join("bin");
    vec![
        Action::Run(
            Cmd::new("go")
                // Do not download another Go, and link statically.
                .env("GOTOOLCHAIN", "local")
                .env("CGO_ENABLED", "0")
                .current_dir(tools::root().join("tests/parts/jaeger"))
                .args(["build", "-trimpath", "-ldflags=-s -w", "-o"])
                .arg(directory.join("jaeger"))
                .arg("github.com/jaegertracing/jaeger/cmd/jaeger"),
        ),
        Action::Write(directory.join("jaeger.version"), VERSION.to_owned()),
    ]
}

/// `go version go1.26.8 linux/amd64` as (1, 26).
fn go_version() -> Option<(u32, u32)> {
    let output = Cmd::new("go")
        .arg("version")
        .env("GOTOOLCHAIN", "local")
        .output()
        .ok()?;
    parse(&output)
}

fn parse(output: &str) -> Option<(u32, u32)> {
    let version = output
        .split_whitespace()
        .find_map(|word| word.strip_prefix("go1."))?;
    let minor = version.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((1, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_version_of_go() {
        assert_eq!(parse("go version go1.26.8 linux/amd64"), Some((1, 26)));
        assert_eq!(parse("go version go1.25rc1 linux/amd64"), Some((1, 25)));
        assert_eq!(parse("go version devel +abc linux/amd64"), None);
    }
}
