//! Chromium without a window, controlled through the DevTools protocol over a pair of pipes: JSON messages that end with a zero byte.
//! <https://chromedevtools.github.io/devtools-protocol/>

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use crate::{process::Process, program, temp::TempDir, wait};

/// The program: Chromium without everything that needs a display.
pub const PROGRAM: &str = "chromium-headless-shell";
/// Deadline for a reply, and for a condition on the page.
/// Longer than the agent keeps the readers of a page (30 s), and than a browser takes to start on a busy machine.
const DEADLINE: Duration = Duration::from_secs(90);

/// A browser with one page.
pub struct Browser {
    process: Process,
    requests: File,
    replies: File,
    unread: Vec<u8>,
    last_id: u64,
    /// Of the page.
    session: Option<String>,
    /// Errors and warnings of the page so far: uncaught exceptions, violations of its Content-Security-Policy, dialogs.
    problems: Vec<String>,
    _directory: TempDir,
}

impl Browser {
    pub fn start() -> Result<Self> {
        let directory = TempDir::new("chromium")?;
        let pipes = ["requests", "replies"].map(|name| directory.path().join(name));
        let made = Command::new("mkfifo").args(&pipes).status();
        ensure!(made.context("start mkfifo")?.success(), "cannot make pipes");
        // Opened for both, so that neither side waits for the other.
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
        let [requests, replies] = [open(&pipes[0])?, open(&pipes[1])?];
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                r#"in=$1 out=$2; shift 2; exec "$@" 3<>"$in" 4<>"$out""#,
                "sh",
            ])
            .args(&pipes)
            .arg(program::need(&[PROGRAM])?)
            // Its sandbox does not work as root. The pages that it opens are our own.
            .args(["--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"])
            // In a container /dev/shm may be too small: the page would crash.
            .args(["--disable-dev-shm-usage", "--disable-background-networking"])
            .arg(format!("--user-data-dir={}", directory.path().display()))
            .arg("about:blank");
        let mut browser = Self {
            process: Process::start("Chromium", &mut command)?,
            requests,
            replies,
            unread: Vec::new(),
            last_id: 0,
            session: None,
            problems: Vec::new(),
            _directory: directory,
        };
        let page = wait::until("a page of Chromium", DEADLINE, || {
            let targets = browser.call("Target.getTargets", json!({}))?;
            let mut all = targets["targetInfos"].as_array().into_iter().flatten();
            Ok(all.find(|target| target["type"] == "page").cloned())
        })?;
        let page = json!({"targetId": page["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", page)?;
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Accessibility"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(browser)
    }

    /// Calls a method of the protocol.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "parameters are written where they are passed"
    )]
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.last_id += 1;
        let mut request = json!({"id": self.last_id, "method": method, "params": params});
        if let Some(session) = &self.session {
            request["sessionId"] = session.as_str().into();
        }
        self.requests.write_all(format!("{request}\0").as_bytes())?;
        let deadline = Instant::now() + DEADLINE;
        loop {
            let message = self
                .next_message(deadline)
                .with_context(|| method.to_owned())?;
            if message["id"] == self.last_id {
                ensure!(
                    message.get("error").is_none(),
                    "{method}: {}",
                    message["error"]
                );
                return Ok(message["result"].clone());
            }
            self.event(&message)?;
        }
    }

    fn next_message(&mut self, deadline: Instant) -> Result<Value> {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == 0) {
                let message: Vec<u8> = self.unread.drain(..=end).collect();
                return Ok(serde_json::from_slice(&message[..end])?);
            }
            self.process.check_running()?;
            let mut poll_fd = [PollFd::new(&self.replies, PollFlags::IN)];
            let tick = Timespec {
                tv_sec: 0,
                tv_nsec: 200_000_000,
            };
            if poll(&mut poll_fd, Some(&tick))? > 0 {
                let mut buffer = [0; 65_536];
                let read = self.replies.read(&mut buffer)?;
                self.unread.extend(&buffer[..read]);
            } else if Instant::now() > deadline {
                bail!("no reply of Chromium within {} s", DEADLINE.as_secs());
            }
        }
    }

    fn event(&mut self, message: &Value) -> Result<()> {
        let params = &message["params"];
        match message["method"].as_str() {
            Some("Runtime.exceptionThrown" | "Page.javascriptDialogOpening") => {
                self.problems.push(params.to_string());
            }
            Some("Log.entryAdded") if params["entry"]["level"] != "verbose" => {
                self.problems.push(params["entry"]["text"].to_string());
            }
            Some("Inspector.targetCrashed") => bail!("the page crashed"),
            _ => {}
        }
        Ok(())
    }

    /// Opens an address in the page.
    pub fn open(&mut self, url: &str) -> Result<()> {
        let opened = self.call("Page.navigate", json!({"url": url}))?;
        ensure!(
            opened.get("errorText").is_none(),
            "{url}: {}",
            opened["errorText"]
        );
        Ok(())
    }

    /// The value of a JavaScript expression in the page.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let params = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let reply = self.call("Runtime.evaluate", params)?;
        ensure!(
            reply.get("exceptionDetails").is_none(),
            "{expression}: {}",
            reply["exceptionDetails"]
        );
        Ok(reply["result"]["value"].clone())
    }

    /// Waits until an expression is true; fails with the text of the page.
    pub fn wait(&mut self, what: &str, expression: &str) -> Result<()> {
        let waited = wait::until(what, DEADLINE, || {
            Ok((self.evaluate(expression)? == true).then_some(()))
        });
        waited.with_context(|| {
            let text = self.evaluate("document.body.innerText").unwrap_or_default();
            format!("the page shows {text}")
        })
    }

    /// Presses a key that has this name in `KeyboardEvent.key` and `.code`, with its virtual key code.
    pub fn press(&mut self, key: &str, code: u32) -> Result<()> {
        // Enter only activates a button with its text.
        let text = if key == "Enter" { "\r" } else { "" };
        for kind in ["keyDown", "keyUp"] {
            let params = json!({
                "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text,
            });
            self.call("Input.dispatchKeyEvent", params)?;
        }
        Ok(())
    }

    /// Role and name of every node that a screen reader gets.
    pub fn accessible(&mut self) -> Result<Vec<(String, String)>> {
        let tree = self.call("Accessibility.getFullAXTree", json!({}))?;
        let nodes = tree["nodes"].as_array().context("no nodes")?;
        let text = |value: &Value| value["value"].as_str().unwrap_or_default().to_owned();
        let exposed = nodes.iter().filter(|node| node["ignored"] != true);
        Ok(exposed
            .map(|node| (text(&node["role"]), text(&node["name"])))
            .collect())
    }

    /// Errors and warnings of the page so far.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }
}
