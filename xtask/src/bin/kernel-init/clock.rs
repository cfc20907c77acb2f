//! Steps the wall clock by hours while the agent publishes: signals must continue, with the new time. It runs in a guest,
//! where no other program depends on the clock.

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
/// Time limit for each expectation; an emulated machine is slow.
const DEADLINE: Duration = Duration::from_secs(20);
const TIME_TO_LIVE: Duration = Duration::from_secs(1);
const RUN_TIME: Duration = Duration::from_secs(2);
const HOUR_S: i64 = 3_600;

pub fn steps_change_nothing() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let address = listener.local_addr().context("ask where")?;
    let config = "/tmp/clock.toml";
    // A sample costs a hundred times as much on an emulated CPU. Within the default budget of 1%, a kernel that needs a full
    // scan to see a listener (5.10) would be scanned every 12 to 30 seconds.
    let text = format!(
        "cpu_budget = 0.5\n[[target]]\nport = {}\nservice_name = \"clock\"\n[signal]\ndirectory = \"{DIRECTORY}\"\n",
        address.port()
    );
    fs::write(config, text).with_context(|| format!("write {config}"))?;
    let _agent = Agent::start(config)?;
    let page = Page::open(format!("{DIRECTORY}/clock/page"));
    until("the page", &page, |page| page.pressure().alive)?;
    let mut waiting = Vec::new();
    for step_s in [HOUR_S, -2 * HOUR_S, HOUR_S] {
        set_clock(step_s)?;
        // Changes are visible from here on.
        waiting.push(TcpStream::connect(address).context("connect")?);
        let depth = waiting.len() as u32;
        let what = format!("{depth} waiting after a step of {step_s} s");
        until(&what, &page, |page| {
            let mut entries = page.entries().into_iter();
            entries.any(|queue| queue.kind_name() == "accept" && queue.depth == depth)
        })?;
        let at_first = published()?;
        let end = Instant::now() + RUN_TIME;
        while Instant::now() < end {
            let published = published()?;
            let alive = page.pressure().alive;
            let now = boot();
            ensure!(
                published <= now && now - published < DEADLINE,
                "after a step of {step_s} s the page, read at {now:?} since boot, says that it was published at {published:?}"
            );
            // The emulator may pause for longer than the page's time to live.
            ensure!(
                alive || now - published > TIME_TO_LIVE / 2,
                "the page of {:?} ago was treated as stale after a step of {step_s} s",
                now - published
            );
            thread::sleep(Duration::from_millis(5));
        }
        let what = format!("a page that is renewed after a step of {step_s} s");
        until(&what, &page, |_| {
            published().is_ok_and(|now| now > at_first)
        })?;
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

/// Time since boot, on a clock without steps.
fn boot() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Publication time of the page since boot, read without the reader under test.
fn published() -> Result<Duration> {
    let file = format!("{DIRECTORY}/clock/page");
    let page = fs::read(&file).with_context(|| format!("read {file}"))?;
    let field = page.get(24..32).context("the page is too short")?;
    Ok(Duration::from_nanos(u64::from_le_bytes(field.try_into()?)))
}

fn set_clock(by_s: i64) -> Result<()> {
    let now = clock_gettime(ClockId::Realtime);
    let then = Timespec {
        tv_sec: now.tv_sec + by_s,
        ..now
    };
    clock_settime(ClockId::Realtime, then).context("set the clock")
}

/// Waits until the page meets the expectation; the error holds its last content.
fn until(what: &str, page: &Page, is_so: impl Fn(&Page) -> bool) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    while !is_so(page) {
        ensure!(
            Instant::now() < end,
            "{what}: not within {DEADLINE:?}; the page says {:?}, with {:?}",
            page.pressure(),
            page.entries()
        );
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
