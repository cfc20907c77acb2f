//! The live page: what a person wants to see first in an incident. Three files, without a build step and without anything from
//! elsewhere, so that it works offline.
//!
//! It shows names that watched processes have chosen. The script only sets them as text; besides, the browser is forbidden to run
//! or load anything but these files.

use bytes::Bytes;
use http::{
    Response, StatusCode,
    header::{CONTENT_SECURITY_POLICY, HeaderValue, REFERRER_POLICY},
};
use serde_json::Value;

use super::http::{Body, typed};

/// Path, type and text of each file.
const FILES: [(&str, &str, &str); 3] = [
    (
        "/",
        "text/html; charset=utf-8",
        include_str!("live/index.html"),
    ),
    (
        "/live.css",
        "text/css; charset=utf-8",
        include_str!("live/live.css"),
    ),
    (
        "/live.js",
        "text/javascript; charset=utf-8",
        include_str!("live/live.js"),
    ),
];

/// Only these files and this server; no inline script or style, no string that becomes a script, no frame around it. The icon is an
/// empty `data:` URL, which saves a request.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
                      trusted-types 'none'";

/// The file at this path, with the path for the statistics.
pub fn file(path: &str) -> Option<(&'static str, Response<Body>)> {
    let (path, kind, text) = FILES.into_iter().find(|(of, ..)| *of == path)?;
    let mut response = typed(StatusCode::OK, kind, text);
    let headers = response.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    Some((path, response))
}

/// What the page shows: the view of the agent, if it replies, and the state of the adapters. The agent's reply is not parsed.
pub fn state(view: Option<&str>, adapter_process: &Value) -> Bytes {
    let view = view.map_or_else(String::new, |view| format!("\"live\":{},", view.trim_end()));
    format!("{{{view}\"adapter_process\":{adapter_process}}}\n").into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_state_is_one_json_object_with_and_without_an_agent() {
        let process = json!({"type": "status", "adapters": []});
        let parsed = |view| serde_json::from_slice::<Value>(&state(view, &process)).unwrap();
        assert_eq!(
            parsed(Some("{\"type\": \"live\"}\n")),
            json!({"live": {"type": "live"}, "adapter_process": process})
        );
        assert_eq!(parsed(None), json!({"adapter_process": process}));
    }

    /// The policy forbids them, so a page with one would be broken.
    #[test]
    fn the_page_has_no_inline_script_or_style_and_loads_nothing_from_elsewhere() {
        let [(_, _, page), (_, _, style), (_, _, script)] = FILES;
        for forbidden in [
            "<style", "style=", "<script>", " onclick", "http://", "https://",
        ] {
            assert!(!page.contains(forbidden), "{forbidden}");
        }
        for forbidden in ["url(", "@import", "http"] {
            assert!(!style.contains(forbidden), "{forbidden}");
        }
        // The one address is the name of a namespace.
        assert_eq!(script.matches("http://").count(), 1);
        for forbidden in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "https://",
        ] {
            assert!(!script.contains(forbidden), "{forbidden}");
        }
    }
}
