//! Sockets passed over unix sockets, and files shared by processes and threads: each queue counts once.

use std::{
    fs,
    io::IoSlice,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::UnixListener,
    },
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use tailback_tests::{
    needs, ports,
    process::Process,
    sample::{Sample, float, number},
    sockets,
    temp::TempDir,
};

use crate::{DEADLINE, SUBJECT, connect_all, unread};

/// A listener with `waiting` connections and one accepted connection with `bytes` unread, and processes that received both
/// over a unix socket.
struct Passed {
    listener: TcpListener,
    server: TcpStream,
    _clients: Vec<TcpStream>,
    receivers: Vec<Process>,
    _directory: TempDir,
}

impl Passed {
    fn new(receivers: usize, threads: u32, waiting: usize, bytes: usize) -> Result<Self> {
        let listener = sockets::listen(ports::local(0), 50, false)?;
        let address = listener.local_addr()?;
        let (client, server) = unread(&listener, address, bytes)?;
        let mut clients = connect_all(address, waiting)?;
        clients.push(client);
        let directory = TempDir::new("passed")?;
        let path = directory.path().join("sender");
        let sender = UnixListener::bind(&path).context("listen on a unix socket")?;
        let receivers = (0..receivers)
            .map(|_| {
                let mut receiver = Command::new(SUBJECT);
                receiver.arg("receive").arg("--from").arg(&path);
                receiver.args(["--threads", &threads.to_string()]);
                let receiver = Process::start("the receiver", &mut receiver)?;
                send_descriptors(&sender, &[listener.as_fd(), server.as_fd()])?;
                receiver.wait_line("received 1 of 2", DEADLINE)?;
                receiver.wait_line("parked", DEADLINE)?;
                Ok(receiver)
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            listener,
            server,
            _clients: clients,
            receivers,
            _directory: directory,
        })
    }
}

/// Sends descriptors to the next process that connects.
fn send_descriptors(sender: &UnixListener, files: &[BorrowedFd<'_>]) -> Result<()> {
    let (receiver, _) = sender.accept().context("accept the receiver")?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ensure!(
        ancillary.push(SendAncillaryMessage::ScmRights(files)),
        "no room for the descriptors"
    );
    sendmsg(
        &receiver,
        &[IoSlice::new(b"!")],
        &mut ancillary,
        SendFlags::empty(),
    )
    .context("send descriptors")?;
    Ok(())
}

/// Checks that the listener and the connection are one queue each, counted once.
fn check_once(sample: &Sample, address: SocketAddr, waiting: u64, bytes: u64) -> Result<()> {
    let name = address.to_string();
    let of_name = sample
        .queues("accept")
        .filter(|queue| queue["name"] == *name);
    let accept: Vec<&Value> = of_name.collect();
    let name = format!(":{}", address.port());
    let of_name = sample.queues("recv").filter(|queue| queue["name"] == *name);
    let recv: Vec<&Value> = of_name.collect();
    println!("{} accept and {} recv queues", accept.len(), recv.len());
    ensure!(accept.len() == 1 && recv.len() == 1, "{accept:?} {recv:?}");
    ensure!(number(accept[0], "depth")? == waiting, "{}", accept[0]);
    ensure!(float(accept[0], "sockets")? == 1.0, "{}", accept[0]);
    ensure!(number(recv[0], "depth")? == bytes, "{}", recv[0]);
    ensure!(float(recv[0], "connections")? == 1.0, "{}", recv[0]);
    ensure!(
        float(recv[0], "total_bytes")? == bytes as f64,
        "{}",
        recv[0]
    );
    Ok(())
}

#[test]
fn a_listener_passed_to_another_process_belongs_to_the_receiver_too() -> Result<()> {
    const TEST: &str = "a_listener_passed_to_another_process_belongs_to_the_receiver_too";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let passed = Passed::new(1, 1, 5, 1_000)?;
    let address = passed.listener.local_addr()?;
    let pid = passed.receivers[0].pid();
    println!("while the sender still holds them:");
    check_once(&Sample::of_process(pid)?, address, 5, 1_000)?;
    drop((passed.listener, passed.server));
    println!("after the sender closed them:");
    let sample = Sample::of_process(pid)?;
    check_once(&sample, address, 5, 1_000)?;
    let queue = sample.queue("accept", &address.to_string())?;
    ensure!(number(queue, "pid")? == u64::from(pid), "{queue}");
    let by_port = Sample::of(&["--port", &address.port().to_string()])?;
    check_once(&by_port, address, 5, 1_000)
}

#[test]
fn sockets_that_processes_share_count_once() -> Result<()> {
    const TEST: &str = "sockets_that_processes_share_count_once";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let passed = Passed::new(3, 1, 4, 2_000)?;
    let address = passed.listener.local_addr()?;
    let pids: Vec<String> = passed
        .receivers
        .iter()
        .map(|receiver| receiver.pid().to_string())
        .collect();
    let args = ["--pid", &pids[0], "--pid", &pids[1], "--pid", &pids[2]];
    let sample = Sample::of(&args)?;
    let targets: Vec<&Value> = sample.targets().collect();
    ensure!(
        targets.len() == 1,
        "processes that share a listener must be one target: {targets:?}"
    );
    check_once(&sample, address, 4, 2_000)
}

#[test]
fn threads_that_share_files_count_them_once() -> Result<()> {
    const TEST: &str = "threads_that_share_files_count_them_once";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let passed = Passed::new(1, 30, 3, 3_000)?;
    let sample = Sample::of_process(passed.receivers[0].pid())?;
    check_once(&sample, passed.listener.local_addr()?, 3, 3_000)?;
    let threads = sample.queue("runqueue", "threads")?;
    ensure!(float(threads, "threads")? == 30.0, "{threads}");
    // Standard streams, the unix socket, and the two received descriptors.
    let open = number(sample.queue("fd", "open files")?, "depth")?;
    let directory = format!("/proc/{}/fd", passed.receivers[0].pid());
    let truth = fs::read_dir(&directory)?.count() as u64;
    ensure!(open == truth, "{open} open files, {directory} has {truth}");
    Ok(())
}
