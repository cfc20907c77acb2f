//! The counters that the agent reads of a real JVM lie between two readings of the JDK's own tool.

#![forbid(unsafe_code)]

mod perf_data;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tailback::{
    collect::{parse_jvm_counters, read_jvm_counters},
    sample::JvmCounters,
};
use tailback_tests::{needs, process::Process, program, skip::skip, temp::TempDir, wait};

/// Time for a JVM to compile its program and to collect.
const DEADLINE: Duration = Duration::from_secs(60);
/// It collects garbage again and again.
const PROGRAM: &str = "
    public class Garbage {
        public static void main(String[] arguments) throws Exception {
            System.out.println(\"collecting\");
            while (true) {
                System.gc();
                Thread.sleep(20);
            }
        }
    }
";

/// A JVM with these options that runs this program.
fn start(directory: &TempDir, options: &[&str]) -> Result<Process> {
    let source = directory.write("Garbage.java", PROGRAM)?;
    start_by(
        Command::new(program::need(&["java"])?).args(options),
        &source,
    )
}

/// The same by a command that takes the arguments of `java`.
fn start_by(command: &mut Command, source: &Path) -> Result<Process> {
    let jvm = Process::start("java", command.arg("-Xmx32m").arg(source))?;
    jvm.wait_line("collecting", DEADLINE)?;
    Ok(jvm)
}

/// All counters, by name.
fn printed_by_jcmd(pid: u32) -> Result<HashMap<String, u64>> {
    let mut jcmd = Command::new(program::need(&["jcmd"])?);
    let output = jcmd.arg(pid.to_string()).arg("PerfCounter.print").output();
    let output = output.context("start jcmd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "jcmd: {}: {text}", output.status);
    let counter = |line: &str| {
        let (name, value) = line.split_once('=')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    Ok(text.lines().filter_map(counter).collect())
}

/// The counters that the agent reads, from all those that the tool prints: collections, their time, stops, their time.
fn wanted(printed: &HashMap<String, u64>) -> Result<[u64; 4]> {
    let one = |name: &str| {
        let value = printed.get(name).copied();
        value.with_context(|| format!("jcmd does not print {name}"))
    };
    let frequency = one("sun.os.hrt.frequency")?;
    let sum = |counter: &str| -> u64 {
        let of_collector = |(name, _): &(&String, &u64)| {
            let rest = name.strip_prefix("sun.gc.collector.");
            rest.and_then(|rest| rest.split_once('.'))
                .map(|(_, rest)| rest)
                == Some(counter)
        };
        let values = printed.iter().filter(of_collector);
        values.map(|(_, value)| value).sum()
    };
    let ns = |ticks: u64| (u128::from(ticks) * 1_000_000_000 / u128::from(frequency)) as u64;
    Ok([
        sum("invocations"),
        ns(sum("time")),
        one("sun.rt.safepoints")?,
        ns(one("sun.rt.safepointTime")?),
    ])
}

fn read(pid: u32) -> Result<JvmCounters> {
    let read = read_jvm_counters(pid).context("the performance data cannot be read")?;
    read.map_err(|reason| anyhow::anyhow!("{reason}"))
}

fn values(counters: JvmCounters) -> [u64; 4] {
    [
        counters.collections,
        counters.collector_ns,
        counters.safepoints,
        counters.safepoint_ns,
    ]
}

#[test]
fn counters_are_those_that_the_jdk_reads() -> Result<()> {
    let directory = TempDir::new("jvm")?;
    for collector in ["-XX:+UseSerialGC", "-XX:+UseParallelGC", "-XX:+UseG1GC"] {
        let jvm = start(&directory, &[collector])?;
        let before = wait::until("three collections", DEADLINE, || {
            let counters = read(jvm.pid()).ok();
            Ok(counters.filter(|counters| counters.collections >= 3))
        })?;
        let between = wanted(&printed_by_jcmd(jvm.pid())?)?;
        let after = wait::until_ok("the counters", DEADLINE, || read(jvm.pid()))?;
        let [before, after] = [before, after].map(values);
        let is_between = |index: usize| (before[index]..=after[index]).contains(&between[index]);
        ensure!(
            (0..4).all(is_between),
            "{collector}: {before:?}, jcmd {between:?}, {after:?}"
        );
        ensure!(after[1] > 0, "{collector}: no time in collections");
        jvm.stop(DEADLINE)?;
    }
    Ok(())
}

#[test]
fn a_jvm_that_does_not_share_its_counters_has_none() -> Result<()> {
    let directory = TempDir::new("jvm")?;
    let jvm = start(&directory, &["-XX:+PerfDisableSharedMem"])?;
    ensure!(read_jvm_counters(jvm.pid()).is_none(), "it has some");
    jvm.stop(DEADLINE)?;
    Ok(())
}

/// A file in /tmp, removed on drop.
struct Planted(PathBuf);

impl Drop for Planted {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn the_file_is_read_in_the_mount_namespace_of_the_jvm_and_not_in_that_of_the_agent() -> Result<()> {
    let test = "the_file_is_read_in_the_mount_namespace_of_the_jvm_and_not_in_that_of_the_agent";
    if !needs::met(test, &["unshare", "mount"]) {
        return Ok(());
    }
    let unshare = program::need(&["unshare"])?;
    let may_mount = Command::new(&unshare).args(["--mount", "true"]).output()?;
    if !may_mount.status.success() {
        let error = String::from_utf8_lossy(&may_mount.stderr).into_owned();
        skip(test, &format!("cannot mount here: {error}"));
        return Ok(());
    }
    let directory = TempDir::new("jvm")?;
    directory.write("Garbage.java", PROGRAM)?;
    let script = "mount --bind \"$0\" /tmp && exec java \"$@\"";
    let mut command = Command::new(unshare);
    command.args(["--mount", "sh", "-c", script]);
    let source = Path::new("/tmp/Garbage.java");
    let jvm = start_by(command.arg(directory.path()), source)?;

    // The same path, outside its namespace.
    let name = |entry: fs::DirEntry| entry.file_name().into_string().ok();
    let mut names = fs::read_dir(directory.path())?.filter_map(|entry| name(entry.ok()?));
    let own = names.find(|name| name.starts_with("hsperfdata_"));
    let outside = Path::new("/tmp").join(own.context("it has no performance data")?);
    fs::create_dir_all(&outside)?;
    let planted = Planted(outside.join(jvm.pid().to_string()));
    let mut bytes = perf_data::jvm([1_000_000_000, 1, 1, i64::MAX, 1, 1, 1], true);
    bytes.resize(32 * 1024, 0);
    fs::write(&planted.0, &bytes)?;
    let decoy = parse_jvm_counters(jvm.pid(), &bytes);
    ensure!(decoy.is_ok(), "the decoy would not be read: {decoy:?}");

    let counters = wait::until("a collection", DEADLINE, || {
        let counters = read(jvm.pid())?;
        Ok((counters.collections > 0).then_some(counters))
    })?;
    ensure!(counters.collections < 1 << 32, "the decoy was read");
    jvm.stop(DEADLINE)?;
    Ok(())
}
