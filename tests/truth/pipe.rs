//! Depth and limit of pipes, compared with FIONREAD.

use std::{fs, os::fd::AsRawFd as _};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    io::ioctl_fionread,
    pipe::{PipeFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with},
};
use tailback_tests::{needs, sample::number};

use crate::sample_this_process;

#[test]
fn the_depth_of_a_pipe_matches_fionread() -> Result<()> {
    const TEST: &str = "the_depth_of_a_pipe_matches_fionread";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    const PAGE: usize = 4096;
    let mut pipes = Vec::new();
    // (ring size, bytes written, bytes read again, buffers in use)
    for (ring, bytes, read, buffers) in [
        (None, 0, 0, 0),
        (None, 1, 0, 1),
        (None, PAGE, 0, 1),
        (None, 5 * PAGE, 0, 5),
        (None, 10 * PAGE, 3 * PAGE, 7),
        (None, 10 * PAGE, 3 * PAGE + 1, 7),
        (None, 16 * PAGE, 0, 16),
        (Some(4 * PAGE), 3 * PAGE, 0, 3),
        (Some(64 * PAGE), 10 * PAGE, 0, 10),
        (Some(256 * PAGE), 256 * PAGE, 0, 256),
    ] {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        if let Some(ring) = ring {
            fcntl_setpipe_size(&writer, ring).context("size the pipe")?;
        }
        let mut written = 0;
        let page = vec![b'x'; PAGE];
        while written < bytes {
            written += rustix::io::write(&writer, &page[..PAGE.min(bytes - written)])?;
        }
        let mut sink = vec![0; read];
        let mut done = 0;
        while done < read {
            done += rustix::io::read(&reader, &mut sink[done..])?;
        }
        pipes.push((buffers, reader, writer));
    }
    // Several times around the ring, so that head and tail wrap: 37 pages pass through, 9 stay.
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let mut page = vec![b'x'; PAGE];
    for round in 0..46 {
        rustix::io::write(&writer, &page)?;
        if round < 37 {
            rustix::io::read(&reader, &mut page)?;
        }
    }
    pipes.push((9, reader, writer));

    let sample = sample_this_process()?;
    let mut wrong = Vec::new();
    for (buffers, reader, writer) in &pipes {
        let name = fs::read_link(format!("/proc/self/fd/{}", reader.as_raw_fd()))?;
        let queue = sample.queue("pipe", &name.to_string_lossy())?;
        let truth = ioctl_fionread(reader).context("ioctl FIONREAD")?;
        let ring = fcntl_getpipe_size(writer)? / PAGE;
        let ours = (number(queue, "depth")?, number(queue, "limit")?);
        let bytes = queue["bytes"].as_f64();
        println!(
            "agent {ours:?} buffers, {bytes:?} bytes; truth ({buffers}, {ring}), FIONREAD {truth}"
        );
        // The agent sums at most 16 buffers. Beyond that the bytes are unknown, which is not 0.
        let known = (*buffers <= 16).then_some(truth as f64);
        if ours != (*buffers, ring as u64) || bytes != known {
            wrong.push(format!(
                "{queue}: expected {buffers} of {ring} buffers, {known:?} bytes"
            ));
        }
    }
    println!(
        "{} pipes, {} differ from FIONREAD",
        pipes.len(),
        wrong.len()
    );
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
