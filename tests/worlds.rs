//! Sockets and threads of the kinds that real machines hold: handed on, shared, of other families, half-closed, with
//! sequence numbers that wrap, and very many.

use std::{
    fs,
    io::{ErrorKind, IoSlice, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::UnixListener,
    },
    path::Path,
    process::{self, Command},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    io::ioctl_fionread,
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
        SocketType, accept, bind, connect, ipproto, listen, sendmsg, socket_with,
    },
    process::Signal,
};
use serde_json::Value;
use tailback_tests::{
    agent::{Agent, MOST_CPU},
    look::{Look, float, number},
    needs, ports,
    process::{End, Process},
    program,
    service::Service,
    skip::skip,
    sockets,
    temp::TempDir,
    wait,
};

const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");
const SOON: Duration = Duration::from_secs(20);

/// What two looks 100 ms apart say of the test itself.
fn look_at_ourselves() -> Result<Look> {
    Look::at_process(process::id())
}

fn connect_all(to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    (0..count)
        .map(|_| TcpStream::connect(to).with_context(|| format!("connect to {to}")))
        .collect()
}

/// A connection with so many bytes that its server has not read.
fn unread(listener: &TcpListener, to: SocketAddr, bytes: usize) -> Result<(TcpStream, TcpStream)> {
    let mut client = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
    let (server, _) = listener.accept().context("accept")?;
    client.write_all(&vec![0; bytes]).context("send")?;
    wait_for_unread(&server, bytes as u64)?;
    Ok((client, server))
}

fn wait_for_unread(socket: &TcpStream, bytes: u64) -> Result<()> {
    wait::until(&format!("{bytes} unread bytes"), SOON, || {
        Ok((ioctl_fionread(socket)? == bytes).then_some(()))
    })
}

// --- handed on and shared ---

/// A listener with `waiting` connections and one accepted connection with `bytes` unread, and processes that were
/// handed both over a unix socket.
struct Handed {
    listener: TcpListener,
    server: TcpStream,
    _clients: Vec<TcpStream>,
    receivers: Vec<Process>,
    _folder: TempDir,
}

impl Handed {
    fn new(receivers: usize, threads: u32, waiting: usize, bytes: usize) -> Result<Self> {
        let listener = sockets::listen(ports::local(0), 50, false)?;
        let address = listener.local_addr()?;
        let (client, server) = unread(&listener, address, bytes)?;
        let mut clients = connect_all(address, waiting)?;
        clients.push(client);
        let folder = TempDir::new("handed")?;
        let path = folder.path().join("giver");
        let giver = UnixListener::bind(&path).context("listen on a unix socket")?;
        let receivers = (0..receivers)
            .map(|_| {
                let mut receiver = Command::new(SUBJECT);
                receiver.arg("receive").arg("--from").arg(&path);
                receiver.args(["--threads", &threads.to_string()]);
                let receiver = Process::start("the receiver", &mut receiver)?;
                hand(&giver, &[listener.as_fd(), server.as_fd()])?;
                receiver.wait_line("received 1 of 2", SOON)?;
                receiver.wait_line("parked", SOON)?;
                Ok(receiver)
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            listener,
            server,
            _clients: clients,
            receivers,
            _folder: folder,
        })
    }
}

/// Hands files to the next who comes.
fn hand(giver: &UnixListener, files: &[BorrowedFd<'_>]) -> Result<()> {
    let (receiver, _) = giver.accept().context("wait for the receiver")?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ensure!(
        ancillary.push(SendAncillaryMessage::ScmRights(files)),
        "no space"
    );
    sendmsg(
        &receiver,
        &[IoSlice::new(b"!")],
        &mut ancillary,
        SendFlags::empty(),
    )
    .context("hand files on")?;
    Ok(())
}

/// That one queue shows the listener, and one the connection, each counted once.
fn check_once(look: &Look, address: SocketAddr, waiting: u64, bytes: u64) -> Result<()> {
    let name = address.to_string();
    let of_name = look.queues("accept").filter(|queue| queue["name"] == *name);
    let accept: Vec<&Value> = of_name.collect();
    let name = format!(":{}", address.port());
    let of_name = look.queues("recv").filter(|queue| queue["name"] == *name);
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
fn a_listener_that_was_handed_over_is_the_receivers_too() -> Result<()> {
    const TEST: &str = "a_listener_that_was_handed_over_is_the_receivers_too";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let handed = Handed::new(1, 1, 5, 1_000)?;
    let address = handed.listener.local_addr()?;
    let pid = handed.receivers[0].pid();
    println!("while the giver holds them too:");
    check_once(&Look::at_process(pid)?, address, 5, 1_000)?;
    drop((handed.listener, handed.server));
    println!("when the giver has closed them:");
    let look = Look::at_process(pid)?;
    check_once(&look, address, 5, 1_000)?;
    let queue = look.queue("accept", &address.to_string())?;
    ensure!(number(queue, "pid")? == u64::from(pid), "{queue}");
    let by_port = Look::at(&["--port", &address.port().to_string()])?;
    check_once(&by_port, address, 5, 1_000)
}

#[test]
fn sockets_that_processes_share_count_once() -> Result<()> {
    const TEST: &str = "sockets_that_processes_share_count_once";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let handed = Handed::new(3, 1, 4, 2_000)?;
    let address = handed.listener.local_addr()?;
    let pids: Vec<String> = handed
        .receivers
        .iter()
        .map(|receiver| receiver.pid().to_string())
        .collect();
    let args = ["--pid", &pids[0], "--pid", &pids[1], "--pid", &pids[2]];
    let look = Look::at(&args)?;
    let targets: Vec<&Value> = look.targets().collect();
    ensure!(
        targets.len() == 1,
        "who shares a listener is one: {targets:?}"
    );
    check_once(&look, address, 4, 2_000)
}

#[test]
fn threads_that_share_files_count_them_once() -> Result<()> {
    const TEST: &str = "threads_that_share_files_count_them_once";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let handed = Handed::new(1, 30, 3, 3_000)?;
    let look = Look::at_process(handed.receivers[0].pid())?;
    check_once(&look, handed.listener.local_addr()?, 3, 3_000)?;
    let threads = look.queue("runqueue", "threads")?;
    ensure!(float(threads, "threads")? == 30.0, "{threads}");
    // Standard streams, the unix socket, and the two that were handed over.
    let open = number(look.queue("fd", "open files")?, "depth")?;
    let folder = format!("/proc/{}/fd", handed.receivers[0].pid());
    let truth = fs::read_dir(&folder)?.count() as u64;
    ensure!(open == truth, "{open} files, {folder} says {truth}");
    Ok(())
}

// --- families, protocols, and the ends of connections ---

#[test]
fn connections_over_ipv6_and_of_dual_stack_listeners_are_named_as_people_name_them() -> Result<()> {
    const TEST: &str =
        "connections_over_ipv6_and_of_dual_stack_listeners_are_named_as_people_name_them";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let v4 = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let v6 = |port| SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    type To = fn(u16) -> SocketAddr;
    let cases: [(To, To, usize); 3] = [(v6, v6, 600), (any, v4, 700), (any, v6, 800)];
    let mut kept = Vec::new();
    for (local, to, bytes) in cases {
        let listener = sockets::listen(local(ports::free()?), 10, false)?;
        let to = to(listener.local_addr()?.port());
        let pair = unread(&listener, to, bytes)?;
        kept.push((listener, to, bytes as u64, pair));
    }
    let look = look_at_ourselves()?;
    for (listener, to, bytes, (client, _)) in &kept {
        let (address, from) = (listener.local_addr()?, client.local_addr()?);
        println!("{address}, from {from}: {bytes} unread");
        look.queue("accept", &address.to_string())?;
        let recv = look.queue("recv", &format!(":{}", to.port()))?;
        ensure!(number(recv, "depth")? == *bytes, "{recv}");
        let worst = recv["worst"].as_str().unwrap_or_default();
        ensure!(worst.ends_with(&format!("with {from}")), "{recv}");
        // The other end opened it, to the address that it asked for.
        let opened = look.queue("send", &format!("-> {to}"))?;
        ensure!(number(opened, "depth")? == 0, "{opened}");
    }
    Ok(())
}

#[test]
fn a_listener_that_takes_multipath_tcp_is_seen_and_its_connections_are_right_or_absent()
-> Result<()> {
    const TEST: &str =
        "a_listener_that_takes_multipath_tcp_is_seen_and_its_connections_are_right_or_absent";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let socket = || {
        socket_with(
            AddressFamily::INET,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            Some(ipproto::MPTCP),
        )
    };
    let listener = match socket() {
        Ok(listener) => listener,
        Err(error) => {
            skip(TEST, &format!("this kernel makes no MPTCP socket: {error}"));
            return Ok(());
        }
    };
    let address = ports::local(ports::free()?);
    bind(&listener, &address)?;
    listen(&listener, 10)?;
    // The first is accepted and has unread bytes: an ordinary one, as nearly all are. Three wait, two of them with MPTCP.
    let mut first = TcpStream::connect(address)?;
    let server = TcpStream::from(accept(&listener)?);
    first.write_all(&[0; 5_000])?;
    let began = Instant::now();
    let waiting = [socket()?, socket()?];
    for client in &waiting {
        connect(client, &address)?;
    }
    let _third = TcpStream::connect(address)?;
    let mut byte = [0];
    wait::until("the bytes", SOON, || {
        Ok((server.peek(&mut byte).context("peek")? == 1).then_some(()))
    })?;
    thread::sleep(Duration::from_millis(200));
    let look = look_at_ourselves()?;
    let backlog = look.queue("accept", &format!("127.0.0.1:{}", address.port()))?;
    ensure!(
        number(backlog, "depth")? == 3 && number(backlog, "limit")? == 10,
        "{backlog}"
    );
    let oldest = Duration::from_nanos(number(backlog, "oldest_age_ns")?);
    ensure!(
        (Duration::from_millis(195)..began.elapsed()).contains(&oldest),
        "{backlog}"
    );
    let recv = look.queue("recv", &format!(":{}", address.port()))?;
    ensure!(number(recv, "depth")? == 5_000, "{recv}");

    // Of a connection that speaks it the outer socket has no sequence numbers.
    let spoken = TcpStream::from(accept(&listener)?);
    let mut client = TcpStream::from(waiting.into_iter().next().context("a client")?);
    client.write_all(&[0; 700])?;
    wait::until("the bytes", SOON, || {
        Ok((spoken.peek(&mut byte).context("peek")? == 1).then_some(()))
    })?;
    let look = look_at_ourselves()?;
    let recv = look.queue("recv", &format!(":{}", address.port()))?;
    ensure!(
        number(recv, "depth")? == 5_000 && number(recv, "total_bytes")? == 5_000,
        "{recv}"
    );
    Ok(())
}

#[test]
fn what_the_kernel_encrypts_has_no_nonsense_depth() -> Result<()> {
    const TEST: &str = "what_the_kernel_encrypts_has_no_nonsense_depth";
    if !needs::met(TEST, &["python3"]) {
        return Ok(());
    }
    let (python, first) = python("ktls.py", &[])?;
    if let Some(why) = first.strip_prefix("none: ") {
        skip(TEST, &format!("this kernel has no kTLS: {why}"));
        return Ok(());
    }
    let port = first.rsplit(' ').next().unwrap_or_default().to_owned();
    let look = Look::at_process(python.pid())?;
    let mut found = 0;
    let queues = ["recv", "send"]
        .into_iter()
        .flat_map(|kind| look.queues(kind));
    for queue in queues.filter(|queue| {
        queue["name"]
            .as_str()
            .is_some_and(|name| name.ends_with(&port))
    }) {
        println!("{queue}");
        found += 1;
        // Each record of up to 16 kB has a head and a tag; some may be read ahead and decrypted already.
        ensure!(number(queue, "depth")? <= 5_000 + 100, "{queue}");
    }
    ensure!(found > 0, "no queue of port {port} is told");
    Ok(())
}

#[test]
fn a_connection_that_is_half_closed_has_no_phantom_byte() -> Result<()> {
    const TEST: &str = "a_connection_that_is_half_closed_has_no_phantom_byte";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let listen = || sockets::listen(ports::local(0), 10, false);
    // What came before the FIN is unread; nothing is; and what was sent does not fit, so that the FIN has to wait.
    let (some, none, full) = (listen()?, listen()?, listen()?);
    let some_pair = unread(&some, some.local_addr()?, 1_000)?;
    let none_pair = unread(&none, none.local_addr()?, 0)?;
    let (mut full_client, full_server) = unread(&full, full.local_addr()?, 0)?;
    full_client.set_nonblocking(true)?;
    let mut sent = 0;
    loop {
        match full_client.write(&[0; 65_536]) {
            Ok(more) => sent += more as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("fill a connection"),
        }
    }
    for client in [&some_pair.0, &none_pair.0, &full_client] {
        client.shutdown(Shutdown::Write)?;
    }
    // It has arrived when a read of nothing more would say so.
    none_pair.1.peek(&mut [0]).context("wait for the FIN")?;
    let name = |kind: &str, listener: &TcpListener| -> Result<String> {
        let address = listener.local_addr()?;
        Ok(match kind {
            "recv" => format!(":{}", address.port()),
            _ => format!("-> {address}"),
        })
    };
    let look = look_at_ourselves()?;
    for (kind, listener, truth) in [
        ("recv", &some, 1_000),
        ("send", &some, 0),
        ("recv", &none, 0),
        ("send", &none, 0),
    ] {
        let name = name(kind, listener)?;
        let queue = look.queue(kind, &name)?;
        println!("{kind} {name}: {} of {truth}", queue["depth"]);
        ensure!(number(queue, "depth")? == truth, "{truth}: {queue}");
    }
    // The window may open by a little while we look: what is unread and what is unacknowledged are all that was sent.
    let unread_full = number(look.queue("recv", &name("recv", &full)?)?, "depth")?;
    let unacknowledged = number(look.queue("send", &name("send", &full)?)?, "depth")?;
    println!("{sent} sent: {unread_full} unread, {unacknowledged} unacknowledged");
    ensure!(unread_full + unacknowledged == sent);
    drop(full_server);
    // Both directions closed, one end still open: CLOSE_WAIT went to LAST_ACK or TIME_WAIT, and nothing is queued.
    let mut server = &some_pair.1;
    server.read_exact(&mut [0; 1_000])?;
    server.shutdown(Shutdown::Write)?;
    none_pair.1.shutdown(Shutdown::Both)?;
    let look = look_at_ourselves()?;
    for listener in [&some, &none] {
        for kind in ["recv", "send"] {
            let (port, to) = (
                format!(":{}", listener.local_addr()?.port()),
                format!("-> {}", listener.local_addr()?),
            );
            for queue in look.queues(kind) {
                let ours = queue["name"] == *port || queue["name"] == *to;
                ensure!(!ours || number(queue, "depth")? == 0, "{queue}");
            }
        }
    }
    Ok(())
}

/// A Python program of the harness, and the first line that it says.
fn python(file: &str, args: &[&str]) -> Result<(Process, String)> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("harness")
        .join(file);
    let mut command = Command::new(program::need(&["python3"])?);
    let python = Process::start("python", command.arg(file).args(args))?;
    let first = python
        .lines()
        .wait("python to say something", 0, SOON, |line| {
            Some(line.text.clone())
        })?;
    Ok((python, first))
}

#[test]
fn sequence_numbers_that_wrap_are_counted_through() -> Result<()> {
    const TEST: &str = "sequence_numbers_that_wrap_are_counted_through";
    if !needs::met(TEST, &["python3"]) {
        return Ok(());
    }
    // Bytes before the wrap, sent, read: what is read ends before, at and after it; the last three do not fit.
    let cases = [
        "0,5000,0",
        "1,5000,0",
        "1,5000,1",
        "1000,5000,999",
        "1000,5000,1000",
        "1000,5000,1001",
        "5000,5000,0",
        "70000,60000,30000",
        "1000,9000000,0",
        "100000,9000000,50000",
        "3000000,9000000,0",
    ];
    let (python, _) = python("wrap.py", &cases)?;
    python.wait_line("ready", SOON)?;
    let look = Look::at_process(python.pid())?;
    let mut checked = 0;
    for line in python.lines().all() {
        let numbers: Vec<u64> = line.text.split(' ').flat_map(str::parse).collect();
        let [port, before, unread, unacknowledged] = numbers[..] else {
            continue;
        };
        let recv = look.queue("recv", &format!(":{port}"))?;
        let send = look.queue("send", &format!("-> 127.0.0.1:{port}"))?;
        println!(
            "from {before} before the wrap: unread {} (SIOCINQ {unread}), unacknowledged {} (SIOCOUTQ {unacknowledged})",
            recv["depth"], send["depth"]
        );
        ensure!(number(recv, "depth")? == unread, "{unread}: {recv}");
        ensure!(
            number(send, "depth")? == unacknowledged,
            "{unacknowledged}: {send}"
        );
        for queue in [recv, send] {
            // Nothing moves: a difference across the wrap would be some 4 GB.
            for key in ["arrivals_per_s", "departures_per_s"] {
                ensure!(queue[key].as_f64().unwrap_or(0.0) == 0.0, "{queue}");
            }
        }
        checked += 1;
    }
    ensure!(checked == cases.len(), "{checked} of {} cases", cases.len());
    Ok(())
}

// --- very many ---

/// CPU time of a process, as /proc has it (in hundredths of a second).
fn cpu_time(pid: u32) -> Result<Duration> {
    let file = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    let after_name = stat.rsplit(") ").next().unwrap_or_default();
    let numbers: Vec<u64> = after_name.split(' ').flat_map(str::parse).collect();
    // Of the fields 4 (ppid) and up, utime is the 11th and stime the 12th: proc(5).
    let ticks: u64 = numbers.iter().skip(10).take(2).sum();
    Ok(Duration::from_millis(ticks * 10))
}

/// The agent keeps its budget, once what there is to learn of its targets is learnt; stopped, it ends as it should.
fn check_budget(agent: &Agent) -> Result<()> {
    let said = agent.wait_for("what it costs", SOON, |event| event.is("agent"))?;
    let pid = agent.process().pid();
    let (before, begun) = (cpu_time(pid)?, Instant::now());
    // What is measured is this time: nothing is waited for.
    thread::sleep(Duration::from_secs(6));
    let share = (cpu_time(pid)? - before).as_secs_f64() / begun.elapsed().as_secs_f64();
    let of = |key: &str| said.number(key).unwrap_or(f64::NAN);
    println!(
        "{} processes, {} records in {} ticks, {:.1} MB, {} late; {:.4} of a core in its first ten seconds, then {share:.4}",
        of("processes"),
        of("records"),
        of("ticks"),
        of("rss_bytes") / 1e6,
        of("late_ticks"),
        of("cpu_share"),
    );
    ensure!(share <= MOST_CPU, "{share} of a core: {}", said.value);
    agent.process().signal(Signal::TERM)?;
    let end = agent.process().wait_end(SOON)?;
    ensure!(end == End::Code(0), "it ended with {end:?}");
    Ok(())
}

#[test]
fn twenty_thousand_sockets_are_all_seen_within_the_budget() -> Result<()> {
    const TEST: &str = "twenty_thousand_sockets_are_all_seen_within_the_budget";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    // Fewer in each than the hard limit of open files on most machines.
    const EACH: u32 = 4_000;
    const PROCESSES: u32 = 5;
    let holders: Vec<Service> = (0..PROCESSES)
        .map(|_| {
            let args = ["hold", "--sockets", &EACH.to_string()];
            Service::start(&mut Command::new(SUBJECT), &args)
        })
        .collect::<Result<_>>()?;
    let mut args: Vec<String> = Vec::new();
    for holder in &holders {
        args.extend(["--pid".to_owned(), holder.pid().to_string()]);
    }
    let agent = Agent::run(&args)?;
    // One of them has more that nobody accepts, and one byte each that nobody reads.
    let mut extra = connect_all(holders[0].address(), 100)?;
    for stream in &mut extra {
        stream.write_all(b"!")?;
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let look = Look::at(&args)?;
    let connections = |kind: &str| -> Result<f64> {
        look.queues(kind)
            .map(|queue| float(queue, "connections"))
            .sum()
    };
    println!(
        "{} connections in receive queues, {} in send queues",
        connections("recv")?,
        connections("send")?
    );
    let truth = f64::from(EACH * PROCESSES);
    ensure!(connections("recv")? == truth && connections("send")? == truth);
    for holder in &holders {
        let own = look.queue("recv", &format!(":{}", holder.address().port()))?;
        ensure!(float(own, "connections")? == f64::from(EACH / 2), "{own}");
        ensure!(number(own, "depth")? == 0, "{own}");
    }
    let accept = look.queue("accept", &holders[0].address().to_string())?;
    ensure!(number(accept, "depth")? == 100, "{accept}");
    check_budget(&agent)
}

#[test]
fn five_thousand_threads_are_all_seen_within_the_budget() -> Result<()> {
    const TEST: &str = "five_thousand_threads_are_all_seen_within_the_budget";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let mut parked = Command::new(SUBJECT);
    let parked = Process::start("threads", parked.args(["park", "--threads", "5000"]))?;
    parked.wait_line("parked", SOON)?;
    let agent = Agent::run(["--pid", &parked.pid().to_string()])?;
    let look = Look::at_process(parked.pid())?;
    let threads = look.queue("runqueue", "threads")?;
    println!("{threads}");
    ensure!(float(threads, "threads")? == 5_000.0, "{threads}");
    ensure!(number(threads, "depth")? == 0, "all sleep: {threads}");
    check_budget(&agent)
}

#[test]
fn five_hundred_processes_are_watched_at_once() -> Result<()> {
    const TEST: &str = "five_hundred_processes_are_watched_at_once";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let folder = TempDir::new("crowd")?;
    let program = program::renamed(SUBJECT, &folder, "crowd")?;
    // Processes of one program below one parent are one service: five of a hundred listeners each.
    let crowds: Vec<Process> = (0..5)
        .map(|_| {
            let args = ["crowd", "--workers", "100", "--waiting", "2"];
            Process::start("a crowd", Command::new(&program).args(args))
        })
        .collect::<Result<_>>()?;
    let addresses: Vec<String> = wait::until("500 listeners", SOON, || {
        let lines = crowds.iter().flat_map(|crowd| crowd.lines().all());
        let of_listener = |line: String| line.strip_prefix("listening ").map(str::to_owned);
        let addresses: Vec<String> = lines.filter_map(|line| of_listener(line.text)).collect();
        Ok((addresses.len() == 500).then_some(addresses))
    })?;
    let agent = Agent::run(["--all"])?;
    let look = Look::at(&["--all"])?;
    let mut missing = 0;
    for address in &addresses {
        match look.queue("accept", address) {
            Ok(queue) => ensure!(number(queue, "depth")? == 2, "{queue}"),
            Err(_) => missing += 1,
        }
    }
    println!(
        "{} targets, {missing} of 500 listeners not shown",
        look.targets().count()
    );
    ensure!(missing == 0, "{missing} are not shown");
    check_budget(&agent)
}
