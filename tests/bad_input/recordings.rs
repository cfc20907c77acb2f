//! Truncated, foreign and hostile recordings, and full disks.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::{process::End, temp::TempDir};

use crate::{Output, allowed, idle, json, run, with_own_mounts};

/// Records an idle process for three seconds.
pub fn recording(directory: &TempDir) -> Result<Vec<u8>> {
    let process = idle()?;
    let file = directory.path().join("whole");
    let (pid, out) = (process.pid().to_string(), file.to_string_lossy());
    let times = ["--duration=3s", "--interval=20ms"];
    let args = ["record", "--pid", &pid, "--out", &out, times[0], times[1]];
    run(&args)?.check(0, &["samples to", "tailback replay"])?;
    fs::read(&file).with_context(|| format!("read {out}"))
}

fn replay(directory: &TempDir, bytes: &[u8]) -> Result<Output> {
    let file = directory.path().join("replayed");
    fs::write(&file, bytes)?;
    run(&["replay", &file.to_string_lossy()])
}

#[test]
fn a_truncated_or_damaged_recording_is_replayed_up_to_the_damage() -> Result<()> {
    if !allowed("a_truncated_or_damaged_recording_is_replayed_up_to_the_damage") {
        return Ok(());
    }
    let directory = TempDir::new("recording")?;
    let whole = recording(&directory)?;
    let complete = replay(&directory, &whole)?;
    complete.check(0, &[])?;
    ensure!(complete.out[0].contains("watching"), "{:?}", complete.out);

    let cut = replay(&directory, &whole[..whole.len() - 5])?;
    cut.check(
        2,
        &["cannot replay", "truncated after", "the disk was full"],
    )?;
    // The output of the last sample may be lost with it.
    ensure!(
        !cut.out.is_empty() && complete.out.starts_with(&cut.out),
        "{:?}",
        cut.out
    );

    let mut damaged = whole.clone();
    let last = damaged.len() - 5;
    damaged[last] ^= 0x55;
    let damaged = replay(&directory, &damaged)?;
    damaged.check(2, &["cannot replay", "corrupt after"])?;
    ensure!(damaged.out == cut.out, "{:?}", damaged.out);

    let mut newer = whole.clone();
    newer[12] = 0xff;
    let newer = replay(&directory, &newer)?;
    newer.check(2, &["format 255", "the version that recorded it"])?;
    Ok(())
}

#[test]
fn a_file_that_is_not_a_recording_is_rejected() -> Result<()> {
    let directory = TempDir::new("recording")?;
    for bytes in [&b""[..], b"#!/bin/sh\n", b"TAILBACK", &[0; 5000]] {
        let words = ["not a Tailback recording", "tailback record"];
        replay(&directory, bytes)?.check(2, &words)?;
    }
    replay(&directory, b"TAILBACKREC\n\x01")?.check(2, &["truncated after 0 samples"])?;
    run(&["replay", "/no/such/file"])?.check(2, &["cannot replay", "No such file"])?;
    run(&["replay", "/tmp"])?.check(2, &["cannot replay /tmp", "directory"])?;
    run(&["replay"])?.check(2, &["<FILE>"])?;
    Ok(())
}

/// Reproducible pseudo-random numbers (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

#[test]
fn no_input_makes_replay_panic() -> Result<()> {
    if !allowed("no_input_makes_replay_panic") {
        return Ok(());
    }
    let directory = TempDir::new("noise")?;
    let whole = recording(&directory)?;
    let mut numbers = Numbers(0x7a11_bac4);
    for round in 0..200 {
        let mut bytes = whole.clone();
        match round % 4 {
            // Only noise; noise after a valid header; a few changed bytes; a missing piece.
            0 => {
                bytes = (0..numbers.below(3000))
                    .map(|_| numbers.below(256) as u8)
                    .collect();
            }
            1 => bytes
                .iter_mut()
                .skip(16)
                .for_each(|byte| *byte = numbers.below(256) as u8),
            2 => {
                for _ in 0..=numbers.below(8) {
                    let at = numbers.below(bytes.len());
                    bytes[at] = numbers.below(256) as u8;
                }
            }
            _ => {
                let from = numbers.below(bytes.len());
                let to = from + numbers.below(bytes.len() - from);
                bytes.drain(from..to);
            }
        }
        let output = replay(&directory, &bytes).with_context(|| format!("in round {round}"))?;
        ensure!(
            matches!(output.end, End::Code(0 | 2)),
            "in round {round} it exited with {:?}: {}",
            output.end,
            output.text()
        );
    }
    Ok(())
}

#[test]
fn an_unwritable_recording_exits_with_74() -> Result<()> {
    if !allowed("an_unwritable_recording_exits_with_74") {
        return Ok(());
    }
    for (path, problem) in [
        ("/no/such/directory/file", "No such file"),
        ("/tmp", "Is a directory"),
        ("/dev/full", "No space left"),
    ] {
        let record = ["record", "--all", "--duration=3s", "--out", path];
        run(&record)?.check(74, &["the recording", path, problem])?;
    }
    let args = ["run", "--all", "--record", "/no/such/directory/file"];
    run(&args)?.check(74, &["cannot write the recording", args[3]])
}

/// Runs the agent with a tiny file system at `$DISK`, then replays the file `$DISK/record`. Returns both outputs.
fn on_a_small_disk(test: &str, args: &str) -> Result<Option<(Output, Output)>> {
    let (disk, kept) = (TempDir::new("disk")?, TempDir::new("kept")?);
    let file = kept.path().join("record");
    // A high budget fills the disk quickly, even on a busy machine.
    let config = kept.write("tailback.toml", "cpu_budget = 0.5\n")?;
    let process = idle()?;
    let script = format!(
        r#"DISK={disk}
        mount -t tmpfs -o size=8k none $DISK || nothing_mounted
        "$0" {args} --config {config} --pid {pid} --interval 5ms; code=$?
        cp $DISK/record {kept} && exit $code"#,
        disk = disk.path().display(),
        config = config.display(),
        pid = process.pid(),
        kept = file.display(),
    );
    let Some(full) = with_own_mounts(test, &script, &[])? else {
        return Ok(None);
    };
    let replayed = run(&["replay", &file.to_string_lossy()])?;
    Ok(Some((full, replayed)))
}

/// Words of the error for a full disk.
const FULL_DISK: &[&str] = &[
    "the recording",
    "stops after",
    "No space left on device",
    "free some space",
];

#[test]
fn record_exits_on_a_full_disk_and_the_partial_recording_replays() -> Result<()> {
    let test = "record_exits_on_a_full_disk_and_the_partial_recording_replays";
    if !allowed(test) {
        return Ok(());
    }
    let args = "record --out $DISK/record --duration 60s";
    if let Some((output, replayed)) = on_a_small_disk(test, args)? {
        output.check(74, FULL_DISK)?;
        replayed.check(2, &["truncated after"])?;
        ensure!(replayed.out[0].contains("watching"), "{:?}", replayed.out);
    }
    Ok(())
}

#[test]
fn run_continues_on_a_full_disk_and_counts_lost_samples() -> Result<()> {
    let test = "run_continues_on_a_full_disk_and_counts_lost_samples";
    if !allowed(test) {
        return Ok(());
    }
    let begun = Instant::now();
    let args = "run --json --record $DISK/record --duration 18s";
    if let Some((output, replayed)) = on_a_small_disk(test, args)? {
        output.check(74, FULL_DISK)?;
        output.check(74, &["samples were not recorded"])?;
        ensure!(begun.elapsed() >= Duration::from_secs(18));
        let lines = json(&output.out)?;
        // The agent reports its own cost after ten seconds.
        let report = lines.iter().find(|line| line["type"] == "agent");
        let lost = report.and_then(|report| report["samples_not_recorded"].as_u64());
        ensure!(lost > Some(0), "{report:?}");
        replayed.check(2, &["truncated after"])?;
    }
    Ok(())
}
