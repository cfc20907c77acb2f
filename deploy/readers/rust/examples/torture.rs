//! Reads a page as fast as possible while another program writes it as fast as possible, and checks for torn reads.
//!
//! `cargo run --release -p tailback-page --example torture -- PAGE header|page READS`
//!
//! The writer derives all fields from one number, see `c/examples/torture.c`. Exits with 1 if a read was torn.

use std::{
    hint::black_box,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use tailback_page::Page;

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    const USAGE: &str = "usage: torture PAGE header|page READS";
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, what, reads] = args.as_slice() else {
        return Err(USAGE.into());
    };
    let reads: u64 = reads.parse()?;
    let page = Page::open(path);
    if !becomes_live(&page) {
        return Err(format!("{path}: no live page; start its writer first").into());
    }
    let (mut torn, mut unsettled) = (0_u64, 0_u64);
    let start = Instant::now();
    for _ in 0..reads {
        let is_whole = match what.as_str() {
            "header" => header(&page),
            "page" => entries(&page),
            _ => return Err(USAGE.into()),
        };
        match is_whole {
            None => unsettled += 1,
            Some(is_whole) => torn += u64::from(!is_whole),
        }
    }
    let read_ns = start.elapsed().as_nanos() as f64 / reads as f64;
    // While the writer never pauses, each call reads the page again, so fewer calls are enough.
    let calls = reads.min(20_000_000);
    let start = Instant::now();
    for _ in 0..calls {
        black_box(page.admit_ratio());
    }
    let admit_ns = start.elapsed().as_nanos() as f64 / calls as f64;
    println!("reads {reads}  torn {torn}  unsettled {unsettled}");
    println!("{read_ns:.1} ns per read  {admit_ns:.2} ns per admit_ratio()");
    Ok(if torn == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Waits up to a second, because the writer may be preempted in the middle of a write.
fn becomes_live(page: &Page) -> bool {
    (0..1_000).any(|_| {
        let alive = page.pressure().alive;
        if !alive {
            thread::sleep(Duration::from_millis(1));
        }
        alive
    })
}

/// `None`: the writer was preempted in the middle of a write.
fn header(page: &Page) -> Option<bool> {
    let pressure = page.pressure();
    let n = pressure.oldest_age.as_nanos() as u64;
    let ratio = (n % 1_000_000) as f64 / 1e6;
    pressure.alive.then(|| {
        pressure.score == ratio
            && pressure.admit_ratio == ratio
            && pressure
                .time_to_full
                .is_some_and(|time| time.as_nanos() as u64 == n)
            && pressure.retry_after.as_millis() == u128::from(n as u32)
    })
}

fn entries(page: &Page) -> Option<bool> {
    let entries = page.entries();
    let n = entries.first()?.oldest_age.as_nanos();
    Some(entries.iter().all(|entry| {
        entry.depth == n as u32
            && entry.standing_delay.as_nanos() == n
            && entry.p99.is_some_and(|p99| p99.as_nanos() == n)
            && entry.oldest_age.as_nanos() == n
    }))
}
