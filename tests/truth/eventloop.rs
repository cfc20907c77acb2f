//! Events that wait for a busy event loop, compared with the files that were written and not taken.

use std::{
    collections::BTreeSet,
    net::{TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::{self, Command},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    event::{EventfdFlags, epoll, eventfd},
    pipe::{PipeFlags, pipe_with},
};
use tailback_tests::{
    agent::{Agent, Event, binary, run_once},
    needs, ports,
    sample::number,
    skip::skip,
};

use crate::{DEADLINE, alone};

/// The file that begins a long turn. The others are numbered from 1.
const CONTROL: u64 = 0;
/// Time for which the list does not change before it is compared: a file scan or two.
const SETTLING: Duration = Duration::from_millis(400);

/// One registered file, and the end that makes it ready.
struct Source {
    read_end: OwnedFd,
    write_end: OwnedFd,
    /// An eventfd is read and written in units of 8 bytes.
    unit: usize,
}

impl Source {
    fn pipe() -> Result<Self> {
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self {
            read_end,
            write_end,
            unit: 1,
        })
    }

    fn eventfd() -> Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            read_end: event.try_clone()?,
            write_end: event,
            unit: 8,
        })
    }

    fn connection() -> Result<Self> {
        let listener = TcpListener::bind(ports::local(0)).context("listen")?;
        let client = TcpStream::connect(listener.local_addr()?).context("connect")?;
        let (server, _) = listener.accept().context("accept")?;
        Ok(Self {
            read_end: server.into(),
            write_end: client.into(),
            unit: 1,
        })
    }

    fn make_ready(&self) -> Result<()> {
        let one = 1_u64.to_ne_bytes();
        rustix::io::write(&self.write_end, &one[..self.unit]).context("write")?;
        Ok(())
    }

    fn take(&self) -> Result<()> {
        rustix::io::read(&self.read_end, &mut [0; 8][..self.unit]).context("read")?;
        Ok(())
    }
}

/// A thread in an event loop. A turn in which its control pipe is ready lasts until the next [`Loop::release`].
struct Loop {
    control: Source,
    sources: Arc<Vec<Source>>,
    /// Long turns begun, and those that may end.
    begun: Arc<AtomicU32>,
    released: Arc<AtomicU32>,
}

impl Loop {
    fn start(name: &str, sources: Vec<Source>, flags: epoll::EventFlags) -> Result<Self> {
        let control = Source::pipe()?;
        let own_control = control.read_end.try_clone()?;
        let sources = Arc::new(sources);
        let (begun, released) = (Arc::default(), Arc::default());
        let this = Self {
            control,
            sources: Arc::clone(&sources),
            begun: Arc::clone(&begun),
            released: Arc::clone(&released),
        };
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let readable = epoll::EventFlags::IN | flags;
        let numbered = |number: u64| epoll::EventData::new_u64(number);
        epoll::add(&poll, &own_control, numbered(CONTROL), readable)?;
        for (number, source) in (1..).zip(sources.iter()) {
            epoll::add(&poll, &source.read_end, numbered(number), readable)?;
        }
        let run = move || -> Result<()> {
            loop {
                let mut events = Vec::with_capacity(4096);
                epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), None)?;
                let numbers: BTreeSet<u64> = events.iter().map(|event| event.data.u64()).collect();
                for number in numbers.iter().filter(|number| **number != CONTROL) {
                    sources[usize::try_from(*number)? - 1].take()?;
                }
                if numbers.contains(&CONTROL) {
                    rustix::io::read(&own_control, &mut [0])?;
                    let turn = begun.fetch_add(1, Ordering::SeqCst) + 1;
                    while released.load(Ordering::SeqCst) < turn {
                        std::hint::spin_loop();
                    }
                }
            }
        };
        let named = thread::Builder::new().name(name.to_owned());
        named.spawn(run).context("start a thread")?;
        Ok(this)
    }

    /// Begins a long turn in which the loop has taken `taken` further events.
    fn occupy(&self, taken: usize) -> Result<()> {
        let before = self.begun.load(Ordering::SeqCst);
        for source in &self.sources[..taken] {
            source.make_ready()?;
        }
        self.control.make_ready()?;
        let end = Instant::now() + DEADLINE;
        while self.begun.load(Ordering::SeqCst) == before {
            ensure!(Instant::now() < end, "the turn did not begin");
            thread::yield_now();
        }
        Ok(())
    }

    fn release(&self) {
        let begun = self.begun.load(Ordering::SeqCst);
        self.released.store(begun, Ordering::SeqCst);
    }
}

/// Whether this kernel counts ready files, according to `tailback doctor`.
fn counts_ready_files() -> Result<bool> {
    let checks = run_once(Command::new(binary()?).args(["doctor", "--json"]), DEADLINE)?;
    let mut checks = checks.iter();
    let check = checks.find(|check| check["name"] == "ready files of epoll instances");
    Ok(check.context("doctor does not mention them")?["state"] == "ok")
}

#[test]
fn the_depth_of_a_busy_event_loop_is_the_number_of_ready_files() -> Result<()> {
    const TEST: &str = "the_depth_of_a_busy_event_loop_is_the_number_of_ready_files";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    if !counts_ready_files()? {
        skip(TEST, "bpf_loop is not available (needs Linux 5.17)");
        return Ok(());
    }
    let _alone = alone();
    const EACH: usize = 40;
    for (name, flags) in [
        ("level-loop", epoll::EventFlags::empty()),
        ("edge-loop", epoll::EventFlags::ET),
    ] {
        let mut sources = Vec::new();
        for _ in 0..EACH {
            sources.extend([Source::pipe()?, Source::eventfd()?, Source::connection()?]);
        }
        let all = sources.len();
        let events = Loop::start(name, sources, flags)?;
        let pid = process::id().to_string();
        let agent = Agent::start(Command::new(binary()?).args([
            "sample",
            "--json",
            "--pid",
            &pid,
            "--interval",
            "50ms",
            "--duration",
            "60s",
        ]))?;
        let is_it = |event: &Event| event.is("queue") && event.text("name").contains(name);
        agent.wait_for("the loop", DEADLINE, is_it)?;
        // Some events that the turn has taken and handled, then some that wait for its end.
        for (taken, waiting) in [(0, 1), (5, 12), (60, 3), (0, all - 1), (all, all)] {
            events.occupy(taken)?;
            for source in &events.sources[all - waiting..] {
                source.make_ready()?;
            }
            thread::sleep(SETTLING);
            // The first may be of a sample that began before, and was held up.
            let mark = agent.mark();
            agent.wait_since(mark, "the loop", DEADLINE, is_it)?;
            let mark = agent.mark();
            agent.wait_since(mark, "the loop", DEADLINE, is_it)?;
            thread::sleep(SETTLING);
            let reported = agent.events_since(mark)?;
            events.release();
            let depths: Vec<u64> = reported
                .iter()
                .filter(|event| is_it(event))
                .map(|event| number(&event.value, "depth"))
                .collect::<Result<_>>()?;
            println!("{name}: {taken} taken, {waiting} waiting: {depths:?}");
            let exact = depths.iter().all(|depth| *depth == waiting as u64);
            ensure!(
                exact && !depths.is_empty(),
                "{name}: {taken} taken, {waiting} waiting: depth {depths:?}"
            );
            // The loop takes what has waited.
            thread::sleep(SETTLING);
        }
        drop(agent);
    }
    Ok(())
}
