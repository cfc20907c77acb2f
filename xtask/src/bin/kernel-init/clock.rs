//! The wall clock is set, by hours, while the agent publishes: what is signalled goes on, and is told with the time that is
//! then. It is done here, where nobody else looks at the clock.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use tailback_page::Page;

const DIRECTORY: &str = "/run/tailback-clock";
/// An emulated machine is slow.
const SOON: Duration = Duration::from_secs(20);
/// Twice the time to live.
const A_WHILE: Duration = Duration::from_secs(2);
const HOUR_S: i64 = 3_600;

pub fn steps_change_nothing() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let address = listener.local_addr().context("ask where")?;
    let config = "/tmp/clock.toml";
    let text = format!(
        "[[target]]\nport = {}\ncalled = \"clock\"\n[signal]\ndirectory = \"{DIRECTORY}\"\n",
        address.port()
    );
    fs::write(config, text).with_context(|| format!("write {config}"))?;
    let _agent = Agent::start(config)?;
    let page = Page::open(format!("{DIRECTORY}/clock/page"));
    until("the page", &page, |page| page.pressure().alive)?;
    let mut waiting = Vec::new();
    for step_s in [HOUR_S, -2 * HOUR_S, HOUR_S] {
        set_clock(step_s)?;
        // It sees what changes from here on.
        waiting.push(TcpStream::connect(address).context("connect")?);
        let depth = waiting.len() as u32;
        let what = format!("{depth} waiting after a step of {step_s} s");
        until(&what, &page, |page| {
            let mut entries = page.entries().into_iter();
            entries.any(|queue| queue.kind_name() == "accept" && queue.depth == depth)
        })?;
        let end = Instant::now() + A_WHILE;
        while Instant::now() < end {
            ensure!(
                page.pressure().alive,
                "the page went stale after a step of {step_s} s"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

struct Agent(Child);

impl Agent {
    fn start(config: &str) -> Result<Self> {
        let mut command = Command::new("/tailback");
        command
            .args(["run", "--json", "--config", config])
            .stdout(Stdio::null());
        Ok(Self(command.spawn().context("start the agent")?))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn set_clock(by_s: i64) -> Result<()> {
    let now = clock_gettime(ClockId::Realtime);
    let then = Timespec {
        tv_sec: now.tv_sec + by_s,
        ..now
    };
    clock_settime(ClockId::Realtime, then).context("set the clock")
}

/// Waits for the page to say so, or tells what it said instead.
fn until(what: &str, page: &Page, is_so: impl Fn(&Page) -> bool) -> Result<()> {
    let end = Instant::now() + SOON;
    while !is_so(page) {
        ensure!(
            Instant::now() < end,
            "{what}: not within {SOON:?}; the page says {:?}, with {:?}",
            page.pressure(),
            page.entries()
        );
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
