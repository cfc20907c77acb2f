//! An epoll event loop, one handler of which computes for seconds.

use std::{
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use rustix::event::epoll;
use tailback_tests::lines::unix_ns;

use crate::{
    report::Report,
    sampling::{self, compare_age},
};

/// Run time of the slow handler.
const SLOW_HANDLER: Duration = Duration::from_millis(2000);
/// Bytes written to the loop: run the slow handler, and exit.
const SLOW: u8 = 1;
const END: u8 = 2;

pub fn measure(report: &mut Report) -> Result<()> {
    // The agent judges only loops that keep connections waiting: these.
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let address = listener.local_addr()?;
    let mut connections = Vec::new();
    for _ in 0..2 {
        connections.push(TcpStream::connect(address).context("connect")?);
        connections.push(listener.accept().context("accept")?.0);
    }
    let (mut reader, mut writer) = io::pipe().context("make a pipe")?;
    let run = move || -> Result<(u64, u64)> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC).context("epoll_create")?;
        let (data, readable) = (epoll::EventData::new_u64(0), epoll::EventFlags::IN);
        epoll::add(&poll, &reader, data, readable).context("epoll_ctl")?;
        let mut turn = (0, 0);
        let mut byte = [0];
        loop {
            let mut events = Vec::with_capacity(4);
            epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), None)
                .context("epoll_wait")?;
            reader.read_exact(&mut byte).context("read")?;
            match byte[0] {
                SLOW => {
                    let begun = (Instant::now(), unix_ns());
                    while begun.0.elapsed() < SLOW_HANDLER {
                        std::hint::spin_loop();
                    }
                    turn = (begun.1, unix_ns());
                }
                END => return Ok(turn),
                _ => {}
            }
        }
    };
    let named = thread::Builder::new().name("evloop".to_owned());
    let running = named.spawn(run).context("start a thread")?;
    let duration = Duration::from_millis(4200);
    let (samples, ()) = sampling::during(duration, || {
        // The agent first has to recognize the loop by its many short handlers.
        for _ in 0..35 {
            writer.write_all(&[0]).context("write")?;
            thread::sleep(Duration::from_millis(50));
        }
        writer.write_all(&[SLOW, END]).context("write")
    })?;
    let turn = running.join().map_err(|_| anyhow!("the loop panicked"))??;
    let queue = samples.queue("eventloop", |name| name.contains("evloop"));
    compare_age(report, &queue, turn, "oldest");
    Ok(())
}
